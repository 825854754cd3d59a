"""Joint compression of a model: sparse, low-rank and codebook forms together.

- ``artifact``: a compressed model, and what explains it, out of its output folder
"""

__all__ = ["artifact"]
