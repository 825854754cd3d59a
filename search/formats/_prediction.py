"""What every site would add to the loss at the model's output in every format. Formula fA18."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.literals import SiteFormat
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.formats import scheme_of, step_of
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.sensitivity.multiply_adds import multiply_adds, shares_of
from alphasmith.objectives.sensitivity.rival_contributions import rival_contributions
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.budget import BudgetConfig
from alphasmith.search.formats._plans import Choices
from alphasmith.search.formats._program import Plan, Program
from alphasmith.search.inputs.format_cost import SiteShape, format_cost
from alphasmith.search.inputs.hardware import HardwareBudget

#: Samples that contributions are predicted from.
SAMPLES = 16
#: Forward calls that a backward pass through the model counts for.
_BACKWARD = 2
#: Among formats that a budget counts alike the cheaper is taken, unless a step to a dearer one at every site would take more than this
#: share of the loss away.
_STEP_WORTH = 0.002


@dataclass(frozen=True, eq=False, kw_only=True)
class Predicted:
    """What is known before any choice is measured.

    Attributes:
        choices: Sites and formats.
        contributions: (S, F) what a site adds to the output loss in each format.
        program: The same with costs, and a preference for the cheaper of formats that a budget counts alike.
        samples: Samples run through the model or its operators for it.
    """

    choices: Choices
    contributions: np.ndarray
    program: Program
    samples: float

    def loss(self, plan: Plan) -> float:
        """Sum of the contributions of a plan."""
        return float(self.contributions[np.arange(len(plan)), list(plan)].sum())


def predict(
    candidate: CandidateModel,
    smoothings: Mapping[str, Smoothing],
    judge: ModelObjective,
    schemes: SiteSchemes,
    own: SiteFormat,
    formats: Sequence[SiteFormat],
    budget: BudgetConfig,
    hardware: HardwareBudget,
    *,
    seed: int,
    memory: int | None,
    step: Callable[[], None],
) -> Predicted | None:
    """Contributions of all sites under all formats, in as few passes as memory allows. Source: formula fA18, which sums those of fA9.

    Args:
        candidate: The model; the float one afterwards.
        smoothings: What is kept, site by site.
        judge: The loss at the output and its batches; the first samples are used.
        schemes: The model's own; sites that it names have no choice.
        own: Format of all others.
        formats: Formats of a site, from the cheapest to the dearest.
        budget: What formats cost.
        hardware: The target, where times follow from it.
        seed: Of the random projections.
        memory: Most bytes beside the float model; None: no bound.
        step: Called before every sample; may raise to leave.

    Returns:
        None where no site has a contribution that is known in every format.
    """
    model = candidate.reset()
    available = sum(batch.size for batch in judge.batches)
    samples = min(SAMPLES, available)
    asked = [name for name in formats if name != "float"]
    found = _contributions(candidate, smoothings, judge, schemes.default, asked, seed, memory, step)
    ran = samples * (1 + _BACKWARD + len(asked)) + 1.0
    fixed = dict(schemes.others)
    free = [site.name for site in candidate.sites if site.name not in fixed]
    known = [site for site in free if asked and all(site in found[name] for name in asked)]
    if not known:
        return None
    work = multiply_adds(model, candidate.sites, judge.batches[0].narrow(0, 1))
    shares = shares_of({name: work[name] for name in known})
    choices = Choices(schemes=schemes, own=own, formats=tuple(formats), sites=tuple(known), shares=shares)
    contributions = np.array([[found[name][site] if name in found else 0.0 for name in formats] for site in known])
    parts = np.array([[shares[site]] for site in known])
    if budget.by_hardware:
        costs = _times(candidate, choices, work, hardware)
    else:
        costs = parts * np.array([[budget.cost(name, own) for name in formats]])
    steps = np.array([[float(step_of(name)) for name in formats]])
    worth = 0.0 if budget.timed else _STEP_WORTH * float(contributions.max(axis=1).sum())
    program = Program(contributions + worth * parts * steps, costs)
    return Predicted(choices=choices, contributions=contributions, program=program, samples=ran)


def _times(
    candidate: CandidateModel, choices: Choices, work: Mapping[str, int], hardware: HardwareBudget
) -> np.ndarray:
    """(S, F) time of every site in every format for one sample, over that of all sites in the scheme's own. Source: formula fA19."""
    sites = {site.name: site for site in candidate.sites}
    shapes = [SiteShape.of(sites[name], max(1, work[name] // sites[name].weight_count)) for name in choices.sites]

    def amounts(name: SiteFormat) -> list[float]:
        scheme = scheme_of(name, choices.schemes.default)
        return [format_cost(shape, scheme, hardware).amount for shape in shapes]

    found: np.ndarray = np.array([amounts(name) for name in choices.formats]).T / sum(amounts(choices.own))
    return found


def _contributions(
    candidate: CandidateModel,
    smoothings: Mapping[str, Smoothing],
    judge: ModelObjective,
    scheme: Scheme,
    formats: Sequence[SiteFormat],
    seed: int,
    memory: int | None,
    step: Callable[[], None],
) -> dict[SiteFormat, dict[str, float]]:
    """Format -> site -> contribution; together where there is memory for all operators at once, else format by format."""

    def of(names: Sequence[SiteFormat]) -> dict[SiteFormat, dict[str, float]]:
        made = rival_contributions(
            candidate,
            [smoothings] * len(names),
            judge.batches,
            loss=judge.kind,
            seed=seed,
            memory=memory,
            samples=SAMPLES,
            step=step,
            schemes=[SiteSchemes.given(scheme_of(name, scheme)) for name in names],
        )
        return dict(zip(names, made, strict=True))

    found = of(formats) if formats else {}
    for name in formats[1:]:
        if not found[name]:
            found |= of([name])
    return found
