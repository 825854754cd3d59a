"""What a user does with an output folder: load, verify, undo.

- ``find``: where the result of a run or a training is
- ``formats``: the front of formats, and the model of another of its points
- ``load``: loading of models from an output folder
- ``verification``: ``verify`` and ``undo``: what the manifest promises, checked and taken back
"""

__all__ = ["find", "formats", "load", "verification"]
