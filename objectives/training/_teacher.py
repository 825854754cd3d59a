"""The float model's outputs for every sample: computed once, kept in memory or, where they are large, in a file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import call, main_output, unfused_attention
from alphasmith.objectives.text import size_text
from alphasmith.objectives.training.losses import Task, answers
from alphasmith.objectives.training.ports import Samples

#: Outputs above this stand in a file [bytes].
MOST_IN_MEMORY = 256 << 20


class TeacherOutputs:
    """Rows of a float model's outputs, sample by sample.

    Args:
        model: The float model, in evaluation mode; called once for every sample.
        samples: What it is called with.
        task: What its output is.
        size: Samples of one call.
        device: Where it is.
        folder: Where a file may lie that is gone when this object is; None: that of the system for such files.
        limit: Bytes kept in memory at most.
        pause: Called between two calls.

    Raises:
        InputError: The outputs have no room.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        *,
        task: Task,
        size: int,
        device: torch.device,
        folder: Path | None = None,
        limit: int = MOST_IN_MEMORY,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        self._kept: list[Tensor] = []
        self._file: np.memmap[tuple[int], np.dtype[np.float32]] | None = None
        self._places: list[tuple[int, tuple[int, ...]]] = []
        for start in range(0, len(samples), size):
            pause()
            numbers = range(start, min(start + size, len(samples)))
            batch = samples.batch(numbers).to(device)
            with torch.no_grad(), unfused_attention():
                found = answers(main_output(call(model, batch)), batch, task)
            counts = torch.bincount(found.owners, minlength=found.samples).tolist()
            self._kept += [rows.cpu() for rows in found.scores.float().split(counts)]
            if start == 0:
                self._plan(len(samples), folder, limit)
            if self._file is not None:
                self._write()

    def rows(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """(N, K) rows of some samples, one sample after the other.

        Args:
            numbers: The samples.
            device: Where they are wanted.
        """
        if self._file is None:
            return torch.cat([self._kept[number] for number in numbers]).to(device)
        parts = []
        for number in numbers:
            start, shape = self._places[number]
            parts.append(torch.from_numpy(self._file[start : start + int(np.prod(shape))].copy()).reshape(shape))
        return torch.cat(parts).to(device)

    def _plan(self, samples: int, folder: Path | None, limit: int) -> None:
        """Decide, from the first batch, whether all outputs go into memory."""
        seen = sum(rows.numel() for rows in self._kept) / len(self._kept)
        needed = int(4 * seen * samples)
        if needed <= limit:
            return
        where = Path(tempfile.gettempdir()) if folder is None else folder
        # Later samples may be longer: the file grows as they come.
        if shutil.disk_usage(where).free < 1.5 * needed:
            problem = f"the float model's outputs take {size_text(needed)}, {where} has no room for them"
            raise InputError("training.distill", problem, "train on a smaller fraction, or without distillation")
        self._handle = tempfile.TemporaryFile(dir=where)  # noqa: SIM115  # open as long as this object lives
        self._length = 0
        self._grow(int(1.2 * needed / 4))

    def _grow(self, numbers: int) -> None:
        self._handle.truncate(4 * numbers)
        self._file = np.memmap(self._handle, dtype=np.float32, mode="r+", shape=(numbers,))

    def _write(self) -> None:
        for rows in self._kept:
            if self._file is not None and self._length + rows.numel() > self._file.size:
                self._grow(2 * (self._length + rows.numel()))
            if self._file is not None:
                self._file[self._length : self._length + rows.numel()] = rows.reshape(-1).numpy()
            self._places.append((self._length, tuple(rows.shape)))
            self._length += rows.numel()
        self._kept.clear()
