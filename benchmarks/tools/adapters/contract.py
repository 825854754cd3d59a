"""What an adapter reads and what it writes. It runs in the environment of its tool: torch, transformers and safetensors, nothing of ours.

An adapter is started as ``python -m benchmarks.tools.adapters.NAME REQUEST REPLY``.

The request is a folder: ``request.json`` (:class:`Request`) and ``batches.safetensors`` with the arguments of every forward call,
named ``NUMBER/ARGUMENT``. The reply is a folder as well: ``reply.json`` (:class:`Reply`), ``scales.safetensors`` with one
vector (C,) for every linear that the tool smooths, by the linear's name in the model (activations are divided by it, the columns of
the weight multiplied), and ``outputs.safetensors`` with the float outputs of the first batch, ``before`` and ``after`` smoothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: Of both files; a harness refuses replies of another one.
FORMAT = 1

Arguments = dict[str, Tensor]


class UnsupportedError(Exception):
    """The tool cannot smooth this model; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to smooth.

    Attributes:
        model: Hugging Face folder.
        settings: Of the adapter, by name; what is missing stays at the tool's default.
        threads: CPU threads.
        format: See ``FORMAT``.
    """

    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How it went.

    Attributes:
        status: ``done``, ``unsupported`` (the tool has no way to smooth such a model) or ``failed``.
        reason: Why it is not done; empty when it is.
        wall: Wall time of the tool's own work, from a model and batches in memory to scales [s].
        cpu: CPU time likewise, all threads [s].
        versions: Of the packages that took part.
        settings: With which the tool ran, its defaults included.
        weights: Linear -> digest of its weight as it was loaded: releases of transformers give linears different names.
        format: See ``FORMAT``.
    """

    status: str
    reason: str = ""
    wall: float = 0.0
    cpu: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class Smoothed:
    """What a tool made of a model.

    Attributes:
        scales: Linear -> (C,) scales.
        model: The smoothed model, still in float.
        settings: See :class:`Reply`.
    """

    scales: Mapping[str, Tensor]
    model: nn.Module
    settings: Mapping[str, Any]


Smooth = Callable[[nn.Module, Sequence[Arguments], Mapping[str, Any]], Smoothed]


def serve(smooth: Smooth, *packages: str, traced: bool = False) -> None:
    """Do what the command line asks for; a failure of the tool is a reply as well.

    Args:
        smooth: Model, batches, settings -> what the tool makes of them.
        packages: Whose versions are told.
        traced: See :func:`load_model`.
    """
    source, target = map(Path, sys.argv[1:3])
    target.mkdir(parents=True, exist_ok=True)
    request = Request(**json.loads((source / "request.json").read_text(encoding="utf-8")))
    torch.set_num_threads(request.threads)
    versions = _versions(packages)
    try:
        model = load_model(request.model, traced=traced)
        weights = {name: digest(linear.weight) for name, linear in linears(model).items()}
        batches = read_batches(source / "batches.safetensors")
        before = first_output(model, batches[0])
        wall, cpu = time.perf_counter(), time.process_time()
        made = smooth(model, batches, request.settings)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        after = first_output(made.model, batches[0])
        save_file(
            {n: s.detach().float().contiguous().clone() for n, s in made.scales.items()}, target / "scales.safetensors"
        )
        save_file({"before": before, "after": after}, target / "outputs.safetensors")
        reply = Reply(status="done", wall=wall, cpu=cpu, versions=versions, settings=made.settings, weights=weights)
    except UnsupportedError as reason:
        reply = Reply(status="unsupported", reason=str(reason), versions=versions)
    except Exception as error:  # noqa: BLE001  whatever a tool raises is its result
        reply = Reply(status="failed", reason=f"{type(error).__name__}: {error}"[:500], versions=versions)
    part = target / "reply.json.part"
    part.write_text(json.dumps(asdict(reply), indent=1, default=str), encoding="utf-8")
    part.replace(target / "reply.json")


def load_model(folder: str, *, traced: bool = False) -> nn.Module:
    """The float model of a Hugging Face folder, of the class that its configuration names.

    Args:
        folder: With ``config.json`` and the weights.
        traced: Make it a model that ``torch.jit.trace`` takes: tuples for answers, attention written out.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    written = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    theta = (written.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and hasattr(config, "rope_theta"):
        config.rope_theta = theta  # releases before 5 do not know the newer entry and would take their default
    kind = getattr(transformers, written["architectures"][0])
    if traced:
        config.return_dict, config.torchscript, config.use_cache = False, True, False
    chosen = {"attn_implementation": "eager"} if traced else {}
    model: nn.Module = kind.from_pretrained(folder, config=config, **chosen).float().eval()
    return model


def read_batches(file: Path) -> list[Arguments]:
    """Arguments of every forward call, in their order."""
    batches: dict[int, Arguments] = {}
    for name, tensor in load_file(file).items():
        number, _, argument = name.partition("/")
        batches.setdefault(int(number), {})[argument] = tensor
    return [batches[number] for number in sorted(batches)]


def first_output(model: nn.Module, batch: Arguments) -> Tensor:
    """What the model answers first, as a copy."""
    with torch.no_grad():
        answer = model(**batch)
    answer = answer.to_tuple() if hasattr(answer, "to_tuple") else answer
    first: Tensor = answer if isinstance(answer, Tensor) else answer[0]
    return first.detach().float().contiguous().clone()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear by its name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def digest(weight: Tensor) -> str:
    """sha256 of a weight's numbers in float32."""
    return hashlib.sha256(weight.detach().float().contiguous().numpy().tobytes()).hexdigest()


def column_factors(before: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """By what a tool multiplied every column of the linears' weights, (C,) each; linears that stayed as they were are left out.

    Args:
        before: Linear -> (O, C) copy of its weight.
        model: After smoothing.

    Raises:
        ValueError: A weight changed by more than one factor for each column.
    """
    factors = {}
    for name, linear in linears(model).items():
        old, new = before[name].double(), linear.weight.detach().double()
        energy = old.square().sum(0)
        factor = torch.where(energy > 0, (old * new).sum(0) / energy.clamp_min(1e-300), 1.0)
        if float((new - old * factor).norm()) > 1e-5 * float(new.norm()):
            raise ValueError(f"{name} changed by more than one factor for each input channel")
        if not torch.allclose(factor, torch.ones_like(factor), rtol=1e-6):
            factors[name] = factor.float()
    return factors


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in (*packages, "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
