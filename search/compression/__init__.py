"""Joint compression of a model: sparse, low-rank and codebook forms together.

- ``_signals``: voiced and unvoiced signals in noise, generated
- ``artifact``: a compressed model, and what explains it, out of its output folder
- ``embedded``: the embedded default: a speech-enhancement model, its data and its metrics
"""

__all__ = ["artifact", "embedded"]
