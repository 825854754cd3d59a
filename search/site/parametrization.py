"""Parametrizations of a site (shift, statistic, grouping): from a candidate's numbers to its smoothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.groups import Grouping, group_channels
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.literals import ShiftStatistic
from alphasmith.objectives.quantization.unseen_rows import UnseenClipping
from alphasmith.objectives.smoothing import LogScales, Smoothing, coefficient_map, smoothing_scales
from alphasmith.search.config import GroupsConfig
from alphasmith.search.site.settings import SiteSettings
from alphasmith.search.study.alpha_ranges import AlphaRange, group_ranges
from alphasmith.search.study.candidates import BASELINES, Candidate
from alphasmith.search.study.space import BETA_RANGE, OFFSET_RANGE, SearchSpace

#: (grouping method, channel statistic, shift statistic).
ChoiceKey: TypeAlias = tuple[str, str, str]
#: Parametrization -> alpha range of every group.
Ranges: TypeAlias = Mapping[ChoiceKey, tuple[AlphaRange, ...]]

#: Channels whose shift is below this share of their largest magnitude are as good as centred.
_CENTRED = 0.05


@dataclass(frozen=True, eq=False, kw_only=True)
class Parametrization:
    """One way to look at the channels of a site.

    Attributes:
        grouping: Groups and their magnitudes.
        method: Grouping method.
        statistic: Channel statistic.
        centre: Shift statistic.
        shift: (C,) what is subtracted from every channel; None: nothing.
        activation: (C,) a_j after the shift.
        coefficients: The numbers of a candidate -> log scales.
    """

    grouping: Grouping
    method: str
    statistic: str
    centre: str
    shift: torch.Tensor | None
    activation: torch.Tensor
    coefficients: LogScales

    @property
    def key(self) -> ChoiceKey:
        """What a candidate names it by."""
        return self.method, self.statistic, self.centre

    @property
    def k(self) -> int:
        """Groups, at least 1."""
        return self.coefficients.groups


class Parametrizations(Mapping[ChoiceKey, Parametrization]):
    """All parametrizations of one site for one K, in the order of the configuration. Baselines live in the first one.

    Args:
        data: The site.
        settings: Settings of its search.
        judge: Exact judge of the rows searched on, which knows what ranges they ask for.
        k: Groups asked for.
        groupings: Parametrization -> groups and shift that are settled; None: they are found.
        unseen: Clipping expected of rows that were not seen, where other rows than the judge's set the range.
    """

    def __init__(
        self,
        data: SiteData,
        settings: SiteSettings,
        judge: SiteObjective,
        *,
        k: int,
        groupings: Mapping[ChoiceKey, tuple[Grouping, torch.Tensor | None]] | None = None,
        unseen: UnseenClipping | None = None,
    ) -> None:
        groups, search = settings.groups, settings.search
        self._data = data
        self._settings = settings
        self._judge, self._unseen = judge, unseen or judge.unseen
        self._producer = data.producer_absmax
        self._betas, self._offsets = groups.betas, groups.offsets
        self._frames: dict[ChoiceKey, Parametrization] = {}
        self._smoothings: dict[Candidate, Smoothing] = {}
        if groupings is not None:
            self._frames = {key: self._frame(key, *facts) for key, facts in groupings.items()}
            return
        for centre, shift in _shifts(data, search.shift if settings.shiftable else ("none",)).items():
            for statistic in search.statistic:
                for method in groups.method:
                    activation = data.magnitudes(statistic, shift)
                    grouping = group_channels(
                        activation.cpu(), method=method, k=k, bins=groups.bins, ties=data.ties.cpu()
                    )
                    key = (method, statistic, centre)
                    self._frames[key] = self._frame(key, grouping, shift)

    def __getitem__(self, key: ChoiceKey) -> Parametrization:
        return self._frames[key]

    def __iter__(self) -> Iterator[ChoiceKey]:
        return iter(self._frames)

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def base(self) -> Parametrization:
        """Where baselines live."""
        return next(iter(self._frames.values()))

    @property
    def k(self) -> int:
        """Largest K of any frame: the alphas of a candidate."""
        return max(frame.k for frame in self._frames.values())

    def with_k(self, k: int) -> Parametrizations:
        """The same site in another number of groups."""
        return Parametrizations(self._data, self._settings, self._judge, k=k)

    def refitted(self, data: SiteData) -> Parametrizations:
        """The same groups with the statistics, the shifts and the ranges of other rows of the site.

        Args:
            data: The site with these rows.
        """
        unseen = UnseenClipping(data, self._settings.scheme)
        shifts = {centre: _shift(data, centre) for _, _, centre in self}
        groupings = {key: (frame.grouping, shifts[frame.centre]) for key, frame in self.items()}
        return Parametrizations(data, self._settings, self._judge, k=self.k, groupings=groupings, unseen=unseen)

    def ranges(self, best_single: float) -> Ranges:
        """Alpha ranges that hold the best single alpha, see :func:`ranges_of`."""
        groups, rho = self._settings.groups, self._settings.rho
        return {key: ranges_of(frame.grouping, groups, rho, best_single) for key, frame in self.items()}

    def space(self, ranges: Ranges) -> SearchSpace:
        """What a sampler searches: every number inside the ranges of all parametrizations, and the parametrization; the range is chosen later."""
        return SearchSpace.of(
            _hull(list(ranges.values())),
            betas=self._betas,
            offsets=self._offsets,
            choices=self.choices(),
            recorded={"range": self._settings.search.range},
        )

    def choices(self) -> dict[str, tuple[str, ...]]:
        """What a study chooses among, by parameter name."""
        methods, statistics, shifts = (tuple(dict.fromkeys(part)) for part in zip(*self._frames, strict=True))
        return {"grouping": methods, "statistic": statistics, "shift": shifts}

    def of(self, candidate: Candidate) -> Parametrization:
        """The parametrization a candidate names; where there is no choice it need not name any."""
        method, statistic, centre = self.base.key
        key = (candidate.grouping or method, candidate.statistic or statistic, candidate.shift)
        return self._frames.get(key) or self._frames[key[0], key[1], centre]

    def named(self, frame: Parametrization) -> dict[str, Any]:
        """The fields of a candidate that name ``frame``, where there is a choice."""
        values = {"grouping": frame.method, "statistic": frame.statistic, "shift": frame.centre}
        return {name: values[name] for name, choice in self.choices().items() if len(choice) > 1}

    def reusable(self) -> Candidate | None:
        """The winner of an earlier search in these parametrizations; None where it does not fit or a baseline says the same."""
        old, ranges = self._settings.reused, self._settings.search.range
        if old is None or old.alphas is None or old.kind in BASELINES or old.range not in ranges:
            return None
        if (bool(old.betas), bool(old.offsets), len(old.alphas)) != (self._betas, self._offsets, self.k):
            return None
        frame = self.of(old)
        if (old.grouping or frame.method, old.statistic or frame.statistic, old.shift) != frame.key:
            return None
        return replace(Candidate("reused", old.alphas, old.betas, old.offsets, range=old.range), **self.named(frame))

    def theta(self, candidate: Candidate) -> torch.Tensor:
        """(P,) float64 numbers of a candidate that has alphas, in the order of its parametrization's coefficients."""
        k = self.of(candidate).k
        alphas = list(candidate.alphas or ())[:k]
        betas = (list(candidate.betas)[:k] or [1 - a for a in alphas]) if self._betas else []
        offsets = (list(candidate.offsets)[:k] or [0.0] * k) if self._offsets else []
        return torch.tensor([*alphas, *betas, *offsets], dtype=torch.float64, device=self._data.device)

    def box(self, frame: Parametrization, ranges: Sequence[AlphaRange]) -> tuple[torch.Tensor, torch.Tensor]:
        """(P,) bounds of the numbers of a parametrization whose alphas have these ranges."""
        others = [BETA_RANGE] * self._betas + [OFFSET_RANGE] * self._offsets
        bounds = [(r.low, r.high) for r in ranges] + [pair for pair in others for _ in range(frame.k)]
        low, high = torch.tensor(bounds, dtype=torch.float64, device=self._data.device).unbind(1)
        return low, high

    def start(self, frame: Parametrization, alpha: float) -> torch.Tensor:
        """(P,) numbers of one alpha for every channel of ``frame``: formula fA1 without extensions."""
        blocks = [alpha] + [1 - alpha] * self._betas + [0.0] * self._offsets
        values = torch.tensor(blocks, dtype=torch.float64, device=self._data.device)
        return values.repeat_interleave(frame.k)

    def project(self, frame: Parametrization, scales: torch.Tensor) -> torch.Tensor:
        """(P,) numbers of ``frame`` whose log scales come nearest to those of ``scales`` (C,), least squares per group."""
        logs = scales.to(torch.float64).log() - frame.coefficients.constant
        theta = torch.zeros(frame.coefficients.features.shape[0], frame.k, dtype=torch.float64, device=scales.device)
        for k in range(frame.k):
            mine = frame.coefficients.labels == k
            features = frame.coefficients.features[:, mine].T
            # A group of equal channels leaves alpha and offset undetermined: the smallest numbers will do.
            theta[:, k] = torch.linalg.pinv(features) @ logs[mine]
        return theta.flatten()

    def candidate(self, template: Candidate, frame: Parametrization, theta: torch.Tensor) -> Candidate:
        """The candidate with these numbers (P,) in ``frame``; groups beyond its own repeat the last one."""
        numbers = theta.unflatten(0, (-1, frame.k)).tolist()
        padded = [tuple(row + row[-1:] * (self.k - frame.k)) for row in numbers]
        betas = padded[1] if self._betas else ()
        offsets = padded[-1] if self._offsets else ()
        return Candidate(template.kind, padded[0], betas, offsets, range=template.range, **self.named(frame))

    def single(self, alpha: float) -> Smoothing:
        """One alpha for every channel, in the base parametrization, without betas and offsets."""
        return Smoothing(scales=self._scales(self.base, alpha), shift=self.base.shift)

    def smoothing(self, candidate: Candidate) -> Smoothing:
        """What a candidate does to the site."""
        known = self._smoothings.get(candidate)
        if known is None:
            known = self._smoothings[candidate] = self._smoothing(candidate)
        return known

    def _smoothing(self, candidate: Candidate) -> Smoothing:
        frame = self.of(candidate)
        if candidate.alphas is None:  # no smoothing at all, whatever shift is configured
            plain = Smoothing(scales=torch.ones_like(frame.activation))
        elif len(set(candidate.alphas)) == 1 and not candidate.betas and not any(candidate.offsets):
            # One alpha for all is formula fA1 itself, to the bit, whatever coefficients are searched.
            plain = Smoothing(scales=self._scales(frame, candidate.alphas[0]), shift=frame.shift)
        else:
            plain = Smoothing(scales=frame.coefficients.scales(self.theta(candidate)), shift=frame.shift)
        match candidate.range:
            case "absmax":
                return plain
            case "margin":
                factor = self._settings.search.range_margin
            case "percentile":
                factor = self._judge.range_factor(plain, self._settings.search.range_percentile)
            case "tail":
                factor = self.tail_factor(plain)
        return Smoothing(scales=plain.scales, shift=plain.shift, range_factor=factor)

    def tail_factor(self, smoothing: Smoothing) -> float:
        """Range factor at which rounding and the clipping of unseen rows cost least together."""
        return 1.0 if self._unseen is None else self._unseen.best_factor(smoothing)

    def slopes(self, candidate: Candidate) -> torch.Tensor:
        """d log s / d alpha (C,): that of a^alpha alone where the candidate has betas, else of a^alpha / w^(1 - alpha)."""
        frame = self.of(candidate)
        of_alpha = frame.coefficients
        if not candidate.betas:
            of_alpha = coefficient_map(
                frame.activation,
                self._data.weight_absmax,
                frame.grouping.labels,
                ties=self._data.ties,
                producer=self._producer,
            )
        return of_alpha.features[0] if of_alpha.neutral is None else of_alpha.neutral.follow(of_alpha.features[0])

    def _frame(self, key: ChoiceKey, grouping: Grouping, shift: torch.Tensor | None) -> Parametrization:
        method, statistic, centre = key
        data, groups = self._data, self._settings.groups
        activation = data.magnitudes(statistic, shift)
        coefficients = coefficient_map(
            activation,
            data.weight_absmax,
            grouping.labels,
            ties=data.ties,
            betas=groups.betas,
            offsets=groups.offsets,
            producer=self._producer,
        )
        return Parametrization(
            grouping=grouping,
            method=method,
            statistic=statistic,
            centre=centre,
            shift=shift,
            activation=activation,
            coefficients=coefficients,
        )

    def _scales(self, frame: Parametrization, alpha: float) -> torch.Tensor:
        """(C,) scales of one alpha for every channel of ``frame``."""
        weight, ties = self._data.weight_absmax, self._data.ties
        return smoothing_scales(frame.activation, weight, alpha, ties, producer=self._producer)


