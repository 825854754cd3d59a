"""Peak memory of a run: predicted before it starts, fitted to a budget, measured afterwards. All sizes are bytes."""

from __future__ import annotations

import ctypes
import math
import platform
import sys
import weakref
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alphasmith.objectives.calibration.capture import PartLayout, evaluating, part_layouts, unwatchable
from alphasmith.objectives.calibration.statistics import CHUNK_BYTES, CHUNK_ELEMENTS, PERCENTILE_BINS
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch, call
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.sites.folding import EDITED_ELEMENTS
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.text import size_text

#: Fewest rows per part that ``fit_rows`` goes down to: below, a reservoir says little about a layer.
MINIMUM_ROWS = 64

_FLOAT = 4
#: glibc's number for the setting (malloc.h), and the size [bytes].
_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK = 8 * 2**20
#: Rows the exact judge works on at a time, and rows the noise model looks at.
_JUDGE_ROWS = 1024
_NOISE_ROWS = 512
#: Candidates of one call of the exact judge, whose quantized weights exist together, and the most these may take [bytes].
_JUDGE_CANDIDATES = 24
_JUDGE_WEIGHTS = 256 * 2**20
#: Bytes per element of one weight while it is quantized: smoothed, in order, divided by its steps, as codes; and after each of two edits.
_REBUILT = 13
_SMOOTHED = 8
#: What a quantized operator makes beside what the float one does, in tensors of the size of its input or output: the input divided and as
#: codes, the outputs as integers and times their steps. 0.3 to 2.8 were measured, not all of it where the float forward has its peak.
_QUANTIZED_FORWARD = 2
#: Bytes of each element that an edit turns into float64 at a time: as float64, and edited.
_EDITED = 16
#: Bytes that are remembered at most, or as many as the model has if these are more; and the part of the outputs that weights
#: may take beside them.
_REMEMBERED_MOST = 2**28
_KEPT_WEIGHTS = 3
#: Thread pools, packing buffers and lazily loaded code of the numeric libraries; 4 to 27 MiB were measured.
_LIBRARIES = 32 * 2**20
#: One part in this many is lost to fragmentation and rounding; up to 12 % were measured.
_LOSS_DIVISOR = 8
#: float32 and float64 accumulators (low, high, squares) and the records made of them (abs-max, RMS, percentile), per channel.
_STATISTICS_PER_CHANNEL = 16 + 12
#: Priority, tag and sample number of a kept row.
_ROW_OVERHEAD = 24


