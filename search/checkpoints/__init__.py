"""What a user does with an output folder: load, verify, undo.

- ``load``: loading of models from an output folder
- ``verification``: ``verify`` and ``undo``: what the manifest promises, checked and taken back
"""

__all__ = ["load", "verification"]
