"""The exact judge of one site: quantize its rows and weights under given scales and compare with the float output.

    loss(s) = sum ||Q(X / s) Q(W s)^T - X W^T||^2 / sum ||X W^T||^2          over all parts of the site

One candidate costs one GEMM of the site plus element-wise work in preallocated buffers. Source: claims A-2, A-4, A-11, A-12,
formulas fA2 to fA5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.losses import relative_loss, squared_sum
from alphasmith.objectives.quantizers import activation_scale, fake_quantize_activation_, fake_quantize_weight_
from alphasmith.objectives.scheme import Scheme
from alphasmith.objectives.site_data import SiteData, SitePart

# Rows of X in flight: bounds the buffers without costing GEMM efficiency.
_CHUNK_ROWS = 1024


class SiteObjective:
    """Scores scales at one site on growing subsets of its rows.

    The data is never changed. Tensors stay on the device they came on. Scratch buffers are shared between candidates, so use
    an objective from one thread at a time.

    Attributes:
        data: What is scored.
        scheme: What it is quantized to.
        rows: T, the rows of the largest part.
        channels: C.
        exact_evaluations: Candidates scored so far, on however many rows.

    Args:
        data: Rows, weights and statistics of the site.
        scheme: Number formats and granularities.

    Raises:
        InputError: Shapes within ``data`` contradict each other.
        NonFiniteError: A tensor of ``data`` holds NaN or infinity; the message names it.
    """

    def __init__(self, data: SiteData, scheme: Scheme) -> None:
        check_site_data(data)
        self.data = data
        self.scheme = scheme
        self.rows = max(part.x.shape[0] for part in data.parts)
        self.channels = int(data.activation_absmax.shape[0])
        self.exact_evaluations = 0
        with torch.no_grad():
            self._parts = [_Part(part, scheme) for part in data.parts]

    def loss(self, scales: Tensor, *, rows: int | None = None) -> float:
        """Relative squared error of the quantized output, dimensionless. Source: formula fA5.

        Args:
            scales: (C,) positive scales.
            rows: Rows of the largest part to score, 1..``self.rows``; other parts give the same fraction. None: all.

        Raises:
            InputError: ``scales`` is not (C,) and positive, or ``rows`` is out of range.
            NonFiniteError: A scale or the loss is NaN or infinite.
        """
        return next(self.losses(scales, (self.rows if rows is None else rows,)))

    def losses(self, scales: Tensor, rows: Sequence[int]) -> Iterator[float]:
        """Losses on growing subsets; weights are quantized once and every row is computed once.

        Only the subsets asked for are computed: a caller who stops early saves the rest.

        Args:
            scales: (C,) positive scales.
            rows: Strictly ascending subset sizes, in rows of the largest part, each 1..``self.rows``.

        Returns:
            Iterator over the loss on the first ``rows[0]``, ``rows[1]``, ... rows; each equals :meth:`loss` on as many rows
            up to float32 rounding.

        Raises:
            InputError: ``scales`` is not (C,) and positive, or ``rows`` is empty, not ascending or out of range.
            NonFiniteError: A scale is NaN or infinite; from the iterator: a loss is.
        """
        _check_scales(scales, self.channels)
        sizes = tuple(rows)
        if not sizes or sizes[0] < 1 or sizes[-1] > self.rows or any(a >= b for a, b in pairwise(sizes)):
            raise InputError("rows", f"{sizes} is not an ascending list of 1..{self.rows}", "give growing subset sizes")
        return self._iterate(scales.detach().to(self.data.activation_absmax.device, torch.float32), sizes)

    def _iterate(self, scales: Tensor, sizes: tuple[int, ...]) -> Iterator[float]:
        self.exact_evaluations += 1
        static = None
        if self.scheme.activations != "none" and self.scheme.activation_granularity == "static":
            static = activation_scale((self.data.activation_absmax / scales).max(), self.scheme.activations)
        candidates = [part.candidate(scales) for part in self._parts]
        error, done = 0.0, 0
        for size in sizes:
            energy = 0.0
            for part, candidate in zip(self._parts, candidates, strict=True):
                start, stop = (subset_rows(n, self.rows, part.rows) for n in (done, size))
                error += part.squared_error(candidate, start, stop, static)
                energy += part.energy(stop)
            done = size
            yield relative_loss(error, energy)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """What one part needs to know of one candidate: X's divisor (D,), Q(W s) by block, abs-max of every sample (S,)."""

    divisor: Tensor
    weight: Tensor
    sample_absmax: Tensor | None


