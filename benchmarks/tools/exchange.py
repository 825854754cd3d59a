"""Requests to adapters and their replies. What another tool wrote is checked before anything is made of it."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alphasmith.objectives.media.batch import Batch
from benchmarks.tools.adapters.contract import Request
from benchmarks.tools.catalogue import Tool
from benchmarks.tools.environments import isolated, last_line

_ROOT = Path(__file__).resolve().parents[2]


class AdapterError(Exception):
    """A tool has no scales for a model; the message says why."""


class ReplyFile(BaseModel):
    """``reply.json`` as it is read; see ``adapters.contract.Reply``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal[1]
    status: Literal["done", "unsupported", "failed"]
    reason: str
    wall: float
    cpu: float
    versions: dict[str, str]
    settings: dict[str, Any]
    weights: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class ToolReply:
    """What a tool chose.

    Attributes:
        scales: Linear -> (C,) scales, positive and finite.
        before: Output of the tool's float model on the first batch.
        after: The same of the smoothed one, still in float.
        file: The rest.
    """

    scales: Mapping[str, Tensor]
    before: Tensor
    after: Tensor
    file: ReplyFile

    @property
    def change(self) -> float:
        """Relative squared difference that smoothing made to the float outputs."""
        return relative_difference(self.after, self.before)


def relative_difference(left: Tensor, right: Tensor) -> float:
    """Squared norm of the difference of two tensors, relative to that of the second."""
    difference, energy = (float(t.double().square().sum()) for t in (left - right, right))
    return difference / energy


def write_request(folder: Path, model: Path, batches: Sequence[Batch], tool: Tool, threads: int) -> None:
    """Write a request; what is there already is replaced.

    Args:
        folder: Of the request; made.
        model: Hugging Face folder.
        batches: Called with tensors by name.
        tool: Whose settings are sent.
        threads: CPU threads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{number}/{name}": value.contiguous().clone()
        for number, batch in enumerate(batches)
        for name, value in batch.kwargs.items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, folder / "batches.safetensors")
    request = Request(model=str(model.resolve()), settings=tool.settings, threads=threads)
    (folder / "request.json").write_text(json.dumps(asdict(request), indent=1), encoding="utf-8")


def ask(python: Path, tool: Tool, request: Path, reply: Path, patience: float) -> None:
    """Run an adapter in its environment.

    Args:
        python: Of the environment.
        tool: Whose adapter.
        request: Folder of the request.
        reply: Folder of the reply.
        patience: How long it may take [s].

    Raises:
        AdapterError: It was ended, broke down or wrote no reply; its last line says why.
    """
    threads = str(json.loads((request / "request.json").read_text(encoding="utf-8"))["threads"])
    counted = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    command = [str(python), "-m", tool.adapter, str(request.resolve()), str(reply.resolve())]
    try:
        done = subprocess.run(
            command,
            cwd=_ROOT,
            env={**isolated(), **counted},
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patience,
        )
    except subprocess.TimeoutExpired:
        raise AdapterError(f"no reply within {patience:.0f} s") from None
    if done.returncode:
        how = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        raise AdapterError(f"its adapter broke down ({how}): {last_line(done.stderr)}")
    if not (reply / "reply.json").is_file():
        raise AdapterError(f"its adapter wrote no reply: {last_line(done.stderr)}")


def read_reply(folder: Path, channels: Mapping[str, int], weights: Mapping[str, str] | None = None) -> ToolReply:
    """A reply, checked.

    Args:
        folder: Of the reply.
        channels: Linear of the model -> its input channels.
        weights: Linear -> digest of its weight, see ``adapters.contract.digest``; tells what a tool calls otherwise.

    Raises:
        AdapterError: The tool has no scales, or what it wrote is not what was agreed on; names the file or the linear.
    """
    try:
        file = ReplyFile.model_validate_json((folder / "reply.json").read_bytes())
    except OSError as error:
        raise AdapterError(f"reply.json cannot be read: {os.strerror(error.errno or 0)}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterError(f"reply.json: {'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}") from None
    if file.status != "done":
        raise AdapterError(f"{file.status}: {last_line(file.reason)}")
    named, outputs = _tensors(folder / "scales.safetensors"), _tensors(folder / "outputs.safetensors")
    known = _names(file.weights, channels, weights or {})
    scales = {known.get(name, name): scale for name, scale in named.items()}
    if not scales:
        raise AdapterError("scales.safetensors is empty")
    for name, scale in scales.items():
        if name not in channels:
            raise AdapterError(f"scales.safetensors: the model has no linear {name!r}")
        if tuple(scale.shape) != (channels[name],):
            raise AdapterError(f"scales.safetensors: {name} has shape {tuple(scale.shape)}, not ({channels[name]},)")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise AdapterError(f"scales.safetensors: {name} holds a scale that is not positive and finite")
    try:
        before, after = outputs["before"], outputs["after"]
    except KeyError as missing:
        raise AdapterError(f"outputs.safetensors has no {missing}") from None
    if before.shape != after.shape:
        raise AdapterError(f"outputs.safetensors: shapes {tuple(before.shape)} and {tuple(after.shape)} differ")
    return ToolReply(scales=scales, before=before, after=after, file=file)


def _names(theirs: Mapping[str, str], channels: Mapping[str, int], ours: Mapping[str, str]) -> dict[str, str]:
    """What linears that we do not know by name are called here: those with the same weight, where only one has it."""
    counts = Counter(ours.values())
    alone = {weight: name for name, weight in ours.items() if counts[weight] == 1}
    return {name: alone[weight] for name, weight in theirs.items() if name not in channels and weight in alone}


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{file.name} cannot be read: {last_line(str(error))}") from None
