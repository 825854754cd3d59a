"""Folders made on the way to a place, which go again where nobody came to use them."""

from __future__ import annotations

from pathlib import Path


class ParentFolders:
    """Makes the folders that are missing, and remembers which those were."""

    def __init__(self) -> None:
        self._made: list[Path] = []

    def make(self, folder: Path) -> None:
        """Make ``folder`` and what is missing above it.

        Args:
            folder: An absolute path.

        Raises:
            OSError: One cannot be made; those above it are remembered.
        """
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for parent in reversed(missing):
            parent.mkdir()
            self._made.append(parent)

    def remove(self) -> None:
        """Remove those that were made, the innermost first, up to one that is in use by now."""
        for parent in reversed(self._made):
            try:
                parent.rmdir()
            except OSError:
                break
        self._made.clear()
