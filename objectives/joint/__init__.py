"""Compression by sparse, low-rank and codebook forms of a model's weights together.

- ``codebook``: weights as a table of shared values and an index each
"""

__all__ = ["codebook"]
