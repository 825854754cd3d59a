"""Scales of normalizations pushed to zero while a model is trained, so that its weights become low in rank.

- ``targets``: which normalizations the two terms are put on, found by structure
- ``terms``: the terms: formulas fB1 to fB3
"""

__all__ = ["targets", "terms"]
