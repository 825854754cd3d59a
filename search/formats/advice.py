"""What another format at the few sites that make most of the error would bring: one candidate model, scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from alphasmith.objectives.errors import NonFiniteError
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.literals import SiteFormat, Target
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.formats import format_of, is_dearer, served
from alphasmith.objectives.sensitivity.multiply_adds import multiply_adds, shares_of
from alphasmith.objectives.sensitivity.output_shares import OutputShares
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.formats._plans import schemes_of

#: The sites that make this part of the error are few where they are at most that part of all sites.
_MOST_OF_IT, _FEW = 1 / 2, 1 / 4


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What was tried at few sites, and what it brings. Losses are of the output on held-out batches.

    Attributes:
        sites: The fewest sites that make half of the predicted output error, the largest share first.
        of: Sites whose share is known.
        share: Part of that error that they make, 0 to 1.
        format: What they were given: the cheapest that is dearer than the scheme's own and that the target serves.
        before: Loss with the scheme's own.
        after: Loss with that format at these sites.
        share_of_macs: Part of the multiply-adds of quantized sites that these sites do.
    """

    sites: tuple[str, ...]
    of: int
    share: float
    format: SiteFormat
    before: float
    after: float
    share_of_macs: float


def advise(
    candidate: CandidateModel,
    smoothings: Mapping[str, Smoothing],
    shares: OutputShares,
    reserve: ModelObjective,
    sample: Batch,
    *,
    before: float | None,
    target: Target,
) -> Advice | None:
    """Score one candidate model in which the few sites that make half of the predicted error have the next dearer format.

    Args:
        candidate: The model; the float one afterwards.
        smoothings: What is kept, site by site.
        shares: What every site adds to the error of the output.
        reserve: Loss at the output on held-out batches.
        sample: What multiply-adds are counted on.
        before: Loss with the scheme's own format at every site; None: not finite.
        target: What will serve the model.

    Returns:
        None where activations are not quantized, no share is known, many sites make the error, or the loss is not finite.
    """
    schemes = candidate.schemes
    scheme, fixed = schemes.default, dict(schemes.others)
    own = format_of(scheme)
    if own is None or before is None:
        return None
    dearer = [name for name in served(target, scheme) if is_dearer(name, own)]
    known = {name: share for name in shares.sites if (share := shares.share(name)) is not None}
    if not dearer or not known:
        return None
    largest = sorted((name for name in known if name not in fixed), key=lambda name: -known[name])
    few: list[str] = []
    while largest and sum(known[name] for name in few) < _MOST_OF_IT:
        few.append(largest.pop(0))
    if sum(known[name] for name in few) < _MOST_OF_IT or len(few) > _FEW * len(known):
        return None
    try:
        with candidate.using(schemes_of(schemes, dict.fromkeys(few, dearer[0]))):
            after = reserve.loss(smoothings)
    except NonFiniteError:
        return None
    work = multiply_adds(candidate.reset(), candidate.sites, sample)
    parts = shares_of({name: work[name] for name in known})
    return Advice(
        sites=tuple(few),
        of=len(known),
        share=sum(known[name] for name in few),
        format=dearer[0],
        before=before,
        after=after,
        share_of_macs=sum(parts[name] for name in few),
    )
