"""How many groups a site gets where K is ``auto``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.site._noise_report import Surrogate
from alphasmith.search.site.parametrization import Parametrizations
from alphasmith.search.study.candidates import Candidate

#: K that ``auto`` tries, in this order, while held-out loss falls.
_GROWING = (1, 2, 4, 8, 16)
#: K where there is no noise model to compare several with.
_DEFAULT = 4


@dataclass(frozen=True, eq=False)
class GroupCount:
    """The number of groups of a site.

    Attributes:
        frames: The site in as many groups.
        tried: K that were compared; empty when K was given.
    """

    frames: Parametrizations
    tried: tuple[int, ...] = ()


def choose_group_count(
    frames: Parametrizations, surrogate: Surrogate, single: float, held_out: Callable[[], SiteObjective]
) -> GroupCount:
    """Keep the first K whose successor does not lower the held-out loss by more than its paired standard error.

    Args:
        frames: The site, in any number of groups.
        surrogate: Proposes a candidate for every K.
        single: The best single alpha.
        held_out: Makes the judge of the held-out rows, or returns the one it made.
    """
    looks: list[tuple[int, Parametrizations, Smoothing]] = []
    for k in _GROWING:
        if k > len(frames.base.activation) or (looks and looks[-1][1].k < looks[-1][0]):
            break  # the channels do not support as many
        frames = frames.with_k(k)
        if (proposal := _proposal(frames, surrogate, single)) is None:
            break
        looks.append((k, frames, frames.smoothing(proposal)))
    if not looks:
        return GroupCount(frames.with_k(_DEFAULT))
    judge = held_out()
    batch = judge.batch([smoothing for _, _, smoothing in looks])
    batch.advance(judge.rows)
    kept = 0
    for i in range(1, len(looks)):
        mean, deviation = batch.paired(kept, i)
        if batch.failure(i) or mean <= deviation:
            break
        kept = i
    return GroupCount(looks[kept][1], tuple(k for k, _, _ in looks))


def _proposal(frames: Parametrizations, surrogate: Surrogate, single: float) -> Candidate | None:
    ranges = frames.ranges(single)
    proposals = surrogate.ask(lambda p: p.propose(frames, ranges, single, beyond=False))
    return proposals[0] if proposals else None
