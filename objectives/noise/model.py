"""The rounding-noise model: what the exact judge would say of scales, without a product of the site's size.

    loss(s) * ||X W^T||^2 ~ sum_j s_j^2 ||W_:j||^2 E_j(X / s) + sum_j ||X_:j||^2 / s_j^2 E_j(W s)

E_j is the squared rounding error of a column. Errors of different columns are taken to be independent, with one exception: the
errors of a weight are the same in every row, so they add up along the directions in which the columns of X are correlated; the few
leading ones are followed. Without that, sites with few outputs and images as inputs can't be ranked (docs/performance.md). No
product of X and W is needed. Two forms of E_j serve two purposes:

- :meth:`NoiseModel.losses` rounds sampled rows of X and W as the quantizer does: exact for every format and granularity up to
  sampling, with zeros, dead zones, 4 bits, fp8 and clipping. It ranks candidates. Where products saturate, what they lose is counted on
  fewer rows and outputs (:mod:`alphasmith.objectives.noise._saturation`).
- The closed form of :mod:`alphasmith.objectives.noise._closed_form`, uniform noise, is smooth and close to convex in log s. Descent
  follows it; its minima are ranked by the first form, the starts among them. It takes products as exact.

The model proposes; :class:`~alphasmith.objectives.judge.site_objective.SiteObjective` judges. Source: claim A-2, formulas fA1 to fA5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from alphasmith.objectives.calibration.site_data import SiteData, SitePart
from alphasmith.objectives.calibration.site_layout import by_block, check_site_data, columns_by_block, outputs_by_block
from alphasmith.objectives.dead_channels import NeutralScales
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.losses import squared_sum
from alphasmith.objectives.judge.producer_noise import ProducerNoise
from alphasmith.objectives.noise._closed_form import POWERS, ClosedForm
from alphasmith.objectives.noise._descent import descend
from alphasmith.objectives.noise._rounding import PartRounding, Rounding, measure
from alphasmith.objectives.noise._saturation import SampledSaturation
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.unseen_rows import UnseenClipping
from alphasmith.objectives.smoothing import SCALE_MAX, SCALE_MIN, LogScales, tie_index, tied_extreme

# Rows whose steps a descent follows: enough for its direction, and the dearest part of a step.
_DESCENT_ROWS = 128
# Entries of a tensor sampled for the limit: as many free scales as channels would fit the chance of a smaller sample.
_LIMIT_ENTRIES = 1 << 19
# Elements in flight: several candidates of a small site together, one of a large site, in a CPU's cache.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
# Natural logarithm (of a scale) or alpha by which a first, blind step may change a coordinate.
_REACH = 0.1
# Relative fall of the loss below which a descent has arrived.
_TOLERANCE = 3e-4
_LIMIT_TOLERANCE = 5e-5


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where the noise model is least within a box.

    Attributes:
        theta: (P,) float64.
        loss: Predicted relative loss there.
    """

    theta: Tensor
    loss: float


class _LogLoss(Protocol):
    """Log loss (N,) and gradient (N, P) of points (N, P)."""

    def __call__(self, theta: Tensor, power: int) -> tuple[Tensor, Tensor]: ...