class _Part:
    """One part with its float output and scratch buffers."""

    def __init__(self, part: SitePart, scheme: Scheme) -> None:
        self.part = part
        self.scheme = scheme
        self.rows = int(part.x.shape[0])
        self._block = row_block(part)
        chunk = min(self.rows, _CHUNK_ROWS)
        outputs = part.weight.shape[0] // part.groups
        self._x = part.x.new_empty(chunk, part.x.shape[1])
        self._out = part.x.new_empty(part.groups * chunk * outputs)
        self._reference = part.x.new_empty(part.groups, self.rows, outputs)
        weight = by_block(part.weight, part)
        for start in range(0, self.rows, chunk):
            x = part.x[start : start + chunk]
            self._reference[:, start : start + chunk] = torch.bmm(columns_by_block(x, self.part.groups), weight.mT)
        per_row = torch.linalg.vector_norm(self._reference, dim=(0, 2), dtype=torch.float64).square()
        self._energy = torch.cumsum(per_row, 0).tolist()

    def energy(self, rows: int) -> float:
        """Squared norm of the float output on the first rows."""
        return float(self._energy[rows - 1]) if rows else 0.0

    @torch.no_grad()
    def candidate(self, scales: Tensor) -> _Candidate:
        """Quantize the weight under ``scales`` (C,)."""
        divisor = scales[self.part.channel]
        scaled = self.part.weight * weight_columns(divisor, self.part, self._block)
        return _Candidate(
            divisor=divisor,
            weight=by_block(fake_quantize_weight_(scaled, self.scheme, self.part.out_features), self.part),
            sample_absmax=None if self.part.sample_absmax is None else (self.part.sample_absmax / scales).amax(dim=1),
        )

    @torch.no_grad()
    def squared_error(self, candidate: _Candidate, start: int, stop: int, static: Tensor | None) -> float:
        """Squared output error of rows start..stop-1; ``static`` is the scale of X, None for one per row or none at all."""
        total = 0.0
        groups, _, outputs = self._reference.shape
        for first in range(start, stop, _CHUNK_ROWS):
            last = min(first + _CHUNK_ROWS, stop)
            x = torch.div(self.part.x[first:last], candidate.divisor, out=self._x[: last - first])
            if self.scheme.activations != "none":
                scale = self._token_scale(candidate, x, first, last) if static is None else static
                fake_quantize_activation_(x, scale, self.scheme.activations)
            out = self._out[: groups * (last - first) * outputs].view(groups, last - first, outputs)
            torch.bmm(columns_by_block(x, self.part.groups), candidate.weight.mT, out=out)
            total += squared_sum(out.sub_(self._reference[:, first:last]))
        return total

    def _token_scale(self, candidate: _Candidate, x: Tensor, first: int, last: int) -> Tensor:
        if candidate.sample_absmax is not None and self.part.sample is not None:
            absmax = candidate.sample_absmax[self.part.sample[first:last]].unsqueeze(1)
        else:
            absmax = torch.linalg.vector_norm(x, ord=float("inf"), dim=1, keepdim=True)
        return activation_scale(absmax, self.scheme.activations)


def quantization_loss(x: Tensor, w: Tensor, scales: Tensor, scheme: Scheme) -> float:
    """Relative squared error of one linear layer under ``scales``, with ranges taken from ``x`` itself.

    Args:
        x: (T, C) rows.
        w: (O, C) weight.
        scales: (C,) positive scales.
        scheme: Number formats and granularities.

    Raises:
        InputError: Shapes contradict each other.
        NonFiniteError: Data, scales or the loss are NaN or infinite.
    """
    return SiteObjective(linear_site_data(x, w), scheme).loss(scales)


def linear_site_data(x: Tensor, w: Tensor, *, name: str = "layer") -> SiteData:
    """Data of a site that is one linear layer, with abs-max statistics taken from ``x`` (T, C) and ``w`` (O, C).

    Raises:
        InputError: ``x`` and ``w`` are not non-empty matrices with the same number of columns.
    """
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1] or 0 in (*x.shape, *w.shape):
        raise InputError("x", f"{tuple(x.shape)} and w {tuple(w.shape)} do not multiply", "give x (T, C) and w (O, C)")
    x, w = x.detach().to(torch.float32).contiguous(), w.detach().to(torch.float32).contiguous()
    channel = torch.arange(x.shape[1], device=x.device)
    part = SitePart(operators=(name,), x=x, weight=w, out_features=(w.shape[0],), channel=channel)
    absmax = x.abs().amax(dim=0)
    return SiteData(
        name=name,
        parts=(part,),
        activation_statistic=absmax,
        activation_absmax=absmax,
        weight_absmax=w.abs().amax(dim=0),
        ties=channel,
    )


