"""The per-channel limit of a site: how low its loss goes when every channel has a scale of its own.

Every report shows where a site stands between its best single alpha and this limit. Source: architecture notes, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alphasmith.objectives.noise import NoiseModel
from alphasmith.objectives.site_objective import SiteObjective


@dataclass(frozen=True, eq=False)
class Limit:
    """The best scales found without alphas.

    Attributes:
        scales: (C,) float32, equal within ties.
        loss: Their exact loss on all rows. A floor in practice, not a proof: it is found by descent on the noise model.
    """

    scales: Tensor
    loss: float


def per_channel_limit(objective: SiteObjective, model: NoiseModel, start_scales: Tensor, steps: int = 200) -> Limit:
    """Optimise every scale on the noise model and judge the outcome exactly; the better of outcome and start.

    Costs two exact evaluations.

    Args:
        objective: The exact judge of the site.
        model: Noise model of the same site and scheme.
        start_scales: (C,) positive scales that respect the site's ties, best those of the best single alpha.
        steps: Gradient steps, at least 1.

    Raises:
        InputError: ``start_scales`` is not (C,) and positive, or ``steps`` is below 1.
        NonFiniteError: A scale or a loss is NaN or infinite.
    """
    free = model.limit_scales(start_scales, steps)
    free_loss, start_loss = objective.loss(free), objective.loss(start_scales)
    return Limit(free, free_loss) if free_loss < start_loss else Limit(start_scales, start_loss)
