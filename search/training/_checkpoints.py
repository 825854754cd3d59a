"""Checkpoints of a training as files: the last one is there whole, whatever happens while the next is written."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.reading import parse_json
from alphasmith.objectives.training.ports import Checkpoint
from alphasmith.storage.files.durable import NO_SPACE, sync_folder
from alphasmith.storage.files.tensors import read_metadata, read_tensors, write_tensors

_NAME, _NEXT = "checkpoint.safetensors", "checkpoint.next"


class CheckpointFolder:
    """Keeps the last checkpoint of one training as a file of a folder. See ``objectives.training.ports.Checkpoints``.

    Args:
        folder: Made with the first checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / _NAME

    def save(self, checkpoint: Checkpoint) -> None:
        """Take the place of the last one.

        Args:
            checkpoint: Not changed.

        Raises:
            InputError: Field ``out``: no space, or not writable.
        """
        following = self._folder / _NEXT
        state = json.dumps(dict(checkpoint.state), sort_keys=True, allow_nan=False)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_tensors(following, checkpoint.tensors, {"state": state})
            os.replace(following, self._file)
            sync_folder(self._folder)
        except OSError as error:
            with suppress(OSError):
                following.unlink(missing_ok=True)
            problem = "no space left for checkpoints" if error.errno in NO_SPACE else f"not writable ({error.strerror})"
            raise InputError("out", f"{self._folder}: {problem}", "free space or choose another folder") from error

    def load(self) -> Checkpoint | None:
        """The last one; None where there is none.

        Raises:
            InputError: Field ``checkpoint``: it is damaged.
        """
        if not self._file.is_file():
            return None
        try:
            text = read_metadata(self._file).get("state", "")
            state = parse_json(text, field="checkpoint", what=str(self._file), remedy="delete it to start anew")
            return Checkpoint(tensors=read_tensors(self._file), state=state)
        except IntegrityError as error:
            raise InputError("checkpoint", str(error), "delete it to start anew") from error

    def discard(self) -> None:
        """Remove it; a training that has ended needs none."""
        for file in (self._file, self._folder / _NEXT):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()
