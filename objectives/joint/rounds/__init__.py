"""A model trained sparse, then made lower in rank and trained again, round after round, until it loses too much.

- ``_updates``: updates of a float model's weights: order, learning rate, clipping, the last good state
- ``loop``: fold, decompose, train, measure, judge: the rounds
- ``outcome``: what a training and the rounds came to
- ``regularised``: training with the sparsity terms, from which the rounds start
- ``settings``: how the model is trained, and how its rank falls
"""

__all__ = ["loop", "outcome", "regularised", "settings"]