def ranges_of(grouping: Grouping, groups: GroupsConfig, rho: float, best_single: float) -> tuple[AlphaRange, ...]:
    """Alpha range of every group; k-means groups magnitudes by logarithm, so its positions are logarithmic, too.

    Unless ``groups.ranges`` is ``strict``, ranges are widened to hold the best single alpha: they are good defaults, not
    laws (trap T3), and a grouped search that cannot come near the best single alpha seldom beats it.
    """
    ranges = group_ranges(
        grouping.values.tolist(),
        rho=rho,
        scale="log" if grouping.method == "kmeans" else "linear",
        kind="wide" if groups.ranges == "wide" else "magnitude",
    )
    if groups.ranges == "strict":
        return ranges
    # Scarce hardware raised the low ends on purpose: then only the high ends give way.
    return tuple(r.holding(best_single if rho == 0 else max(best_single, r.low)) for r in ranges)


def _hull(ranges: Sequence[Sequence[AlphaRange]]) -> tuple[AlphaRange, ...]:
    """The ranges of a study that chooses among frames: group k of any parametrization fits into range k."""
    longest = max(ranges, key=len)
    result = []
    for k, first in enumerate(longest):
        others = [r[min(k, len(r) - 1)] for r in ranges]
        low, high = min(r.low for r in others), max(r.high for r in others)
        result.append(replace(first, low=low, high=high))
    return tuple(result)


def _shifts(data: SiteData, statistics: Sequence[ShiftStatistic]) -> dict[str, torch.Tensor | None]:
    """Shift statistic -> (C,); where there is a choice, statistics that leave every channel where it is are left out."""
    peaks = data.input_range.peaks()
    shifts: dict[str, torch.Tensor | None] = {}
    for name in statistics:
        shift = _shift(data, name)
        if shift is None or len(statistics) == 1 or bool((shift.abs() > _CENTRED * peaks).any()):
            shifts[name] = shift
    return shifts or {"none": None}


def _shift(data: SiteData, statistic: str) -> torch.Tensor | None:
    """(C,) what a shift statistic subtracts from every channel; None: nothing."""
    if statistic == "none":
        return None
    return data.mean() if statistic == "mean" else data.input_range.middle(data.ties)
