"""What a user does with an output folder: load, verify, undo.

- ``find``: where the result of a run or a training is
- ``load``: loading of models from an output folder
- ``verification``: ``verify`` and ``undo``: what the manifest promises, checked and taken back
"""

__all__ = ["find", "load", "verification"]
