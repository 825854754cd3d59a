"""Weights as a product of two thin matrices.

- ``classes``: convolutions, gates of recurrent layers over their input or state, other linear layers
- ``covariances``: what every layer reads, for decompositions that count errors by it
- ``decomposition``: matrices as a product of two thin ones, by singular values: formulas fB4 to fB6
- ``factored``: layers in factored form, both factors trainable
- ``factorization``: the layers of a model in factored form wherever that has fewer numbers
- ``norms``: normalizations folded into the weights around them before these are decomposed
- ``spectrum``: which layers truncation does not make smaller, because their spectrum is flat
"""

__all__ = ["classes", "covariances", "decomposition", "factored", "factorization", "norms", "spectrum"]
