"""The per-channel limit of a site: how low its loss goes when every channel has its own scale.

Every report shows where a site stands between its best single alpha and this limit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.noise.model import NoiseModel
from alphasmith.objectives.smoothing import Smoothing


@dataclass(frozen=True, eq=False)
class Limit:
    """The best scales found without alphas.

    Attributes:
        smoothing: Those scales, equal within ties, with the shift and the range of the start.
        loss: Their exact loss on all rows. A floor in practice, not a proof: it is found by descent on the noise model.
    """

    smoothing: Smoothing
    loss: float


def per_channel_limit(
    objective: SiteObjective, model: NoiseModel, start: Smoothing, *, start_loss: float | None = None, steps: int = 60
) -> Limit:
    """Optimise every scale on the noise model and judge the outcome exactly; the better of outcome and start.

    Costs one exact evaluation, two where the loss of the start is not given.

    Args:
        objective: The exact judge of the site.
        model: Noise model of the same site and scheme, for the shift and the range of ``start``.
        start: Scales that respect the site's ties, best the best found so far.
        start_loss: Its exact loss, where it is known.
        steps: Steps of the descent, at least 1.

    Raises:
        InputError: The start does not fit the site, or ``steps`` is below 1.
        NonFiniteError: A scale or a loss is NaN or infinite.
    """
    free = replace(start, scales=model.limit_scales(start.scales, steps))
    free_loss = objective.loss(free)
    start_loss = objective.loss(start) if start_loss is None else start_loss
    return Limit(free, free_loss) if free_loss < start_loss else Limit(start, start_loss)