@dataclass(frozen=True, kw_only=True)
class MemoryDemand:
    """What a run keeps and does, as far as its memory depends on it.

    Attributes:
        batch: An example, as small as the model accepts.
        batch_size: Samples per batch of the run; None: that of ``batch``.
        proof_size: Samples per batch of the proof; None: as ``batch_size``.
        schemes: Number formats of the quantized model, site by site.
        splits: Calibrations kept at a time: calibration and held-out.
        model_copies: Models alive at a time; candidates and folding work in place on one.
        evaluators: Sites scored at a time.
        percentiles: Whether the percentile histogram is kept.
        outputs: Model outputs kept for comparison [bytes].
        float64_limit: Largest float64 copy that may be made for the proof [bytes].
        stacked: Weights that are quantized beside those of the sites that are watched: several matrices in one tensor.
        remembered: Samples of which the judge of candidate models keeps what modules make of them, where memory is left.

    Raises:
        InputError: A number is below 1.
    """

    batch: Batch
    batch_size: int | None = None
    proof_size: int | None = None
    schemes: SiteSchemes = field(default_factory=lambda: SiteSchemes(Scheme()))
    splits: int = 2
    model_copies: int = 1
    evaluators: int = 1
    percentiles: bool = False
    outputs: int = 0
    float64_limit: int = 0
    stacked: int = 0
    remembered: int = 0

    def __post_init__(self) -> None:
        _validate(splits=self.splits, model_copies=self.model_copies, evaluators=self.evaluators)
        _validate(batch_size=1 if self.batch_size is None else self.batch_size)
        _validate(proof_size=1 if self.proof_size is None else self.proof_size)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Predicted memory of a run beyond the interpreter and its libraries [bytes].

    Attributes:
        rows: Rows kept per part of a site and split.
        parameters: Parameters and buffers, all copies of the model together.
        reservoirs: Sampled rows of all splits.
        statistics: Running statistics per channel of all splits.
        activations: Live activations of one forward at their peak, with what calibration copies of them.
        evaluator: Buffers that score the largest site.
        candidate: Quantized weights of one candidate of the model, with its forward or with one parameter being rebuilt, and
            what is remembered of another.
        proof: The same quantized weights, kept to be written, with the folding of one site or the float64 copy of the proof.
        outputs: Model outputs kept for comparison.
        dense: Dequantized weights that candidates keep between calls, part of ``candidate``; 0 where they are not kept.
        float64: Size of the float64 copy that the proof makes, part of ``proof``; 0 where it uses the model's own type.
        remembered: Outputs of modules and quantized weights of the incumbent among candidate models, part of ``candidate``; a
            limit, as nothing else is given up for it.
        overhead: What libraries keep for themselves and allocators lose; not covered by the parts.
        total: Peak. Activations, evaluator, candidate and proof are never live together, so the largest one counts.
    """

    rows: int
    parameters: int
    reservoirs: int
    statistics: int
    activations: int
    evaluator: int
    candidate: int = 0
    proof: int = 0
    outputs: int = 0
    dense: int = 0
    float64: int = 0
    remembered: int = 0

    @property
    def total(self) -> int:
        """Predicted peak [bytes]."""
        return self._parts + self.overhead

    @property
    def overhead(self) -> int:
        """Predicted overhead [bytes]."""
        return _LIBRARIES + self._parts // _LOSS_DIVISOR

    @property
    def working_set(self) -> int:
        """What the largest site and the largest step need beside the model and the rows of other sites [bytes]."""
        return max(self.activations, self.evaluator, self.candidate, self.proof)

    def beside_model(self, budget: int | None) -> int:
        """What a step may take beside the model and the rows: the working set, and what a larger budget leaves [bytes].

        Args:
            budget: Memory the run may take in all [bytes]; None: no more than predicted.
        """
        return max((budget or self.total) - self.total, 0) + self.working_set

    @property
    def _parts(self) -> int:
        return self.parameters + self.reservoirs + self.statistics + self.outputs + self.working_set

    def __str__(self) -> str:
        parts = ("parameters", "reservoirs", "statistics", "outputs", "activations", "evaluator", "candidate", "proof")
        listed = ", ".join(f"{part} {size_text(getattr(self, part))}" for part in (*parts, "overhead"))
        return f"{size_text(self.total)} ({listed})"


def fit_rows(model: nn.Module, sites: Sequence[Site], *, rows: int, budget: int, demand: MemoryDemand) -> MemoryPlan:
    """The plan with the most rows, at most ``rows`` and at least ``MINIMUM_ROWS`` (or ``rows``), that fits the budget.

    Dequantized weights are kept, and the proof is run in float64, where that costs no row. A forward of the example and one
    of it doubled measure the activations: what grows between them is extrapolated to the batch size, what does not counts once.

    Args:
        model: The float model.
        sites: Its sites.
        rows: Rows kept per part of a site, if they fit.
        budget: Memory available to the run, its model included, beyond the interpreter and its libraries [bytes].
        demand: What else the run keeps.

    Returns:
        The plan; its ``rows`` is the reservoir size to calibrate with.

    Raises:
        InputError: Not even the fewest rows fit, or ``rows`` is below 1.
    """
    predictor = _Predictor(model, sites, demand)
    plan = _fitted(predictor, rows, budget)
    most = predictor.worth_remembering
    # Half of what is left: other programs want some, too.
    left = (budget - plan.total) // 2 - (budget - plan.total) // 2 // _LOSS_DIVISOR
    return replace(plan, remembered=min(most, left), candidate=plan.candidate + min(most, left))


def _fitted(predictor: _Predictor, rows: int, budget: int) -> MemoryPlan:
    """The plan with the most rows, nothing remembered."""
    for dense, float64 in ((True, True), (False, True), (True, False)):
        plan = predictor.plan(rows, dense=dense, float64=float64)
        if plan.total <= budget:
            return plan

    def lean(count: int) -> MemoryPlan:
        return predictor.plan(count, dense=False, float64=False)

    low, high = min(MINIMUM_ROWS, rows), rows
    least = lean(low)
    if least.total > budget:
        raise InputError(
            "hardware.search_memory",
            f"{size_text(budget)} are too little, the run needs {size_text(least.total)} with {low} rows per site",
            "raise the budget, lower the batch size, or exclude sites",
        )
    # The total grows with the rows, so the largest one that fits is found by bisection.
    while low < high:
        middle = (low + high + 1) // 2
        if lean(middle).total <= budget:
            low = middle
        else:
            high = middle - 1
    return lean(low)


class _Predictor:
    """What does not depend on the rows, measured once."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], demand: MemoryDemand) -> None:
        self._demand = demand
        size = demand.batch.size if demand.batch_size is None else demand.batch_size
        self._forward, self._largest, passed = _forward_bytes(model, demand.batch, size)
        proven = size if demand.proof_size is None else demand.proof_size
        self._proof_forward = _forward_bytes(model, demand.batch, proven)[0] if proven != size else self._forward
        kept = passed * demand.remembered // size
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
        self._parameters = demand.model_copies * sum(t.nbytes for t in tensors)
        most = max(_REMEMBERED_MOST, sum(t.nbytes for t in tensors))
        self.worth_remembering = min(kept + kept // _KEPT_WEIGHTS, most)
        self._copy64 = sum(8 * t.numel() if t.is_floating_point() else t.nbytes for t in tensors)
        watched = [(site, part_layouts(model, site)) for site in sites if not unwatchable(site)]
        self._channels = sum(site.channels for site, _ in watched)
        self._layouts = [(parts, demand.schemes.of(site.name)) for site, parts in watched]
        weights = dict(model.named_parameters(remove_duplicate=False))
        self._weights = [
            (operator, weights[operator.weight].numel(), demand.schemes.of(site.name))
            for site, _ in watched
            for operator in site.operators
            if not operator.raw and operator.weight in weights
        ]
        # An embedding is looked up, so it is neither quantized nor scaled.
        self._largest_weight = max((count for _, count, _ in self._weights), default=0)
        edited = [[weights[n] for n in {e.parameter for e in site.edits} if n in weights] for site in sites]
        self._largest_fold = max((sum(t.nbytes for t in one) for one in edited), default=0)
        self._largest_edit = max((t.numel() for one in edited for t in one), default=0)

    def plan(self, rows: int, *, dense: bool, float64: bool) -> MemoryPlan:
        """The plan for one reservoir size."""
        _validate(rows=rows)
        demand = self._demand
        kept = [_kept_bytes(part, rows) for parts, _ in self._layouts for part in parts]
        payload = sum(_payload_bytes(count, scheme) for _, count, scheme in self._weights)
        payload += _payload_bytes(demand.stacked, demand.schemes.default)
        kept_dense = self._dense_bytes() if dense else 0
        copy64 = self._copy64 if float64 and self._copy64 <= demand.float64_limit else 0
        # Calibration copies one tensor at a time without its padding, and converts it chunk by chunk.
        copies = self._largest + min(CHUNK_ELEMENTS, self._largest) * CHUNK_BYTES
        quantized_forward = self._forward + _QUANTIZED_FORWARD * self._largest
        edit = _EDITED * min(self._largest_edit, EDITED_ELEMENTS)
        return MemoryPlan(
            rows=rows,
            parameters=self._parameters,
            # While calibration sorts out what it saw, one reservoir is alive twice.
            reservoirs=demand.splits * sum(kept) + max(kept, default=0),
            # A histogram lives only as long as its calibration, so there is one at a time.
            statistics=self._channels
            * (demand.splits * _STATISTICS_PER_CHANNEL + (PERCENTILE_BINS * _FLOAT if demand.percentiles else 0)),
            activations=self._forward + copies,
            evaluator=demand.evaluators
            * max(
                (sum(_evaluator_bytes(p, rows, scheme) for p in parts) for parts, scheme in self._layouts), default=0
            ),
            candidate=payload
            + kept_dense
            + max(quantized_forward, _REBUILT * self._largest_weight, _SMOOTHED * self._largest_weight + edit),
            proof=payload + max(copy64 + (2 if copy64 else 1) * self._proof_forward, self._largest_fold + edit),
            outputs=demand.outputs,
            dense=kept_dense,
            float64=copy64,
        )

    def _dense_bytes(self) -> int:
        """Dequantized weights of the operators that integer products do not serve."""
        simulated = [n for o, n, scheme in self._weights if not (scheme.integer_operands and o.kind == "linear")]
        return _FLOAT * sum(simulated)


def activation_bytes(model: nn.Module, batch: Batch) -> int:
    """Peak bytes of live tensors during one forward, inputs included, parameters and buffers not.

    Args:
        model: Run once in eval mode without gradients.
        batch: Its arguments, on the model's device.
    """
    return _measure(model, batch).peak


def measured_peak(baseline: int = 0) -> int:
    """High-water mark of the resident memory of this process beyond a baseline [bytes].

    Args:
        baseline: What was in use before, e.g. ``resident_bytes()`` before the run; the mark covers the whole life of the process.
    """
    return max(0, peak_bytes() - baseline)


def return_large_blocks() -> None:
    """Let the C library give freed blocks of 8 MiB and more back to the system at once, in this whole process.

    glibc raises that size by itself, up to 32 MiB, whenever a larger block is freed; weights of many candidates then leave
    holes in its heap that nothing fills: a model of 2 GiB was seen to take 1 GiB more than it needed. Without glibc nothing
    happens.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def resident_bytes() -> int:
    """Resident memory of this process now [bytes]."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """Highest resident memory of this process so far [bytes]."""
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


def resident_model_bytes(model: nn.Module) -> int:
    """Parameters and buffers that a model holds in main memory, shared ones once [bytes]."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum(t.nbytes for t in tensors if t.device.type == "cpu")


class _StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]  # torch annotates neither of the two
    """Bytes of the storages that operations make while it is active, until they are freed.

    Args:
        known: Tensors whose storages count 0 bytes.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.peak = 0
        self.largest_passed = 0
        self.passed = 0
        self._now = 0
        # A storage keeps its Python object as long as it lives, so the object's id stands for it.
        self._known = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}
        self._live: dict[int, int] = {}
        self._passed: set[int] = set()

    def passes(self, values: Iterable[Any]) -> None:
        """Count the storages of tensors in ``passed``, each once."""
        for value in values:
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                key = id(value.untyped_storage())
                if key in self._live and key not in self._passed:
                    self._passed.add(key)
                    self.passed += self._live[key]
                    self.largest_passed = max(self.largest_passed, self._live[key])

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

    def _forget(self, key: int) -> None:
        self._now -= self._live.pop(key)
        self._passed.discard(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` unchanged and count what it returns."""
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result


