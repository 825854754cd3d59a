"""Peak memory of a run: predicted before it starts, fitted to a budget, measured afterwards. All sizes are bytes.

Source: architecture.md section 4 ("peak memory is known before the run, checked against the budget, and held").
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alphasmith.objectives.batch import Batch, call
from alphasmith.objectives.capture import PartLayout, evaluating, part_layouts, unwatchable
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.statistics import CHUNK_BYTES, CHUNK_ELEMENTS, PERCENTILE_BINS

#: Fewest rows per part that ``fit_rows`` goes down to: below, a reservoir says little about a layer.
MINIMUM_ROWS = 64

_FLOAT = 4
#: Rows the exact judge works on at a time, and rows the noise model looks at.
_JUDGE_ROWS = 1024
_NOISE_ROWS = 512
#: Thread pools, packing buffers and lazily loaded code of the numeric libraries; 4 to 12 MiB were measured.
_LIBRARIES = 16 * 2**20
#: One part in this many is lost to fragmentation and rounding; up to 7 % were measured.
_LOSS_DIVISOR = 10
#: float32 and float64 accumulators (low, high, squares) and the records made of them (abs-max, RMS, percentile), per channel.
_STATISTICS_PER_CHANNEL = 16 + 12
#: Priority, tag and sample number of a kept row.
_ROW_OVERHEAD = 24


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Predicted memory of a run beyond the interpreter and its libraries [bytes].

    Attributes:
        rows: Rows kept per part of a site and split.
        parameters: Parameters and buffers, all copies of the model together.
        reservoirs: Sampled rows of all splits.
        statistics: Running statistics per channel of all splits.
        activations: Live activations of one forward at their peak, in float64 where the proof runs it, or with what
            calibration copies of them.
        evaluator: Buffers that score the largest site.
        outputs: Model outputs kept for comparison.
        overhead: What libraries keep for themselves and allocators lose; not covered by the parts.
        total: Peak. Activations and evaluator are never live together, so the larger one counts.
    """

    rows: int
    parameters: int
    reservoirs: int
    statistics: int
    activations: int
    evaluator: int
    outputs: int = 0

    @property
    def total(self) -> int:
        """Predicted peak [bytes]."""
        return self._parts + self.overhead

    @property
    def overhead(self) -> int:
        """Predicted overhead [bytes]."""
        return _LIBRARIES + self._parts // _LOSS_DIVISOR

    @property
    def _parts(self) -> int:
        return (
            self.parameters + self.reservoirs + self.statistics + self.outputs + max(self.activations, self.evaluator)
        )

    def __str__(self) -> str:
        parts = ("parameters", "reservoirs", "statistics", "activations", "evaluator", "outputs", "overhead")
        return f"{readable(self.total)} (" + ", ".join(f"{p} {readable(getattr(self, p))}" for p in parts) + ")"


def predict_peak(
    model: nn.Module,
    sites: Sequence[Site],
    *,
    rows: int,
    batch: Batch,
    batch_size: int | None = None,
    splits: int = 2,
    model_copies: int = 2,
    evaluators: int = 1,
    percentiles: bool = False,
    outputs: int = 0,
) -> MemoryPlan:
    """Predict the peak memory of calibrating and searching.

    A forward of ``batch`` and one of the batch doubled measure the activations: what grows between them is extrapolated to
    ``batch_size``, what does not counts once.

    Args:
        model: The float model.
        sites: Its sites.
        rows: Rows kept per part of a site.
        batch: An example, as small as the model accepts.
        batch_size: Samples per batch of the run; None: that of ``batch``.
        splits: Calibrations kept at a time: calibration and held-out.
        model_copies: Models alive at a time: the pristine one and the candidate.
        evaluators: Sites scored at a time.
        percentiles: Whether the percentile histogram is kept.
        outputs: Model outputs kept for comparison [bytes].

    Raises:
        InputError: A number is below 1.
    """
    _validate(rows=rows, splits=splits, model_copies=model_copies, evaluators=evaluators, batch_size=batch_size or 1)
    forward, largest = _forward_bytes(model, batch, batch_size or batch.size)
    # Calibration copies one tensor at a time without its padding, and converts it chunk by chunk.
    copies = largest + min(CHUNK_ELEMENTS, largest) * CHUNK_BYTES
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    layouts = [(site, part_layouts(model, site)) for site in sites if not unwatchable(site)]
    channels = sum(site.channels for site, _ in layouts)
    plan = MemoryPlan(
        rows=0,
        parameters=model_copies * sum(t.nbytes for t in tensors),
        reservoirs=0,
        # A histogram lives only as long as its calibration, so there is one at a time.
        statistics=channels * (splits * _STATISTICS_PER_CHANNEL + (PERCENTILE_BINS * _FLOAT if percentiles else 0)),
        activations=max(forward + copies, 2 * forward),
        evaluator=0,
        outputs=outputs,
    )
    return _with_rows(plan, rows, [parts for _, parts in layouts], splits, evaluators)


