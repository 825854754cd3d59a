"""The beginning of a search: the noise model, a first proposal, the best single alpha, the number of groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.search.site._group_count import choose_group_count
from alphasmith.search.site._noise_report import Surrogate
from alphasmith.search.site._scorer import SiteScorer
from alphasmith.search.site.parametrization import Parametrizations
from alphasmith.search.site.settings import SiteSettings
from alphasmith.search.study.alpha_ranges import DEFAULT_ALPHA
from alphasmith.search.study.candidates import Candidate, baselines, best_single_alpha

#: Step of the exact search for the best single alpha around the predicted one.
_ALPHA_STEP = 0.05


@dataclass(frozen=True, eq=False, kw_only=True)
class Opening:
    """What is known of a site before its study begins.

    Attributes:
        frames: Ways to look at it, in the groups that are searched.
        scorer: Exact losses, those of ``lead`` known where it was scored already.
        surrogate: The noise model.
        lead: A first proposal, or the winner of an earlier search.
        single: The best single alpha.
        grid: [alpha, loss] that were looked at for it.
        baselines: The first candidates of every study.
        k_tried: K that were compared; empty when K was given.
    """

    frames: Parametrizations
    scorer: SiteScorer
    surrogate: Surrogate
    lead: Candidate | None
    single: float
    grid: list[list[float]]
    baselines: list[Candidate]
    k_tried: tuple[int, ...] = ()


def open_site(
    data: SiteData,
    settings: SiteSettings,
    judge: SiteObjective,
    held_out: Callable[[], SiteObjective],
    *,
    start: float,
) -> Opening:
    """Make a first proposal, find the best single alpha, then K where it is ``auto``.

    Args:
        data: Search rows of the site.
        settings: What to try.
        judge: Exact judge on the search rows.
        held_out: Makes the judge of the held-out rows, or returns the one it made.
        start: When the search began, by ``time.perf_counter``.
    """
    k, search = settings.groups.k, settings.search
    frames = Parametrizations(data, settings, judge, k=1 if k == "auto" else k)
    surrogate = Surrogate(data, settings, frames, judge)
    scorer = SiteScorer(judge, frames.smoothing, start=start)
    lead = None if k == "auto" else _lead(frames, surrogate, scorer)
    single, grid = _best_single(frames, surrogate, judge, rows=scorer.rungs[0], points=search.single_alphas)
    tried: tuple[int, ...] = ()
    if k == "auto":
        count = choose_group_count(frames, surrogate, single, held_out)
        frames, tried = count.frames, count.tried
        scorer, lead = SiteScorer(judge, frames.smoothing, start=start), frames.reusable()
    return Opening(
        frames=frames,
        scorer=scorer,
        surrogate=surrogate,
        lead=lead,
        single=single,
        grid=grid,
        baselines=[replace(c, range=search.range[0]) for c in baselines(frames.k, single)],
        k_tried=tried,
    )


def _lead(frames: Parametrizations, surrogate: Surrogate, scorer: SiteScorer) -> Candidate | None:
    """A quick proposal, scored before anything else: what follows has an incumbent to lose against.

    The winner of an earlier search at this site is a better one and costs nothing.
    """

    def holds(candidate: Candidate) -> bool:
        return scorer.score([candidate], protected=1, pruning=None)[0].state == "COMPLETE"

    known = frames.reusable()
    if known is not None and holds(known):
        return known
    lead = surrogate.ask(lambda p: p.lead(frames, frames.ranges(DEFAULT_ALPHA)))
    return lead if lead is not None and holds(lead) else None


def _best_single(
    frames: Parametrizations, surrogate: Surrogate, judge: SiteObjective, *, rows: int, points: int
) -> tuple[float, list[list[float]]]:
    """The best single alpha and the [alpha, loss] that were looked at.

    The noise model finds it; exact losses on the first ``rows`` rows walk on from there while a neighbour is better. Without
    a noise model, and where products saturate, whose losses have several minima along alpha: a grid of ``points`` exact losses on all rows.
    """
    predicted = None if judge.scheme.saturates else surrogate.ask(lambda p: p.single_alpha(frames))
    if predicted is None:
        return best_single_alpha(lambda alpha: judge.loss(frames.single(alpha)), points)
    known: dict[float, float] = {}
    best, centre = round(predicted, 9), math.nan
    while best != centre:
        centre = best
        near = (centre, round(centre - _ALPHA_STEP, 9), round(centre + _ALPHA_STEP, 9))
        new = [a for a in near if 0.0 <= a <= 1.0 and a not in known]
        batch = judge.batch([frames.single(a) for a in new])
        batch.advance(rows)
        known |= {a: math.inf if (loss := batch.loss(i)) is None else loss for i, a in enumerate(new)}
        best = min(known, key=lambda a: (known[a], a))
    return best, [[a, loss] for a, loss in sorted(known.items()) if math.isfinite(loss)]