def _forward_bytes(model: nn.Module, batch: Batch, size: int) -> tuple[int, int, int]:
    """In a forward of ``size`` samples [bytes]: the peak of live activations, the largest tensor that goes into or out of a module with
    parameters, and all of these together.
    """
    one = _measure(model, batch)
    if size <= batch.size:
        return one.peak, one.largest_passed, one.passed
    two = _measure(model, _doubled(batch))
    steps = (size - batch.size) / max(batch.size, 1)

    def extrapolated(first: int, second: int) -> int:
        return math.ceil(first + max(second - first, 0) * steps)

    return (
        extrapolated(one.peak, two.peak),
        extrapolated(one.largest_passed, two.largest_passed),
        extrapolated(one.passed, two.passed),
    )


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

    def passed(_: nn.Module, inputs: Any, output: Any) -> None:
        meter.passes(tree_leaves((inputs, output)))

    with evaluating(model), torch.no_grad(), ExitStack() as hooks, meter:
        for module in model.modules():
            if any(parameter is not None for parameter in module._parameters.values()):
                hooks.callback(module.register_forward_hook(passed).remove)
        call(model, batch)
    return meter


def _validate(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise InputError(name, f"{value} is below 1", "give a positive number")


def _kept_bytes(part: PartLayout, rows: int) -> int:
    ranges = part.operators[0].in_channels * _FLOAT if part.is_convolution else 0
    return rows * (part.columns * _FLOAT + ranges + _ROW_OVERHEAD)


def _payload_bytes(count: int, scheme: Scheme) -> int:
    """Stored weights of an operator with ``count`` of them, with the scales of groups."""
    if scheme.is_float:
        return _FLOAT * count
    values = -(-count // 2) if scheme.weights == "int4" else count
    return values + (_FLOAT * count // scheme.group_size if scheme.group_size is not None else 0)


def _evaluator_bytes(part: PartLayout, rows: int, scheme: Scheme) -> int:
    """What scoring one part keeps: a judge of the calibration rows, one of the held-out rows, and the noise model.

    T rows, D columns, O outputs. A judge: its weights and its reference (T, O), one chunk of rows and of outputs with its
    temporaries; both together: quantized weights of the candidates of one call. The noise model: magnitudes of some rows
    and weights in float64 with their gradients.
    """
    outputs = sum(operator.out_channels for operator in part.operators)
    fan_in = part.columns // part.operators[0].groups
    weights = outputs * fan_in
    chunk, sampled = min(rows, _JUDGE_ROWS), min(rows, _NOISE_ROWS)
    judges = 2 * _FLOAT * (rows * outputs + weights) + 12 * chunk * (part.columns + outputs)
    stored = weights if scheme.byte_operands else _FLOAT * weights
    candidates = min(_JUDGE_CANDIDATES * stored, max(_JUDGE_WEIGHTS, stored)) + 3 * _FLOAT * weights
    noise = 4 * 8 * (sampled * part.columns + min(outputs, _NOISE_ROWS * len(part.operators)) * fan_in)
    return judges + candidates + noise
