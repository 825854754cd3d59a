"""Squared output errors of quantized rows: the arithmetic behind the exact judge of one site.

Symbols and shapes, of one part of a site: n candidates at a time, g convolution groups, T rows, D columns of X, O outputs.

    codes of X    round((X - z) / (s dx))     one static step dx per candidate, or one per row (per sample for convolutions)
    codes of W    round(W s / dw)
    error         X W^T - (dx dw codes(X) codes(W)^T + W z), times the roots of the weights of its row and output

A zero point of the activations (fA17) is taken out with the sums of the weight's codes. Static steps are folded into the weights, so a candidate costs one product and a handful of element-wise passes over
cache-sized chunks. Where the formats allow it, the product of codes is an exact integer product. Source: formulas fA2 to fA5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphasmith.objectives.calibration.site_data import SiteData, SitePart
from alphasmith.objectives.calibration.site_layout import (
    by_block,
    columns_by_block,
    kernel_columns,
    outputs_by_block,
    subset_rows,
)
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.producer_noise import ProducerNoise
from alphasmith.objectives.quantization.integer_product import (
    ExactProducts,
    integer_gemm_pays,
)
from alphasmith.objectives.quantization.quantizers import (
    BYTE_MIDDLE,
    CodeGrid,
    byte_zero,
    code_grid,
    code_scale,
    round_bytes_,
    round_codes_,
)
from alphasmith.objectives.quantization.saturating_pairs import SaturatingPairs
from alphasmith.objectives.quantization.scheme import ActivationFormat, Scheme
from alphasmith.objectives.quantization.unseen_rows import UnseenClipping
from alphasmith.objectives.smoothing import Smoothing

_DEFAULT_BUDGET = 2**29  # bytes
_CACHE = 2**23  # bytes of rows in flight on a CPU: the passes over a chunk find it in the cache
_STACK_ROWS = 1024  # rows that a GPU should see of every stacked candidate before more candidates are stacked
_LEAST_ROWS = 64  # rows in flight below which a product is too thin to be worth a budget


@dataclass(frozen=True, eq=False)
class PreparedPart:
    """What one part needs to know of n candidates.

    Attributes:
        inverse: (n, g, 1, D/g) factor of X - z: 1 / (s dx) under a static step, else 1 / s.
        shift: (n, g, 1, D/g) z, or None if no candidate shifts.
        weight: an operand of exact products of codes, or (n g, D/g, O/g) float32 dequantized, a static dx included.
        factor: (n, 1, 1, O) dw, a static dx included, for codes; None for dequantized weights.
        bias: (n, g, 1, O/g) W z, or None if no candidate shifts.
        zero: (n, 1, 1, 1) static zero point, 0..255; None unless activations have one.
        sums: (n, 1, 1, O) sums of the codes of the weight, where these are multiplied and activations have a zero point; else None.
        sample_grid: (n, S) step dx and zero point of every sample; None unless a convolution takes ranges per sample.
        pairs: Of every candidate and group, the pairs of weights whose products can saturate; () where the kernel is exact.
        step: (n, g, 1, O/g) what a lost product counts in the product that is taken: 1 for codes, dw and a static dx otherwise.
    """

    inverse: Tensor
    shift: Tensor | None
    weight: Tensor
    factor: Tensor | None
    bias: Tensor | None
    zero: Tensor | None
    sums: Tensor | None
    sample_grid: CodeGrid | None
    pairs: tuple[tuple[SaturatingPairs, ...], ...] = ()
    step: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PreparedStack:
    """Candidates that are scored together, ready for every part of the site.

    Attributes:
        parts: What every part needs to know of them.
        spread: (n,) float64 squared error in a row of weight 1 of what no row shows: the producers' rounding, clipping of unseen rows.
    """

    parts: tuple[PreparedPart, ...]
    spread: Tensor


class SiteKernel:
    """All parts of a site with their float outputs and scratch buffers. Data is unchecked: see ``check_site_data``.

    Attributes:
        rows: T of the largest part.
        candidates_scored: Candidates whose scoring has begun; kept by who scores them.
        capacity: Candidates whose quantized weights fit the budget.
        stack: Candidates scored in one step; 1 on a CPU, whose caches one candidate fills.

    Args:
        data: Rows, weights and ranges of the site.
        scheme: Number formats and granularities.
        budget: Bytes of scratch buffers and quantized weights, beside the data and its float output. None: 512 MiB, or what a
            single candidate of a large site needs.
        unseen: Clipping that rows which were not seen are expected to add; None: what the rows themselves show.

    Raises:
        InputError: ``budget`` does not hold a single candidate.
    """

    def __init__(
        self, data: SiteData, scheme: Scheme, budget: int | None, unseen: UnseenClipping | None = None
    ) -> None:
        self._data = data
        self._scheme = scheme
        self.rows = max(part.x.shape[0] for part in data.parts)
        self.candidates_scored = 0
        with torch.no_grad():
            self._parts = [_PartScorer(part, scheme) for part in data.parts]
        self._producers = ProducerNoise(data, scheme)
        self._unseen = unseen
        self._positions = self._global_positions()
        weights = sum(part.weight_bytes for part in self._parts)
        scratch = sum(part.scratch_bytes for part in self._parts)
        per_row = sum(part.row_bytes for part in self._parts)
        # One half for the quantized weights of candidates, the other for the buffers.
        needed = 2 * max(weights, scratch + per_row * min(self.rows, _LEAST_ROWS))
        budget = max(_DEFAULT_BUDGET, needed) if budget is None else budget
        if budget < needed:
            raise InputError(
                "budget", f"{budget} bytes hold no candidate of site {data.name}", f"give {needed} bytes or more"
            )
        half = budget // 2
        self.capacity = half // weights
        on_cpu = data.device.type == "cpu"
        self.stack = 1 if on_cpu else max(1, min(self.capacity, half // (scratch + per_row * _STACK_ROWS)))
        room = half - self.stack * scratch
        # Every thread has its own cache.
        in_flight = min(room, _CACHE * torch.get_num_threads()) if on_cpu else room
        self._chunk = max(1, in_flight // (self.stack * per_row))
        for part in self._parts:
            part.reserve(1, self._chunk)

    def energy(self, rows: int) -> float:
        """Squared norm of the float output on a subset of ``rows`` rows."""
        counts = self._part_rows(rows)
        return sum(part.energies[count - 1] for part, count in zip(self._parts, counts, strict=True) if count)

    @torch.no_grad()
    def prepare(self, smoothings: Sequence[Smoothing]) -> PreparedStack:
        """Quantize the weights under at most ``stack`` candidates; their tensors are on the site's device, float32 and checked."""
        for part in self._parts:
            part.reserve(len(smoothings), self._chunk)
        scales = torch.stack([s.scales for s in smoothings])
        shift = None
        if any(s.shift is not None for s in smoothings):
            shift = torch.stack([torch.zeros_like(s.scales) if s.shift is None else s.shift for s in smoothings])
        grid = None
        if self._scheme.static:
            edges = [self._data.input_range.edges(s.scales, s.shift, s.range_factor) for s in smoothings]
            low, high = (torch.stack(edge) for edge in zip(*edges, strict=True))
            grid = _grid(low, high, self._scheme.activations)
        parts = tuple(part.prepare(scales, shift, grid) for part in self._parts)
        logs = scales.double().log()
        hidden = self._producers.error(logs)
        if self._unseen is not None:
            hidden = hidden + self._unseen.error(logs, logs.new_tensor([s.range_factor for s in smoothings]), shift)
        return PreparedStack(parts, hidden / (sum(part.mass for part in self._parts) or 1.0))

    @torch.no_grad()
    def row_errors(self, stacks: Sequence[PreparedStack], start: int, stop: int) -> list[Tensor]:
        """Squared output error of every row that a subset of ``stop`` rows has and one of ``start`` has not.

        What no row shows counts equally in every row, times its weight.

        Rows are in the order in which growing subsets take them, so errors of consecutive ranges join up to those of one.

        Returns:
            (n, rows) float64 for every stack.
        """
        ranges = list(zip(self._part_rows(start), self._part_rows(stop), strict=True))
        by_part = [
            part.row_errors([stack.parts[i] for stack in stacks], *rows)
            for i, (part, rows) in enumerate(zip(self._parts, ranges, strict=True))
        ]
        by_part = [
            [
                errors + part.spread(stack.spread.unsqueeze(1), *rows)
                for errors, stack in zip(found, stacks, strict=True)
            ]
            for part, rows, found in zip(self._parts, ranges, by_part, strict=True)
        ]
        if len(self._parts) == 1:
            return by_part[0]
        places = [place[first:last] for place, (first, last) in zip(self._positions, ranges, strict=True)]
        order = torch.argsort(torch.cat(places))
        return [torch.cat(errors, dim=1)[:, order] for errors in zip(*by_part, strict=True)]

    @torch.no_grad()
    def range_percentile(self, smoothing: Smoothing, percentile: float) -> tuple[float, float]:
        """``percentile`` of max_j |x_tj - z_j| / s_j over the rows of all parts, and the same of the calibrated range.

        Of asymmetric ranges: ``percentile`` of the factors by which the calibrated range would just hold a row, and 1. An end that is 0
        stays 0, whatever rows hold beyond it.
        """
        found = [part.row_edges(smoothing) for part in self._parts]
        low, high = (torch.cat(edges).double() for edges in zip(*found, strict=True))
        calibrated = [edge.double() for edge in self._data.input_range.edges(smoothing.scales, smoothing.shift)]
        if self._scheme.asymmetric:
            sides = [
                rows / torch.where(end == 0, torch.inf, end) for rows, end in zip((low, high), calibrated, strict=True)
            ]
            rows, whole = torch.maximum(*sides), torch.ones_like(calibrated[0])
        else:
            rows, whole = torch.maximum(high, -low), torch.maximum(calibrated[1], -calibrated[0])
        # The smallest range that holds that many whole rows; nothing between two rows.
        inside = rows.kthvalue(max(1, math.ceil(rows.shape[0] * percentile / 100.0 - 1e-9))).values
        both: list[float] = torch.stack([inside, whole]).tolist()
        return both[0], both[1]

    def _part_rows(self, rows: int) -> list[int]:
        return [subset_rows(rows, self.rows, part.rows) for part in self._parts]

    def _global_positions(self) -> list[Tensor]:
        """For every part, the place of its rows in the order in which growing subsets take them."""
        entered = [torch.arange(part.rows) * self.rows // part.rows for part in self._parts]
        order = torch.argsort(torch.cat(entered), stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(order.shape[0])
        return list(torch.split(places.to(self._data.device), [part.rows for part in self._parts]))


class _PartScorer:
    """One part with its float output and scratch buffers.

    Attributes:
        rows: T.
        mass: Sum of the weights of the rows.
        energies: Squared norm of the float output of the first 1, 2, ... T rows.
        weight_bytes: Size of one candidate's quantized weights.
        scratch_bytes: Further bytes one candidate needs while they are quantized.
        row_bytes: Bytes in flight per row and candidate.
    """

    def __init__(self, part: SitePart, scheme: Scheme) -> None:
        self._part = part
        self._scheme = scheme
        self.rows = int(part.x.shape[0])
        self.mass = part.mass
        self._groups = part.groups
        device = part.x.device
        self._x = columns_by_block(part.x, part.groups)
        # Columns last: the abs-max over inputs is then a vectorised pass, and the product reads its right operand in order.
        self._weight = by_block(part.weight, part).mT.contiguous()
        self._channel = part.channel.view(part.groups, 1, -1)
        _, self._inputs, self._outputs = self._weight.shape
        self._exact = scheme.byte_operands and part.groups == 1
        sizes = self._inputs, self._outputs
        self._integer = self._exact and integer_gemm_pays(device.type, self.rows, *sizes)
        self._reference = torch.bmm(self._x, self._weight)
        # Roots of the weights are part of the reference and of the factors that turn codes into outputs: no pass of their own.
        outputs, self._row_weight = outputs_by_block(part), part.row_weight
        self._root = None if outputs is None else outputs.sqrt().view(self._groups, 1, -1)
        if self._root is not None:
            self._reference.mul_(self._root)
        norms = torch.linalg.vector_norm(self._reference, dim=(0, 2), dtype=torch.float64)
        self.energies: list[float] = torch.cumsum(self._weighed(norms.square(), 0, self.rows), 0).tolist()
        self._size = scheme.group_size or self._inputs
        self._blocks = -(-self._inputs // self._size)
        padded = self._groups * self._blocks * self._size * self._outputs
        row = 4 * self._groups * (self._inputs + self._outputs)
        if self._exact:
            self.weight_bytes, per_row = ExactProducts.sizes(*sizes, device, integer=self._integer)
            self.row_bytes = row + per_row
        else:
            self.weight_bytes, self.row_bytes = 4 * self._groups * self._inputs * self._outputs, row
        self.scratch_bytes = 4 * padded
        self._reserved = (0, 0)

    def reserve(self, stack: int, rows: int) -> None:
        """Make the buffers for ``stack`` candidates and ``rows`` rows at a time, unless they are there."""
        rows = min(rows, self.rows)
        if self._reserved[0] >= stack and self._reserved[1] == rows:
            return
        self._reserved, self._chunk = (stack, rows), rows
        groups, x = self._groups, self._part.x
        self._scaled = x.new_empty(stack * rows * groups * self._inputs)
        self._output = x.new_empty(stack * rows * groups * self._outputs)
        self._scratch = x.new_empty(stack, groups, self._blocks * self._size, self._outputs)
        if self._exact:
            sizes = self._inputs, self._outputs
            self._products = ExactProducts(stack, rows, *sizes, x.device, integer=self._integer)

    def prepare(self, scales: Tensor, shift: Tensor | None, grid: CodeGrid | None) -> PreparedPart:
        """Quantize the weight under ``scales`` and ``shift`` (n, C); ``grid`` (n,) is the static step and zero point of X."""
        step = None if grid is None else grid.scale
        zero = None if grid is None or grid.zero is None else grid.zero.view(-1, 1, 1, 1)
        stack = scales.shape[0]
        columns = scales[:, self._channel]
        inverse = columns.reciprocal() if step is None else (columns * step.view(-1, 1, 1, 1)).reciprocal()
        dw, padded = self._quantized_weight(stack, columns)
        weight = padded[:, :, : self._inputs]
        # Integer codes cannot be NaN, so a step or factor beyond float32 would go unseen: it makes the outputs NaN instead.
        sound = torch.isfinite(inverse).flatten(1).all(1) & torch.isfinite(dw).flatten(1).all(1)
        factor = torch.where(sound, 1.0 if step is None else step, math.nan).view(-1, 1, 1, 1)
        factor = factor if self._root is None else factor * self._root
        z = None if shift is None else shift[:, self._channel]
        spread = sums = lost = None
        pairs = self._saturating(weight) if self._scheme.saturates else ()
        if self._exact:
            spread = dw[:, :, 0] * factor
            if self._scheme.asymmetric:
                sums = weight.sum(dim=2, keepdim=True)
            weight = self._products.operand(weight[:, 0])
        else:
            lost = (dw[:, :, 0] * factor).expand(-1, self._groups, -1, self._outputs) if pairs else None
            padded.unflatten(2, (self._blocks, self._size)).mul_(dw * factor.unsqueeze(2))
            weight = weight.reshape(-1, self._inputs, self._outputs).clone()
        return PreparedPart(
            inverse=inverse,
            shift=z,
            weight=weight,
            factor=spread,
            bias=None if z is None else self._bias(z),
            zero=zero,
            sums=sums,
            sample_grid=self._sample_grid(scales, shift),
            pairs=pairs,
            step=lost,
        )

    def spread(self, error: Tensor, start: int, stop: int) -> Tensor:
        """An error per unit of weight (n, 1) over rows start..stop-1, by their weights: (n, stop - start) or broadcastable."""
        return error if self._row_weight is None else error * self._row_weight[start:stop]

    def row_errors(self, prepared: Sequence[PreparedPart], start: int, stop: int) -> list[Tensor]:
        """(n, stop - start) float64 squared output error of rows start..stop-1, for every stack of candidates."""
        norms: list[list[Tensor]] = [[] for _ in prepared]
        for first in range(start, stop, self._chunk):
            last = min(first + self._chunk, stop)
            for stack, found in zip(prepared, norms, strict=True):
                found.append(self._row_norms(stack, first, last))
        # The norm of one row in float32 is right to 1e-7 of itself, as the outputs it is taken from are; what grows with the
        # number of rows is the sum over them, which is float64.
        empty = self._part.x.new_empty(0)
        return [
            self._weighed(
                (torch.cat(found, dim=1) if found else empty.expand(stack.inverse.shape[0], 0)).double().square(),
                start,
                stop,
            )
            for stack, found in zip(prepared, norms, strict=True)
        ]

    def row_edges(self, smoothing: Smoothing) -> tuple[Tensor, Tensor]:
        """min_j and max_j of (x_tj - z_j) / s_j, (T,) each."""
        low, high = [], []
        inverse = smoothing.scales[self._channel].reciprocal()
        for first in range(0, self.rows, self._chunk):
            rows = self._x[:, first : first + self._chunk]
            if smoothing.shift is not None:
                rows = rows - smoothing.shift[self._channel]
            rows = rows * inverse
            low.append(rows.amin(dim=(0, 2)))
            high.append(rows.amax(dim=(0, 2)))
        return torch.cat(low), torch.cat(high)

    def _weighed(self, squares: Tensor, start: int, stop: int) -> Tensor:
        """Squared norms (..., stop - start) of rows start..stop-1 times their weights."""
        return squares if self._row_weight is None else squares * self._row_weight[start:stop]

    def _bias(self, z: Tensor) -> Tensor:
        """(n, g, 1, O/g) W z, times the root of the weights of the outputs."""
        bias = torch.bmm(z.squeeze(2).transpose(0, 1), self._weight).transpose(0, 1).unsqueeze(2)
        return bias if self._root is None else bias * self._root

    def _quantized_weight(self, stack: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Steps dw (n, g, blocks, 1, O/g) or broadcastable, and float32 codes (n, g, D' >= D/g, O/g) of the weight times s."""
        padded = self._scratch[:stack]
        padded[:, :, self._inputs :] = 0.0
        torch.mul(self._weight, columns.mT, out=padded[:, :, : self._inputs])
        blocks = padded.unflatten(2, (self._blocks, self._size))
        if self._scheme.is_float:
            return padded.new_ones(stack, 1, 1, 1, 1), padded
        if self._scheme.weight_granularity == "tensor":
            absmax = self._operator_absmax(_absmax(padded, (1, 2)))
        else:
            absmax = _absmax(blocks, (3,))
        dw = torch.where(torch.isfinite(absmax), code_scale(absmax, self._scheme.weights), math.nan)
        round_codes_(blocks.div_(dw), self._scheme.weights)
        return dw, padded

    def _operator_absmax(self, absmax: Tensor) -> Tensor:
        """The largest of (n, 1, 1, O/g) over the outputs of each operator, spread over them again: (n, 1, 1, 1, O/g)."""
        features = [f // self._groups for f in self._part.out_features]
        each = [o.amax(dim=-1, keepdim=True).expand_as(o) for o in torch.split(absmax, features, dim=-1)]
        return torch.cat(each, dim=-1).unsqueeze(1)

    def _sample_grid(self, scales: Tensor, shift: Tensor | None) -> CodeGrid | None:
        low, high = self._part.sample_low, self._part.sample_high
        if low is None or high is None or self._scheme.activation_granularity == "static":
            return None
        if self._scheme.activations == "none":
            return None
        if shift is not None:
            low, high = low - shift.unsqueeze(1), high - shift.unsqueeze(1)
        columns = scales.unsqueeze(1)
        return _grid((low / columns).amin(dim=2), (high / columns).amax(dim=2), self._scheme.activations)

    def _row_norms(self, prepared: PreparedPart, first: int, last: int) -> Tensor:
        """(n, rows) float32 norm of the output error of every row."""
        scheme, groups, rows = self._scheme, self._groups, last - first
        stack = prepared.inverse.shape[0]
        shape = (stack, groups, rows, -1)
        x = self._scaled[: stack * groups * rows * self._inputs].view(shape)
        if prepared.shift is None:
            torch.mul(self._x[:, first:last], prepared.inverse, out=x)
        else:
            torch.sub(self._x[:, first:last], prepared.shift, out=x).mul_(prepared.inverse)
        row_step, zero = None, prepared.zero
        if scheme.activations != "none":
            if scheme.activation_granularity == "token":
                row_step, zero = self._row_grid(prepared, x, first, last)
                x.div_(row_step)
            (round_bytes_ if self._exact else round_codes_)(x, scheme.activations, zero)
        out = self._output[: stack * groups * rows * self._outputs].view(shape)
        if prepared.factor is None:
            torch.bmm(x.flatten(0, 1), prepared.weight, out=out.flatten(0, 1))
        else:
            self._products.product(x[:, 0], prepared.weight, out[:, 0])
            if prepared.sums is not None and zero is not None:  # still integers: nothing is lost where little is left
                out.addcmul_(byte_zero(zero), prepared.sums, value=-1)
        if prepared.pairs:
            self._saturate(out, prepared, x, zero)
        if row_step is not None:
            out.mul_(row_step)
        reference = self._reference[:, first:last]
        if prepared.factor is None:
            torch.sub(reference, out, out=out)
        else:
            torch.addcmul(reference, out, prepared.factor, value=-1, out=out)
        if prepared.bias is not None:
            out.sub_(prepared.bias)
        norms: Tensor = torch.linalg.vector_norm(out, dim=(1, 3))
        return norms

    def _saturating(self, codes: Tensor) -> tuple[tuple[SaturatingPairs, ...], ...]:
        """The pairs that can saturate, of every candidate and group, of weight codes (n, g, D/g, O/g)."""
        kernel = kernel_columns(self._channel)
        return tuple(tuple(SaturatingPairs(w.t(), kernel) for w in candidate) for candidate in codes)

    def _saturate(self, out: Tensor, prepared: PreparedPart, codes: Tensor, zero: Tensor | None) -> None:
        """Add what saturation loses to products (n, g, rows, O/g) of rounded rows."""
        # Codes multiplied as bytes are those of uint8 minus 128 as well; other codes of uint8 are counted from their zero point.
        middle = torch.full_like(codes[:1, :1, :1, :1], BYTE_MIDDLE) if self._exact or zero is None else zero
        unsigned = codes + middle
        for n, candidate in enumerate(prepared.pairs):
            for g, pairs in enumerate(candidate):
                lost = pairs.lost(unsigned[n, g])
                out[n, g].add_(lost if prepared.step is None else lost * prepared.step[n, g])

    def _row_grid(self, prepared: PreparedPart, x: Tensor, first: int, last: int) -> CodeGrid:
        """(n, 1, rows, 1) step and zero point of every row: its own, or its sample's."""
        if prepared.sample_grid is not None and self._part.sample is not None:
            sample = self._part.sample[first:last]
            step, zero = (None if values is None else values[:, sample] for values in prepared.sample_grid)
        else:
            step, zero = _grid(x.amin(dim=(1, 3)), x.amax(dim=(1, 3)), self._scheme.activations)
        step, zero = (None if values is None else values.unsqueeze(1).unsqueeze(-1) for values in (step, zero))
        return CodeGrid(torch.as_tensor(step), zero)


def _absmax(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    # On CPU, amax and amin are vectorised and the infinity norm is not: 15 times faster.
    return torch.maximum(values.amax(dim=dims, keepdim=True), values.amin(dim=dims, keepdim=True).neg_())


def _grid(low: Tensor, high: Tensor, fmt: ActivationFormat) -> CodeGrid:
    """Steps, and zero points, for values from ``low`` to ``high``; NaN where one is not finite, so that the error is."""
    step, zero = code_grid(low, high, fmt)
    return CodeGrid(torch.where(torch.isfinite(low) & torch.isfinite(high), step, math.nan), zero)