class NoiseModel:
    """Predicts the exact loss of a site.

    Memory and time per candidate are bounded by ``max_rows`` rows of X and of W, whatever their size.

    Attributes:
        data: Rows, weights and statistics of the site.
        scheme: Number formats and granularities.
        shift: (C,) subtracted from the rows, or None.

    Args:
        data: Rows, weights and statistics of the site.
        scheme: Number formats and granularities.
        shift: (C,) the shift of the candidates to predict; None: no shift.
        energy: Squared norm of the float output on all rows, from an objective of the same, checked data. None: checks the data
            and computes it, for the price of one product.
        range_factor: Static activation range relative to the largest calibrated magnitude, as in ``Smoothing``.
        unseen: Clipping expected of rows that were not seen, as the exact judge adds it; None: it adds none.
        max_rows: Rows of x that are sampled, and half as many output rows; half of both under fp8.

    Raises:
        InputError: Shapes within ``data`` contradict each other, ``shift`` is not (C,), ``range_factor`` is not positive, or
            ``max_rows`` is below 1.
        NonFiniteError: ``data``, the shift or the float output holds NaN or infinity.
    """

    def __init__(
        self,
        data: SiteData,
        scheme: Scheme,
        *,
        shift: Tensor | None = None,
        energy: float | None = None,
        range_factor: float = 1.0,
        unseen: UnseenClipping | None = None,
        max_rows: int = 512,
    ) -> None:
        if max_rows < 1:
            raise InputError("max_rows", f"{max_rows} is below 1", "use 512")
        if not (range_factor > 0 and math.isfinite(range_factor)):
            raise InputError("range_factor", f"{range_factor} is no positive number", "use 1 for abs-max")
        if energy is None:
            check_site_data(data)
        self.data = data
        self.scheme = scheme
        self.shift = None if shift is None else self._checked("shift", shift, (data.channels,), torch.float32)
        self._range_factor, self._unseen = range_factor, unseen
        with torch.no_grad():
            self._energy = _output_energy(data) if energy is None else energy
        if not math.isfinite(self._energy):
            raise NonFiniteError(f"site {data.name}: the float output has energy {self._energy}")
        # Steps of weight rows differ less than those of rows of x. Conversion to fp8 costs several times an integer's rounding.
        self._rows = -(-max_rows // 2) if scheme.weights == "fp8" else max_rows
        parts = self._measured(self._rows, -(-self._rows // 2))
        self._roundings = _of_all(parts)
        pairs = zip(data.parts, parts, strict=True)
        self._saturations = [SampledSaturation(*pair) for pair in pairs] if scheme.saturates else []
        if not all(bool(torch.isfinite(r.partner).all()) for r in self._roundings):
            raise NonFiniteError(f"site {data.name}: the energy of a column of its rows or weights is not finite")
        self._producers = ProducerNoise(data, scheme)
        self._forms: list[ClosedForm] = []

    def loss(self, scales: Tensor) -> Tensor:
        """Predicted relative squared error, () float64; its gradient is that of the closed form, relative to the prediction.

        Args:
            scales: (C,) positive scales.

        Raises:
            InputError: ``scales`` is not (C,) and positive.
            NonFiniteError: A scale or the prediction is NaN or infinite.
        """
        plain = self._checked_scales(scales.unsqueeze(0))
        value = self.losses(plain)[0]
        if not bool(torch.isfinite(value)):
            raise NonFiniteError(f"the predicted loss is {float(value)}")
        if not scales.requires_grad:
            return value
        _, slope = self._log_loss(self._closed_forms(), plain.to("cpu", torch.float64).log(), POWERS[-1])
        through = value * (slope[0].to(scales.device) * scales.to(torch.float64).log()).sum().to(value.device)
        return value + (through - through.detach())

    @torch.no_grad()
    def losses(self, scales: Tensor) -> Tensor:
        """Predicted relative squared errors of several candidates.

        Args:
            scales: (N, C) scales; a candidate that is not finite and positive has a loss that is not finite.

        Returns:
            (N,) float64; sort out what is not finite before comparing.

        Raises:
            InputError: ``scales`` is not (N, C).
        """
        if scales.dim() != 2 or scales.shape[1] != self.data.channels:
            raise InputError("scales", f"has shape {tuple(scales.shape)}", f"give (N, {self.data.channels})")
        return self._predicted(self._roundings, scales.detach().to(self.data.device, torch.float32))

    def minimise(self, space: LogScales, low: Tensor, high: Tensor, starts: Tensor, *, steps: int = 40) -> Minimum:
        """Least predicted loss within a box, from several starts.

        Args:
            space: Scales as a function of theta.
            low: (P,) smallest theta.
            high: (P,) largest theta, not below ``low``.
            starts: (N, P) first points, clamped into the box.
            steps: Steps of all starts together, at least 1.

        Returns:
            The best of all starts and of what descent made of them, by :meth:`losses`.

        Raises:
            InputError: Shapes differ, a range is empty, or ``steps`` is below 1.
            NonFiniteError: A value is NaN or infinite, or so is every predicted loss.
        """
        size = space.parameters
        lowest, highest = (self._checked(n, v, (size,), torch.float64).cpu() for n, v in (("low", low), ("high", high)))
        if starts.dim() != 2 or starts.shape[0] < 1:
            raise InputError("starts", f"has shape {tuple(starts.shape)}", f"give (N, {size})")
        first = self._checked("starts", starts, (starts.shape[0], size), torch.float64).cpu()
        if bool((lowest > highest).any()):
            raise InputError("low", "exceeds high", "give every number a range with low <= high")
        first = torch.clamp(first, lowest, highest)
        forms, nearby = self._closed_forms(), space.to("cpu")

        def log_loss(theta: Tensor, power: int) -> tuple[Tensor, Tensor]:
            return _through(nearby.logs, theta, lambda logs: self._log_loss(forms, logs, power))

        points = torch.cat((first, _descend(log_loss, first, lowest, highest, steps, _TOLERANCE)))
        points = points.to(self.data.device)
        best, loss = self._least(self.losses(space.scales(points)))
        return Minimum(points[best], loss)

    def limit_scales(self, start_scales: Tensor, steps: int = 60) -> Tensor:
        """Scales free of any alpha that minimise the model: the per-channel limit of a site.

        Args:
            start_scales: (C,) positive scales; of tied channels the geometric mean is taken.
            steps: Steps, at least 1.

        Returns:
            (C,) float32 scales, equal within ties; their predicted loss is at most that of the (tied) start.

        Raises:
            InputError: ``start_scales`` is not (C,) and positive, or ``steps`` is below 1.
            NonFiniteError: A scale or every predicted loss is NaN or infinite.
        """
        logs = self._checked_scales(start_scales.unsqueeze(0)).to("cpu", torch.float64).log()
        index = tie_index(self.data.ties, self.data.channels).cpu()
        members = torch.bincount(index).to(torch.float64)
        widest = max(rounding.entries.shape[0] * rounding.entries.shape[2] for rounding in self._roundings)
        rows = max(self._rows, _LIMIT_ENTRIES // widest)
        roundings = _of_all(self._measured(rows, rows))
        forms = [ClosedForm(rounding, self.data.channels, rounding.entries.shape[1]) for rounding in roundings]

        def by_tie(values: Tensor) -> Tensor:
            at = index.expand_as(values)
            return values.new_zeros(values.shape[0], members.shape[0]).scatter_add_(1, at, values)

        # Dead channels follow the live ones whatever is free (trap T7), as they do in every candidate.
        activation = self.data.input_range.peaks(self.shift)
        producer = self.data.producer_absmax
        neutral = NeutralScales.of(
            tied_extreme(activation.cpu(), index, "amax"),
            tied_extreme(self.data.weight_absmax.cpu(), index, "amax"),
            None if producer is None else tied_extreme(producer.cpu(), index, "amax"),
        )

        def logs_of(theta: Tensor) -> Tensor:
            return neutral.place(theta[:, index])

        def log_loss(theta: Tensor, power: int) -> tuple[Tensor, Tensor]:
            return _through(logs_of, theta, lambda logs: self._log_loss(forms, logs, power))

        low, high = (torch.full_like(members, math.log(bound)) for bound in (SCALE_MIN, SCALE_MAX))
        start = torch.clamp(by_tie(logs) / members, low, high)
        points = torch.cat((start, _descend(log_loss, start, low, high, steps, _LIMIT_TOLERANCE)))
        scales = logs_of(points).clamp(math.log(SCALE_MIN), math.log(SCALE_MAX)).exp()
        scales = scales.to(self.data.device, torch.float32)
        best, _ = self._least(self._predicted(roundings, scales))
        return scales[best]

    @torch.no_grad()
    def _measured(self, rows: int, outputs: int) -> list[PartRounding]:
        given = self.scheme, self.shift, self._range_factor, rows, outputs
        return [measure(self.data, part, *given) for part in self.data.parts]

    def _closed_forms(self) -> list[ClosedForm]:
        if not self._forms:
            self._forms = [ClosedForm(r, self.data.channels, _DESCENT_ROWS) for r in self._roundings]
        return self._forms

    @torch.no_grad()
    def _predicted(self, roundings: list[Rounding], scales: Tensor) -> Tensor:
        total = torch.zeros(scales.shape[0], dtype=torch.float64, device=scales.device)
        limit = _CHUNK_ELEMENTS.get(scales.device.type, _CHUNK_ELEMENTS["cpu"])
        for rounding in roundings:
            size = max(1, limit // rounding.entries.numel())
            total += torch.cat([rounding.errors(chunk) for chunk in torch.split(scales, size)])
        for saturation in self._saturations:
            total += saturation.errors(scales)
        logs = scales.to(torch.float64).log()
        total += self._producers.error(logs)
        if self._unseen is not None:
            total += self._unseen.error(logs, self._range_factor, self.shift)
        valid = (torch.isfinite(scales) & (scales > 0)).all(dim=1)
        return torch.where(valid, self._relative(total), torch.nan)

    def _least(self, losses: Tensor) -> tuple[int, float]:
        best = int(torch.where(torch.isfinite(losses), losses, torch.inf).argmin())
        if not math.isfinite(float(losses[best])):
            raise NonFiniteError(f"site {self.data.name}: no start has a finite predicted loss")
        return best, float(losses[best])

    @torch.no_grad()
    def _log_loss(self, forms: list[ClosedForm], logs: Tensor, power: int) -> tuple[Tensor, Tensor]:
        """Logarithm of the closed-form loss (n,) and its gradient (n, C) by ``logs`` (n, C), on the CPU."""
        noise, slope = torch.zeros_like(logs[:, 0]), torch.zeros_like(logs)
        for form in forms:
            part, part_slope = form.noise(logs, power)
            noise, slope = noise + part, slope + part_slope
        if self._unseen is not None:
            part, part_slope = self._unseen.noise(logs, self._range_factor, self.shift, power)
            noise, slope = noise + part, slope + part_slope
        if not self._producers.idle:
            with torch.enable_grad():
                point = logs.detach().to(self.data.device).requires_grad_()
                part = self._producers.error(point, power)
                (part_slope,) = torch.autograd.grad(part.sum(), point)
            noise, slope = noise + part.detach().to(noise), slope + part_slope.to(slope)
        # The logarithm makes steps independent of how far the loss has fallen; a dead site is flat.
        positive = noise.clamp_min(torch.finfo(torch.float64).tiny)
        return self._relative(positive).log(), slope / positive.unsqueeze(1)

    def _relative(self, noise: Tensor) -> Tensor:
        # Without output there is nothing to be relative to; a dead site then has loss 0, as the exact objective says.
        return noise / (self._energy or 1.0)

    def _checked_scales(self, scales: Tensor) -> Tensor:
        plain = self._checked("scales", scales.detach(), (1, self.data.channels), torch.float32)
        if bool((plain <= 0).any()):
            raise InputError("scales", "holds values that are not positive", "use smoothing_scales, which clamps them")
        return plain

    def _checked(self, name: str, values: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if tuple(values.shape) != shape:
            raise InputError(name, f"has shape {tuple(values.shape)}", f"give {shape}")
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"{name} holds NaN or infinity")
        return values.detach().to(self.data.device, dtype)


@torch.no_grad()
def _descend(log_loss: _LogLoss, start: Tensor, low: Tensor, high: Tensor, steps: int, tolerance: float) -> Tensor:
    """Where descent on the closed form ends, (M, P) for the best starts; its maxima grow sharper from stage to stage."""
    if steps < 1:
        raise InputError("steps", f"{steps} is below 1", "use 40 or more")
    point, left = start, steps
    for stage, power in enumerate(POWERS):
        share = -(-left // (len(POWERS) - stage))
        left -= share
        smooth = partial(log_loss, power=power)
        point, value = descend(smooth, point, low, high, steps=share, reach=_REACH, tolerance=tolerance)
        # The form is close to convex, so what starts are still apart in is how far they have come.
        point = point[value.argsort()[: -(-len(point) // 2)]]
    return point


def _through(
    logs_of: Callable[[Tensor], Tensor], theta: Tensor, log_loss: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Log loss (N,) of points (N, P) and its gradient by them, of which log scales are a function; outside a bound it is 0."""
    with torch.enable_grad():
        point = theta.detach().requires_grad_()
        logs = logs_of(point)
    value, slope = log_loss(logs.detach())
    return value, torch.autograd.grad(logs, point, slope)[0]


def _of_all(parts: list[PartRounding]) -> list[Rounding]:
    found: list[Rounding] = []
    for part in parts:
        found += part.weights
        if part.activations is not None:
            found.append(part.activations)
    return found


def _output_energy(data: SiteData) -> float:
    return sum(_part_energy(part) for part in data.parts)


def _part_energy(part: SitePart) -> float:
    output = torch.bmm(columns_by_block(part.x, part.groups), by_block(part.weight, part).mT)
    weight = outputs_by_block(part)
    if weight is not None:
        output.mul_(weight.sqrt().unsqueeze(1))
    if part.row_weight is not None:
        output.mul_(part.row_weight.sqrt().view(1, -1, 1))
    return squared_sum(output)
