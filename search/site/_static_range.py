"""The static range of the winner's activation, judged on held-out rows.

On the rows that were searched on, abs-max never clips and a margin only costs, so only other rows can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.search.config import SearchConfig
from alphasmith.search.site._scorer import HeldOutScorer
from alphasmith.search.site.parametrization import Parametrizations
from alphasmith.search.study.candidates import BASELINES, Candidate

#: Paired standard errors by which a range statistic must beat the winner's on held-out rows.
_CONFIDENCE = 1.0
#: A percentile that leaves this share of the range or more changes nothing worth a look.
_CLIPS = 0.98


@dataclass(frozen=True)
class RangeChoice:
    """The winner's static range.

    Attributes:
        better: The winner under the range statistic that is better on held-out rows; None: it stays as it is.
        losses: (range statistic, held-out loss) of the winner under each; empty where there is nothing to choose.
    """

    better: Candidate | None
    losses: tuple[tuple[str, float], ...]


def choose_range(
    winner: Candidate, frames: Parametrizations, judge: SiteObjective, held_out: HeldOutScorer, search: SearchConfig
) -> RangeChoice:
    """Compare the range statistics that are configured.

    Args:
        winner: The best candidate on the rows that were searched on.
        frames: The site.
        judge: Judge of those rows.
        held_out: Losses on the other ones.
        search: Range statistics, percentile.
    """
    variants = _variants(winner, frames, judge, held_out.judge, search)
    if not variants:
        return RangeChoice(None, ())
    candidates = (winner, *variants)
    scored = {c: loss for c, loss in zip(candidates, held_out.losses(candidates), strict=True) if loss is not None}
    best = min(scored, key=lambda c: scored[c], default=winner)
    better = best != winner and held_out.is_better(best, winner, confidence=_CONFIDENCE)
    return RangeChoice(best if better else None, tuple((c.range, loss) for c, loss in scored.items()))


def _variants(
    winner: Candidate, frames: Parametrizations, judge: SiteObjective, held_out: SiteObjective, search: SearchConfig
) -> Sequence[Candidate]:
    """The winner under every other range statistic that can make a difference on the held-out rows."""
    if not judge.scheme.static or winner.alphas is None or winner.kind in BASELINES:
        return ()
    plain = frames.smoothing(replace(winner, range="absmax"))
    useful = {
        "tail": True,
        "absmax": True,
        "percentile": judge.range_factor(plain, search.range_percentile) < _CLIPS,
        "margin": held_out.range_factor(plain, 100.0) > 1.0,
    }
    return [replace(winner, range=name) for name in search.range if name != winner.range and useful[name]]