def fit_rows(
    model: nn.Module,
    sites: Sequence[Site],
    *,
    rows: int,
    budget: int,
    batch: Batch,
    batch_size: int | None = None,
    splits: int = 2,
    model_copies: int = 2,
    evaluators: int = 1,
    percentiles: bool = False,
    outputs: int = 0,
) -> MemoryPlan:
    """The plan with the most rows, at most ``rows`` and at least ``MINIMUM_ROWS`` (or ``rows``), that fits the budget.

    Args:
        budget: Memory available to the run beyond the interpreter and its libraries [bytes].
        model, sites, rows, batch, batch_size, splits, model_copies, evaluators, percentiles, outputs: As ``predict_peak`` takes them.

    Returns:
        The plan; its ``rows`` is the reservoir size to calibrate with.

    Raises:
        InputError: Not even the fewest rows fit, or a number is below 1.
    """
    plan = predict_peak(
        model,
        sites,
        rows=rows,
        batch=batch,
        batch_size=batch_size,
        splits=splits,
        model_copies=model_copies,
        evaluators=evaluators,
        percentiles=percentiles,
        outputs=outputs,
    )
    layouts = [part_layouts(model, site) for site in sites if not unwatchable(site)]
    low, high = min(MINIMUM_ROWS, rows), rows
    least = _with_rows(plan, low, layouts, splits, evaluators)
    if least.total > budget:
        raise InputError(
            "hardware.search_memory",
            f"{readable(budget)} are too little, the run needs {readable(least.total)} with {low} rows per site",
            "raise the budget, lower the batch size, or exclude sites",
        )
    # The total grows with the rows, so the largest one that fits is found by bisection.
    while low < high:
        middle = (low + high + 1) // 2
        if _with_rows(plan, middle, layouts, splits, evaluators).total <= budget:
            low = middle
        else:
            high = middle - 1
    return _with_rows(plan, low, layouts, splits, evaluators)


def activation_bytes(model: nn.Module, batch: Batch) -> int:
    """Peak bytes of live tensors during one forward, inputs included, parameters and buffers not.

    Args:
        model: Run once in eval mode without gradients.
        batch: Its arguments, on the model's device.
    """
    return _measure(model, batch).peak


def measured_peak(baseline: int = 0, device: torch.device | str = "cpu") -> int:
    """High-water mark of memory beyond a baseline [bytes].

    Args:
        baseline: What was in use before, e.g. ``resident_bytes()`` before the run; the mark covers the whole life of the process.
        device: ``cpu``: resident memory of this process. A CUDA device: bytes its allocator handed out.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return max(0, torch.cuda.max_memory_allocated(device) - baseline)
    return max(0, _high_water() - baseline)


def resident_bytes() -> int:
    """Resident memory of this process now [bytes]."""
    return int(psutil.Process().memory_info().rss)


def readable(size: int) -> str:
    """A size in the largest unit that leaves at least 1, e.g. ``1.5 GiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _high_water() -> int:
    if sys.platform == "linux":
        # ru_maxrss would survive an exec and so report the parent of a freshly started process.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # absent on Windows

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


