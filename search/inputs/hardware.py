"""The budget of the machine that will run the model, and how scarce it is. Source: claim A-3, formula fA7."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.sites.types import Site
from alphasmith.search.config import HardwareConfig

#: Size of a weight in every format [bytes].
BYTES_PER_WEIGHT = {"int8": 1.0, "int7": 1.0, "int4": 0.5, "fp8": 1.0, "none": 4.0}


@dataclass(frozen=True, kw_only=True)
class HardwareBudget:
    """What a machine offers, or what a model requires of one.

    Attributes:
        memory: Memory [bytes], or None when unknown.
        gpu_threads: Threads that run at once, or None.
        bandwidth: Memory bandwidth [bytes/s], or None.
    """

    memory: int | None = None
    gpu_threads: int | None = None
    bandwidth: int | None = None


@dataclass(frozen=True, kw_only=True)
class Scarcity:
    """rho with everything that led to it, for ``alphasmith hardware`` and the manifest.

    Attributes:
        rho: 1 - min over given resources of min(1, available / required); 0 when no resource is given.
        available: The target's budget; None entries do not count.
        required: What the quantized model needs.
        explanation: One sentence for the report.
    """

    rho: float
    available: HardwareBudget
    required: HardwareBudget
    explanation: str


def detect(device: str | None = None) -> HardwareBudget:
    """The budget of this machine: memory, threads and copy rate of the given GPU (default: the first), else of the CPU.

    A CPU counts no threads: its few cores are no measure beside the thousands of GPU threads that the formula means.
    """
    if torch.cuda.is_available() and device != "cpu":
        properties = torch.cuda.get_device_properties(device or "cuda")
        threads = properties.multi_processor_count * properties.max_threads_per_multi_processor
        return HardwareBudget(
            memory=int(properties.total_memory), gpu_threads=int(threads), bandwidth=_copy_rate(device or "cuda")
        )
    return HardwareBudget(memory=int(psutil.virtual_memory().total), bandwidth=_copy_rate("cpu"))


def target_budget(config: HardwareConfig) -> HardwareBudget:
    """The target machine: given fields, plus detected ones where ``detect`` is set."""
    found = detect() if config.detect else HardwareBudget()
    return HardwareBudget(
        memory=config.memory or found.memory,
        gpu_threads=config.gpu_threads or found.gpu_threads,
        bandwidth=config.bandwidth or found.bandwidth,
    )


def required_budget(
    sites: Sequence[Site], *, schemes: SiteSchemes, parameters: int, activation_bytes: int, forwards_per_second: float
) -> HardwareBudget:
    """What the quantized model needs of its target.

    Memory: quantized operator weights, float32 rest and one forward's activations. Threads: one per output channel of
    the widest operator. Bandwidth: every weight byte once per forward.

    Args:
        sites: All sites of the model.
        schemes: The quantization scheme of every site.
        parameters: Number of parameters of the model.
        activation_bytes: Activations alive in one forward [bytes].
        forwards_per_second: Rate at which the target runs the model [1/s].
    """
    operators = [(o, schemes.of(s.name)) for s in sites for o in s.operators if not o.raw or o.stacked]
    kernels = [
        (o.in_channels // o.groups * o.out_channels * _product(o.kernel) * max(o.stacked, 1), scheme)
        for o, scheme in operators
    ]
    rest = max(parameters - sum(count for count, _ in kernels), 0)
    weight_bytes = int(sum(count * BYTES_PER_WEIGHT[scheme.weights] for count, scheme in kernels)) + 4 * rest
    return HardwareBudget(
        memory=weight_bytes + activation_bytes,
        gpu_threads=max((o.out_channels for o, _ in operators), default=1),
        bandwidth=int(weight_bytes * forwards_per_second),
    )


def scarcity(available: HardwareBudget, required: HardwareBudget) -> Scarcity:
    """rho of formula fA7. No resource given: exactly 0."""
    ratios = {
        name: min(1.0, have / need)
        for name in ("memory", "gpu_threads", "bandwidth")
        if (have := getattr(available, name)) is not None and (need := getattr(required, name))
    }
    if not ratios:
        return Scarcity(
            rho=0.0, available=available, required=required, explanation="no hardware budget given, rho = 0"
        )
    tightest = min(ratios, key=lambda name: ratios[name])
    rho = 1.0 - ratios[tightest]
    enough = (
        "every resource suffices" if rho == 0 else f"{tightest} is tightest at {ratios[tightest]:.3f} of what is needed"
    )
    return Scarcity(rho=rho, available=available, required=required, explanation=f"{enough}, rho = {rho:.3f}")


def _product(values: Sequence[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result


def _copy_rate(device: str) -> int:
    """Bytes read and written per second by a device-to-device copy of 64 MiB, best of five."""
    source = torch.zeros(2**24, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        if source.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return int(2 * source.numel() * source.element_size() / best)
