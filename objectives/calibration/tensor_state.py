"""Records as tensors and JSON, without pickle: every field comes back equal to the bit.

A record is a frozen dataclass or pydantic model of numbers, texts, None, tuples, mappings by text, tensors and further records. Its tensors keep
their own names; everything else stands in the tensor ``structure``, UTF-8 JSON as uint8, so that one safetensors file holds it
all. Python writes the shortest decimal that reads back as the same float, so JSON loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from alphasmith.objectives.errors import InputError

Record = TypeVar("Record")

#: Name of the tensor that holds the JSON, and the key that stands in it where a tensor was.
STRUCTURE = "structure"
_TENSOR = "$tensor"

_STRICT = ConfigDict(arbitrary_types_allowed=True, extra="forbid")


class StateFormat(Generic[Record]):
    """How records of one type are kept.

    Args:
        kind: The dataclass.
        version: Of the format; raised whenever a field changes its meaning, comes or goes.
        what: What users call such a record.
        remedy: What they do where one cannot be read.
    """

    def __init__(self, kind: type[Record], *, version: int, what: str, remedy: str) -> None:
        self._kind = kind
        self._version = version
        self._what = what
        self._remedy = remedy

    def state(self, record: Record) -> dict[str, Tensor]:
        """The record as contiguous CPU tensors that share no memory.

        Raises:
            TypeError: A field holds something that is none of the kinds above.
        """
        tensors: dict[str, Tensor] = {}
        structure = {"version": self._version, "record": _taken_apart(record, "", tensors)}
        # The order of a mapping is part of it, so keys are not sorted.
        text = json.dumps(structure, separators=(",", ":"))
        own = independent(tensors)
        own[STRUCTURE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return own

    def record(self, state: Mapping[str, Tensor]) -> Record:
        """The record whose ``state`` this is.

        Raises:
            InputError: A tensor or a field is missing, unknown or of another type, or another version wrote it.
        """
        try:
            structure = json.loads(bytes(state[STRUCTURE].cpu().numpy()))
            version = structure["version"]
            if version != self._version:
                raise InputError(self._what, f"has version {version}, not {self._version}", self._remedy)
            return self._adapter.validate_python([_put_together(structure["record"], state)])[0]
        except InputError:
            raise
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise InputError(self._what, f"is incomplete ({reason})", self._remedy) from error

    @cached_property
    def _adapter(self) -> TypeAdapter[list[Record]]:
        # pydantic takes settings for a list of foreign dataclasses, but not for one of them.
        return TypeAdapter(list[self._kind], config=_STRICT)  # type: ignore[name-defined]  # the type is a value here


def independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values as contiguous CPU tensors, each in separate memory and no more than it needs."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, value in tensors.items():
        kept = value.detach().to("cpu").contiguous()
        storage = kept.untyped_storage()
        # Part of a larger storage would travel whole.
        if storage.nbytes() != kept.nbytes or storage.data_ptr() in seen:
            kept = kept.clone()
        seen.add(kept.untyped_storage().data_ptr())
        own[name] = kept
    return own


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with ``prefix`` before every name, so that several can lie in one file."""
    return {prefix + name: value for name, value in state.items()}


def unprefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`prefixed` put in under ``prefix``."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _taken_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a value, with its tensors put into ``tensors`` under the path that leads to them."""
    if isinstance(value, Tensor):
        while path in tensors:  # names of sites and parameters hold dots themselves
            path += "+"
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, BaseModel):
        value = dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _taken_apart(item, f"{path}.{name}" if path else name, tensors) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_taken_apart(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _put_together(structure: Any, state: Mapping[str, Tensor]) -> Any:
    """The JSON with its tensors back in their places; tuples are still lists."""
    if isinstance(structure, dict):
        if structure.keys() == {_TENSOR}:
            return state[structure[_TENSOR]]
        return {name: _put_together(item, state) for name, item in structure.items()}
    if isinstance(structure, list):
        return [_put_together(item, state) for item in structure]
    return structure
