"""Results of searches as the storage keeps them: one site's record, its groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from alphasmith.objectives.sensitivity.output_shares import OutputShares
from alphasmith.objectives.sites.types import Site
from alphasmith.search.site.result import SiteResult
from alphasmith.search.study.alpha_ranges import AlphaRange
from alphasmith.storage.runs.entries import Group, LossPair, SiteRecord


class GroupedResult(Protocol):
    """What a search found for each of K groups: of a site, or of the whole model."""

    @property
    def ranges(self) -> Sequence[AlphaRange]: ...
    @property
    def alphas(self) -> Sequence[float] | None: ...
    @property
    def magnitudes(self) -> Sequence[float]: ...


def site_record(
    site: Site, position: int, result: SiteResult | None = None, shares: OutputShares | None = None
) -> SiteRecord:
    """The record of a site.

    Args:
        site: The site.
        position: Its place in forward order, from 0.
        result: What was found; None where nothing was searched.
        shares: What the sites add to the error of the model's output; None: not known yet.
    """
    known: dict[str, Any] = {}
    if result is not None:
        sizes = result.labels.bincount(minlength=len(result.ranges)).tolist()
        known = {
            "losses": LossPair(search=result.search, held_out=result.held_out),
            "winner": result.winner,
            "trials": len(result.results),
            "exact_evaluations": result.exact_evaluations,
            "seconds": result.seconds,
            "study": result.study_name,
            "groups": group_records(result, sizes, betas=result.candidate.betas, offsets=result.candidate.offsets),
            "shift": result.smoothing.shift is not None,
            "range_statistic": result.candidate.range,
            "range_factor": result.smoothing.range_factor,
            "grouping": result.grouping,
            "statistic": result.statistic,
            "facts": result.facts,
        }
    return SiteRecord(
        name=site.name,
        position=position,
        mode=site.mode,
        reason=site.reason,
        channels=site.channels,
        operators=tuple(o.name for o in site.operators),
        kind=", ".join(sorted({o.kind for o in site.operators})),
        share=None if shares is None else shares.share(site.name),
        share_measured=None if shares is None else shares.share_measured(site.name),
        **known,
    )


def group_records(
    result: GroupedResult, sizes: Sequence[int], betas: Sequence[float] = (), offsets: Sequence[float] = ()
) -> tuple[Group, ...]:
    """The groups of a result.

    Args:
        result: Of a site or of the whole model.
        sizes: Channels of each of the K groups.
        betas: Exponent of the weights, per group; empty: 1 - alpha.
        offsets: Natural logarithm of the group's own factor, per group; empty: none.
    """
    return tuple(
        Group(
            index=k,
            size=size,
            low=bounds.low,
            high=bounds.high,
            alpha=None if result.alphas is None else result.alphas[k],
            magnitude=result.magnitudes[k],
            explanation=bounds.explanation,
            beta=betas[k] if betas else None,
            offset=offsets[k] if offsets else None,
        )
        for k, (size, bounds) in enumerate(zip(sizes, result.ranges, strict=True))
    )