def subset_rows(size: int, rows: int, part_rows: int) -> int:
    """Rows of a part in a subset of ``size`` of the ``rows`` rows of the largest part: the same fraction, rounded up."""
    return -(-size * part_rows // rows)


def row_block(part: SitePart) -> Tensor | None:
    """Convolution group of every weight row, (O,) int64; None for a dense part."""
    if part.groups == 1:
        return None
    device = part.weight.device
    blocks = [torch.arange(f, device=device) // (f // part.groups) for f in part.out_features]
    return torch.cat(blocks)


def by_block(weight: Tensor, part: SitePart) -> Tensor:
    """Weights (O, D // groups) as (groups, O // groups, D // groups): rows of one convolution group together."""
    block = row_block(part)
    if block is not None and len(part.out_features) > 1:
        weight = weight[torch.argsort(block, stable=True)]
    return weight.reshape(part.groups, -1, weight.shape[1])


def columns_by_block(x: Tensor, groups: int) -> Tensor:
    """Rows (T, D) as (groups, T, D // groups)."""
    return x.reshape(x.shape[0], groups, -1).transpose(0, 1)


def weight_columns(columns: Tensor, part: SitePart, block: Tensor | None) -> Tensor:
    """Values per column of x (D,), as every weight row sees them: broadcastable to (O, D // groups)."""
    return columns if block is None else columns.view(part.groups, -1)[block]


def check_site_data(data: SiteData) -> None:
    """Refuse data whose shapes contradict each other or whose tensors are not finite.

    Raises:
        InputError: A shape or index does not fit; names the site and the tensor.
        NonFiniteError: A tensor holds NaN or infinity; names the site and the tensor.
    """
    channels = data.activation_absmax.shape[0] if data.activation_absmax.dim() == 1 else 0
    if not data.parts or channels == 0:
        raise InputError(data.name, "has no rows or no channels", "calibrate the site before scoring it")
    tensors = {
        "activation_absmax": data.activation_absmax,
        "activation_statistic": data.activation_statistic,
        "weight_absmax": data.weight_absmax,
        "ties": data.ties,
    }
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != (channels,):
            raise InputError(
                data.name, f"{name} has shape {tuple(tensor.shape)}", f"give one value for each of {channels}"
            )
    for index, part in enumerate(data.parts):
        _check_part(data.name, f"part {index}", part, channels)
        tensors |= {f"part {index} x": part.x, f"part {index} weight": part.weight}
        if part.sample_absmax is not None:
            tensors[f"part {index} sample_absmax"] = part.sample_absmax
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"site {data.name}: {name} holds NaN or infinity")


def _check_part(site: str, name: str, part: SitePart, channels: int) -> None:
    rows, columns = part.x.shape if part.x.dim() == 2 else (0, 0)
    fits = {
        "x": rows > 0 and columns > 0 and part.x.dtype == torch.float32,
        "groups": part.groups >= 1 and columns % part.groups == 0,
        "weight": part.weight.shape == (sum(part.out_features), columns // max(part.groups, 1))
        and part.weight.dtype == torch.float32,
        "out_features": all(f > 0 and f % max(part.groups, 1) == 0 for f in part.out_features),
        "channel": part.channel.shape == (columns,) and _indexes(part.channel, channels),
        "sample": (part.sample is None) == (part.sample_absmax is None)
        and (part.sample is None or part.sample.shape == (rows,)),
        "sample_absmax": part.sample_absmax is None
        or part.sample is None
        or (part.sample_absmax.shape[1:] == (channels,) and _indexes(part.sample, part.sample_absmax.shape[0])),
    }
    for field, fit in fits.items():
        if not fit:
            raise InputError(
                site, f"{field} of {name} has the wrong shape or type", "build the part as SitePart describes"
            )


def _indexes(index: Tensor, size: int) -> bool:
    return index.numel() > 0 and int(index.min()) >= 0 and int(index.max()) < size


def _check_scales(scales: Tensor, channels: int) -> None:
    if tuple(scales.shape) != (channels,):
        raise InputError(
            "scales", f"has shape {tuple(scales.shape)}", f"give one scale for each of {channels} channels"
        )
    if not bool(torch.isfinite(scales).all()):
        raise NonFiniteError("the scales hold NaN or infinity")
    if bool((scales <= 0).any()):
        raise InputError("scales", "holds values that are not positive", "use smoothing_scales, which clamps them")
