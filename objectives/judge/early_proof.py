"""Proof before the search: sites are folded by random scales, and those that change the model are left alone.

Discovery proves folds on the one call that it traced. What another batch does (a branch, a loop over experts) may differ, and
shows here, on batches of their own, instead of after the search.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from alphasmith.objectives.errors import EquivalenceError
from alphasmith.objectives.judge.equivalence import (
    ALL_SITES,
    FLOAT64_LIMIT,
    Difference,
    References,
    compare,
    references_of,
)
from alphasmith.objectives.media.batch import CALL_ERRORS, Batch
from alphasmith.objectives.quantization.plan import named_tensors
from alphasmith.objectives.sites.folding import fold
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing

#: Scales are drawn between 1 / _SPAN and _SPAN.
_SPAN = 4.0
#: Standard deviation of drawn shifts.
_SHIFT = 0.1
#: Relative errors up to here are those of rounding weights to float32, and no site's fault.
_ROUNDING = 1e-5
#: Weights that are kept while they are folded for a try [bytes]; sites with more are tried in parts.
_PART = 1024**3


def proven_sites(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    *,
    tolerance: float,
    shift: bool = True,
    seed: int = 0,
    float64_bytes: int = FLOAT64_LIMIT,
    part_bytes: int = _PART,
) -> tuple[Site, ...]:
    """The sites, those whose fold changes what the model answers left alone with the reason.

    All sites are folded at once, by the code that folds the winners; where that changes an output, halves of them are tried until
    the sites at fault are found. Where only a shift does, the site keeps its scales, and its shift stays in the quantizer.

    Args:
        model: The float model; folded for a try and restored bit for bit.
        sites: Its sites.
        batches: A few samples of different batches, on its device.
        tolerance: Largest relative output error allowed.
        shift: Whether shifts are searched, so that their folds have to be proven too.
        seed: Of the drawn scales.
        float64_bytes: See ``equivalence.prove``.
        part_bytes: Weights kept at a time while they are folded [bytes].

    Raises:
        EquivalenceError: The tolerance is below the rounding of float32, or sites change the model together and none alone.
        NonFiniteError: The model returns NaN or infinity.
    """
    foldable = [site for site in sites if site.mode == "fold"]
    if not foldable:
        return tuple(sites)
    trial = _Trial(model, references_of(model, batches, float64_bytes=float64_bytes), tolerance, seed)
    tried = [site if shift else replace(site, shift_edits=()) for site in foldable]
    faults: dict[str, Difference] = {}
    for part in _parts(model, tried, part_bytes):
        faults |= trial.faults(part)
    # Scales are more than shifts: a site may keep them where its shift is at fault.
    plain = [replace(site, shift_edits=()) for site in foldable if site.name in faults and site.shift_edits]
    without_shift = {site.name: site for site in plain if shift and not trial.faults([site])}
    return tuple(
        site if site.name not in faults else without_shift.get(site.name, _left(site, faults[site.name]))
        for site in sites
    )


def _left(site: Site, fault: Difference) -> Site:
    changed = f"changes {fault.output} by {fault.error:.2g}" if math.isfinite(fault.error) else "breaks the model"
    reason = f"folding it {changed} on batches other than the traced one"
    return replace(
        site, mode="left", reason=reason, ties=torch.arange(site.channels), edits=(), producers=(), shift_edits=()
    )


class _Trial:
    """Folds sites of a model for a try."""

    def __init__(self, model: nn.Module, references: References, tolerance: float, seed: int) -> None:
        self._model = model
        self._references = references
        self._tolerance = tolerance
        self._seed = seed

    def faults(self, sites: Sequence[Site]) -> dict[str, Difference]:
        """The sites at fault among some, and what each does to the model alone."""
        found = self._error(sites)
        if found.error <= self._tolerance:
            return {}
        if found.error <= _ROUNDING:
            raise EquivalenceError(ALL_SITES, found.error, self._tolerance, output=found.output)
        if len(sites) == 1:
            return {sites[0].name: found}
        middle = len(sites) // 2
        faults = self.faults(sites[:middle]) | self.faults(sites[middle:])
        rest = [site for site in sites if site.name not in faults]
        if rest and (found if not faults else self._error(rest)).error > self._tolerance:
            raise EquivalenceError(ALL_SITES, found.error, self._tolerance, output=found.output)
        return faults

    def _error(self, sites: Sequence[Site]) -> Difference:
        smoothings = {site.name: _drawn(site, self._seed + number) for number, site in enumerate(sites)}
        with _folded(self._model, sites, smoothings):
            try:
                return compare(self._model, self._references)
            except CALL_ERRORS:
                return Difference(error=math.inf, batch=0, output="the call")


def _drawn(site: Site, seed: int) -> Smoothing:
    """Log-uniform scales, and a shift where it folds; one value per tie."""
    generator = torch.Generator().manual_seed(seed)
    _, tie = torch.unique(site.ties.cpu(), return_inverse=True)
    free = torch.rand(int(tie.max()) + 1, generator=generator)
    moved = torch.randn(int(tie.max()) + 1, generator=generator)
    scales = torch.exp((2 * free - 1) * math.log(_SPAN))
    return Smoothing(scales=scales[tie], shift=_SHIFT * moved[tie] if site.shift_edits else None)


@contextmanager
def _folded(model: nn.Module, sites: Sequence[Site], smoothings: Mapping[str, Smoothing]) -> Iterator[None]:
    """The model with sites folded inside a ``with`` block, its own bits after it."""
    tensors = named_tensors(model)
    kept = {name: tensors[name].detach().clone() for name in _edited(sites)}
    try:
        for site in sites:
            fold(model, site, smoothings[site.name])
        yield
    finally:
        with torch.no_grad():
            for name, original in kept.items():
                tensors[name].copy_(original)


def _edited(sites: Sequence[Site]) -> set[str]:
    """Names of the tensors that folding sites writes to."""
    scaled = {edit.parameter for site in sites for edit in site.edits}
    return scaled | {edit.parameter for site in sites for edit in site.shift_edits}


def _parts(model: nn.Module, sites: Sequence[Site], most: int) -> Iterator[list[Site]]:
    """Consecutive sites whose edited tensors together take at most ``most`` bytes, or one site."""
    tensors = named_tensors(model)
    part: list[Site] = []
    for site in sites:
        if part and sum(tensors[name].nbytes for name in _edited([*part, site])) > most:
            yield part
            part = []
        part.append(site)
    if part:
        yield part
