"""What goes from block to block, as files of a folder that a killed run finds again."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

from torch import Tensor

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.storage.files.durable import NO_SPACE, sync_folder
from alphasmith.storage.files.tensors import read_tensors, write_tensors

_HIDDEN = "hidden"
#: What the name of a step ends with until it is whole.
_NEXT = ".next"


class StatesFolder:
    """Hidden states before each block, of several streams of batches, those of one block at a time; and what is known of each part.

    Step n holds the states before block n: it is there whole or not at all, and step n - 1 goes once it is.

    Args:
        folder: Made with the first file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step(self) -> int:
        """The last step that is whole; -1: there is none."""
        if not self.folder.is_dir():
            return -1
        found = [re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.iterdir()]
        return max((int(match.group(1)) for match in found if match), default=-1)

    def streams(self, step: int) -> frozenset[str]:
        """Streams of a step."""
        return frozenset(path.name for path in self._step(step).iterdir())

    def write(self, step: int, stream: str, number: int, hidden: Tensor) -> None:
        """Keep the states of one batch for a step that is not whole yet.

        Raises:
            InputError: Field ``out``: no space left, or not writable.
        """
        self._put(f"step-{step:05}{_NEXT}/{stream}/{number:05}.safetensors", {_HIDDEN: hidden})

    def read(self, step: int, stream: str, number: int) -> Tensor:
        """The states of one batch."""
        return read_tensors(self._step(step) / stream / f"{number:05}.safetensors")[_HIDDEN]

    def drop(self, step: int, stream: str) -> None:
        """Forget what was written of a stream for a step that is not whole yet."""
        shutil.rmtree(self.folder / f"step-{step:05}{_NEXT}" / stream, ignore_errors=True)

    def begin(self, step: int) -> None:
        """Forget what a killed process wrote of a step."""
        shutil.rmtree(self.folder / f"step-{step:05}{_NEXT}", ignore_errors=True)

    def complete(self, step: int) -> None:
        """A step is whole: it takes the place of the one before."""
        with self._translated():
            os.rename(self.folder / f"step-{step:05}{_NEXT}", self._step(step))
            sync_folder(self.folder)
        shutil.rmtree(self._step(step - 1), ignore_errors=True)

    def keep(self, kind: str, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors that belong to no step.

        Raises:
            InputError: Field ``out``: no space left, or not writable.
        """
        self._put(f"{kind}/{name}{_NEXT}", tensors)
        with self._translated():
            os.rename(self.folder / kind / f"{name}{_NEXT}", self.folder / kind / name)

    def kept(self, kind: str, name: str) -> dict[str, Tensor] | None:
        """What was kept; None: nothing."""
        file = self.folder / kind / name
        return read_tensors(file) if file.is_file() else None

    def discard(self) -> None:
        """Remove it all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _step(self, step: int) -> Path:
        return self.folder / f"step-{step:05}"

    def _put(self, place: str, tensors: Mapping[str, Tensor]) -> None:
        file = self.folder / place
        with self._translated():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(file, tensors)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = "no space left" if error.errno in NO_SPACE else f"not writable ({error.strerror})"
            remedy = "free space, then resume the run"
            raise InputError("out", f"{self.folder}: {problem} for the states between blocks", remedy) from error


class StreamBatches(Sequence[Batch]):
    """Batches of a part of the model, read when asked for.

    Args:
        count: How many there are.
        read: Number -> batch.
    """

    def __init__(self, count: int, read: Callable[[int], Batch]) -> None:
        self._count = count
        self._read = read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        numbers = range(self._count)[index]
        return [self._read(number) for number in numbers] if isinstance(numbers, range) else self._read(numbers)
