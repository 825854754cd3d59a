"""The tensors of a Hugging Face folder, read one at a time; nothing stays mapped into memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from alphasmith.objectives.errors import InputError

#: Bytes of one number of each type that a checkpoint of floats holds.
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What the header of a file says of a tensor.

    Attributes:
        file: Where it is.
        shape: Its shape.
        type: Name of its type, as safetensors has it, e.g. ``BF16``.
    """

    file: Path
    shape: tuple[int, ...]
    type: str

    @property
    def bytes(self) -> int:
        """What it takes in the file [bytes]."""
        return math.prod(self.shape) * _SIZES.get(self.type, 4)


class StoredWeights:
    """Tensors of safetensors files by name.

    Attributes:
        tensors: Name -> what the header says.

    Args:
        files: The files of one checkpoint.

    Raises:
        InputError: One is damaged.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        found: dict[str, StoredTensor] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (not a mapping)
                        part = opened.get_slice(name)
                        found[name] = StoredTensor(file=file, shape=tuple(part.get_shape()), type=part.get_dtype())
            except (OSError, SafetensorError) as error:
                raise InputError("model.path", f"{file} is damaged ({error})", "copy or download it again") from error
        self.tensors: Mapping[str, StoredTensor] = found

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str) -> torch.Tensor:
        """One tensor, floating ones as float32, in memory of its own.

        Args:
            name: One of ``tensors``.

        Raises:
            InputError: Its file has changed or is gone.
        """
        try:
            # Opened anew: what was read of a mapped file counts as this process's memory as long as it is mapped.
            with safe_open(self.tensors[name].file, framework="pt") as file:
                value: torch.Tensor = file.get_tensor(name)
                return value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        except (OSError, SafetensorError) as error:
            told = f"{self.tensors[name].file} cannot be read any more ({error})"
            raise InputError("model.path", told, "restore it, then resume the run") from error