class _StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]  # torch annotates neither of the two
    """Bytes of the storages that operations make while it is active, until they are freed.

    Args:
        known: Tensors whose storages count 0 bytes.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.peak = 0
        self.largest = 0
        self._now = 0
        # A storage keeps its Python object as long as it lives, so the object's id stands for it.
        self._known = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}
        self._live: dict[int, int] = {}

    def add(self, values: Iterable[Any]) -> None:
        """Count the storages of tensors that are not counted yet."""
        for value in values:
            if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
                continue
            storage = value.untyped_storage()
            if id(storage) in self._known or id(storage) in self._live:
                continue
            size = storage.nbytes()
            self._live[id(storage)] = size
            weakref.finalize(storage, self._forget, id(storage)).atexit = False
            self._now += size
            self.peak = max(self.peak, self._now)
            self.largest = max(self.largest, size)

    def _forget(self, key: int) -> None:
        self._now -= self._live.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` unchanged and count what it returns."""
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result


def _forward_bytes(model: nn.Module, batch: Batch, size: int) -> tuple[int, int]:
    """Peak of live activations, and the largest of them, in a forward of ``size`` samples [bytes]."""
    one = _measure(model, batch)
    if size <= batch.size:
        return one.peak, one.largest
    two = _measure(model, _doubled(batch))
    steps = (size - batch.size) / max(batch.size, 1)

    def extrapolated(first: int, second: int) -> int:
        return math.ceil(first + max(second - first, 0) * steps)

    return extrapolated(one.peak, two.peak), extrapolated(one.largest, two.largest)


def _doubled(batch: Batch) -> Batch:
    """Every sample twice."""

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, torch.Tensor) and value.dim() > 0 else value

    return replace(
        batch,
        args=tuple(twice(v) for v in batch.args),
        kwargs={name: twice(v) for name, v in batch.kwargs.items()},
        mask=twice(batch.mask),
        labels=twice(batch.labels),
    )


def _measure(model: nn.Module, batch: Batch) -> _StorageMeter:
    meter = _StorageMeter(known=(*model.parameters(), *model.buffers()))
    meter.add(tree_leaves((batch.args, dict(batch.kwargs))))
    with evaluating(model), torch.no_grad(), meter:
        call(model, batch)
    return meter


def _validate(**numbers: int) -> None:
    for field, value in numbers.items():
        if value < 1:
            raise InputError(field, f"{value} is below 1", "give a positive number")


def _with_rows(
    plan: MemoryPlan, rows: int, layouts: Sequence[Sequence[PartLayout]], splits: int, evaluators: int
) -> MemoryPlan:
    """The plan for another reservoir size; ``plan.activations`` holds the forward and the copies made of it."""
    kept = sum(_kept_bytes(part, rows) for parts in layouts for part in parts)
    # While calibration sorts out what it saw, one reservoir is alive twice.
    largest = max((_kept_bytes(part, rows) for parts in layouts for part in parts), default=0)
    evaluator = max((sum(_evaluator_bytes(part, rows) for part in parts) for parts in layouts), default=0)
    return replace(plan, rows=rows, reservoirs=splits * kept + largest, evaluator=evaluators * evaluator)


def _kept_bytes(part: PartLayout, rows: int) -> int:
    ranges = part.operators[0].in_channels * _FLOAT if part.is_convolution else 0
    return rows * (part.columns * _FLOAT + ranges + _ROW_OVERHEAD)


def _evaluator_bytes(part: PartLayout, rows: int) -> int:
    """What scoring one part keeps: a judge of the calibration rows, one of the held-out rows, and the noise model.

    T rows, D columns, O outputs. A judge: reference (T, O), one chunk of rows and of outputs with its temporaries; both
    together: weights concatenated twice, scaled, and quantized with a temporary. The noise model: magnitudes of some
    rows and weights in float64 with their gradients.
    """
    outputs = sum(operator.out_channels for operator in part.operators)
    fan_in = part.columns // part.operators[0].groups
    chunk, sampled = min(rows, _JUDGE_ROWS), min(rows, _NOISE_ROWS)
    judges = 2 * _FLOAT * (rows * outputs + chunk * (part.columns + outputs)) + 8 * chunk * (part.columns + outputs)
    weights = 5 * _FLOAT * outputs * fan_in
    noise = 4 * 8 * (sampled * part.columns + min(outputs, _NOISE_ROWS * len(part.operators)) * fan_in)
    return judges + weights + noise
