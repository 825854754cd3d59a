"""The stage of a run that chooses formats of sites: contributions predicted, the program solved, the best plans measured, one picked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.losses import relative_loss
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.literals import SiteFormat, Target
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.formats import format_of, told
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.quantization.stored_forms import stored_forms
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.objectives.text import counted, number
from alphasmith.search.budget import BudgetConfig
from alphasmith.search.formats._plans import plan_key, schemes_of
from alphasmith.search.formats._prediction import SAMPLES, Predicted, predict
from alphasmith.search.formats._program import Plan
from alphasmith.search.formats.record import Measured, PlanRecord
from alphasmith.search.inputs.hardware import HardwareBudget
from alphasmith.search.interruption import leave
from alphasmith.search.model.held_out import HeldOutScore, Judgement, held_out_score, judged

#: Forward passes of the calibration batches that the whole stage may take.
MOST_PASSES = 30
#: Plans that are measured, most; and those of them that are the next best within the limit.
_MOST_PLANS = 20
_NEXT_BEST = 4
#: One part in this many of the sites has to differ between the best plan within the limit and the next.
_APART = 16


@dataclass(frozen=True, kw_only=True)
class FormatRequest:
    """What is asked for.

    Attributes:
        schemes: The model's own; sites that it names have no choice.
        formats: Formats of a site, from the cheapest to the dearest.
        budget: What they may cost.
        hardware: The target, where times follow from it.
        target: What will serve the model.
        seed: Of the prediction.
        calibration: Number of calibration samples.
        memory: Most bytes beside the float model; None: no bound.
    """

    schemes: SiteSchemes
    formats: tuple[SiteFormat, ...]
    budget: BudgetConfig
    hardware: HardwareBudget
    target: Target = "any"
    seed: int = 0
    calibration: int
    memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class FormatResult:
    """What was chosen, and how it came to that.

    Attributes:
        request: What was asked for.
        own: Format of the scheme.
        sites: Sites with a choice.
        loss: Loss that the points were measured by.
        points: Every plan that was measured, by number.
        front: Numbers of those that no other is as good as in cost and loss and better in one of them, from the cheapest on.
        picked: Number of the point that is kept.
        reason: Why.
        held_out: The scheme's own format against the best within the limit on held-out samples; None: they are the same.
        passes: Samples run through the model or its operators, over the calibration samples.
        seconds: Wall time [s].
        study: Name of the Optuna study.
    """

    request: FormatRequest
    own: SiteFormat
    sites: tuple[str, ...]
    loss: Literal["mse", "kl"]
    points: tuple[Measured, ...]
    front: tuple[int, ...]
    picked: int
    reason: str
    held_out: Judgement | None
    passes: float
    seconds: float
    study: str | None

    @property
    def chosen(self) -> Measured:
        """The point that is kept."""
        return self.points[self.picked]

    def schemes(self, point: Measured | None = None) -> SiteSchemes:
        """Schemes of the model's sites.

        Args:
            point: Under which point; None: the one that is kept.
        """
        return schemes_of(self.request.schemes, (point or self.chosen).changed)


def choose_formats(
    candidate: CandidateModel,
    smoothings: Mapping[str, Smoothing],
    judge: ModelObjective,
    reserve: ModelObjective,
    request: FormatRequest,
    record: PlanRecord,
    *,
    begin: Callable[[str, int], None] = lambda name, total: None,
    advance: Callable[[str], None] = lambda note: None,
    note: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = perf_counter,
) -> FormatResult | None:
    """Choose a format for every site. Source: formula fA18.

    Args:
        candidate: The model; the float one afterwards.
        smoothings: What is kept, site by site.
        judge: Loss at the output on the tuning batches.
        reserve: The same on held-out batches.
        request: What is asked for.
        record: Keeps trials; those on record are not measured again.
        begin: Called with the name of a step and its units.
        advance: Called after each unit, with what it found.
        note: Told what people should know.
        stop: Polled; returns True to stop.
        clock: Seconds, monotonic.

    Returns:
        None where nothing can be predicted, so that no choice can be made; ``note`` says so.

    Raises:
        InputError: No choice keeps within the budget; names the nearest.
        Interrupted: ``stop`` said so; what was measured is on record.
    """
    own = format_of(request.schemes.default)
    if own is None:
        return None
    run = _Choosing(candidate, smoothings, judge, reserve, request, own, record, begin, advance, stop, clock)
    predicted = run.predicted()
    if predicted is None:
        note("warning: what formats would change at the output cannot be predicted; every site keeps the scheme's own")
        return None
    return run.result(predicted)


class _Choosing:
    """One pass through the stage."""

    def __init__(
        self,
        candidate: CandidateModel,
        smoothings: Mapping[str, Smoothing],
        judge: ModelObjective,
        reserve: ModelObjective,
        request: FormatRequest,
        own: SiteFormat,
        record: PlanRecord,
        begin: Callable[[str, int], None],
        advance: Callable[[str], None],
        stop: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._candidate = candidate
        self._smoothings = smoothings
        self._judge = judge
        self._reserve = reserve
        self._request = request
        self._own: SiteFormat = own
        self._record = record
        self._begin = begin
        self._advance = advance
        self._stop = stop
        self._clock = clock
        self._start = clock()
        self._tuning = sum(batch.size for batch in judge.batches)
        self._held_out = sum(batch.size for batch in reserve.batches)
        #: Samples run so far: the outputs of the float model among them.
        self._samples = float(self._tuning)
        self._known = record.known()
        self._points: list[Measured] = []
        self._plans: list[Plan] = []

    def predicted(self) -> Predicted | None:
        """Contributions of all sites."""

        def step() -> None:
            leave(self._stop)
            self._advance("")

        request = self._request
        self._begin("formats: shares of sites", SAMPLES)
        found = predict(
            self._candidate,
            self._smoothings,
            self._judge,
            request.schemes,
            self._own,
            request.formats,
            request.budget,
            request.hardware,
            seed=request.seed,
            memory=request.memory,
            step=step,
        )
        self._samples += 0.0 if found is None else found.samples
        return found

    def result(self, predicted: Predicted) -> FormatResult:
        """Measure, and pick."""
        program, request = predicted.program, self._request
        limit = request.budget.limit
        most = program.least if limit is None else limit
        if not program.meets(program.least, most):
            problem = f"{number(most)} is met by no choice of formats; the nearest is {number(program.least)}"
            raise InputError(
                "budget.latency_factor", problem, f"give at least {number(program.least)}, or other formats"
            )
        # Held-out samples judge twice at the end.
        left = MOST_PASSES * request.calibration - self._samples - 2 * self._held_out
        allowed = max(1, min(_MOST_PLANS, int(left // self._tuning)))
        plans = self._first(predicted, most)
        self._begin("formats of sites", min(allowed, len(plans) + _NEXT_BEST))
        for plan in plans[:allowed]:
            self._measure(predicted, plan)
        for plan in self._next_best(predicted, most, allowed - len(self._points)):
            self._measure(predicted, plan)
        front = _front(self._points)
        within = [n for n in front if program.meets(self._points[n].cost, most)]
        start = next((n for n, plan in enumerate(self._plans) if not predicted.choices.changed(plan)), None)
        best = within[-1] if within else self._cheapest()
        picked, reason, verdict = self._judged(best, start, limit)
        return FormatResult(
            request=request,
            own=self._own,
            sites=predicted.choices.sites,
            loss=self._judge.kind,
            points=tuple(self._points),
            front=tuple(front),
            picked=picked,
            reason=reason,
            held_out=verdict,
            passes=self._samples / request.calibration,
            seconds=self._clock() - self._start,
            study=self._record.study,
        )

    def _first(self, predicted: Predicted, most: float) -> list[Plan]:
        """The scheme's own format everywhere, the best plan within the limit, then the front from its cheap end."""
        choices, program = predicted.choices, predicted.program
        own = [choices.uniform(self._own)] if self._own in choices.formats else []
        inside = program.best(most)
        plans = [*own, *([] if inside is None else [inside]), *program.front(program.limits())]
        # With every site in float there is nothing left that is quantized.
        return [plan for plan in dict.fromkeys(plans) if any(choices.formats[place] != "float" for place in plan)]

    def _next_best(self, predicted: Predicted, most: float, count: int) -> Iterator[Plan]:
        """Plans within the limit that are predicted to be nearly as good as the best and differ from all that were measured."""
        apart = max(1, len(predicted.choices.sites) // _APART)
        for _ in range(min(count, _NEXT_BEST)):
            plan = predicted.program.best(most, without=self._plans, apart=apart)
            if plan is None or all(predicted.choices.formats[place] == "float" for place in plan):
                return
            yield plan

    def _measure(self, predicted: Predicted, plan: Plan) -> None:
        """One trial: the exact loss at the output, from the record where it is there."""
        leave(self._stop)
        choices, began = predicted.choices, self._clock()
        changed = choices.changed(plan)
        known = self._known.get(plan_key(changed))
        loss, reason = known if known is not None else self._loss(choices.under(plan))
        self._samples += self._tuning
        expected = predicted.loss(plan)
        if self._points and self._points[0].loss is not None and self._points[0].predicted:
            # The first one says by how much the sum is off, all others are predicted with that.
            expected *= self._points[0].loss / self._points[0].predicted
        measured = Measured(
            number=len(self._points),
            changed=changed,
            cost=predicted.program.cost(plan),
            share_of_macs=choices.share_of_macs(plan),
            predicted=expected,
            loss=loss,
            reason=reason,
        )
        self._record.add(
            measured,
            told=told(changed, len(choices.sites), self._own),
            choices=choices.formats,
            seconds=self._clock() - began,
        )
        self._points.append(measured)
        self._plans.append(plan)
        self._advance("not finite" if loss is None else f"output loss {number(loss)}, cost {number(measured.cost)}")

    def _loss(self, schemes: SiteSchemes) -> tuple[float | None, str]:
        try:
            with self._candidate.using(schemes):
                errors = self._judge.sample_errors(self._smoothings)
            return relative_loss(float(errors.sum()), self._judge.weight), ""
        except NonFiniteError as error:
            return None, str(error)

    def _held_out_score(self, point: Measured) -> HeldOutScore | None:
        self._samples += self._held_out
        with self._candidate.using(schemes_of(self._request.schemes, point.changed)):
            return held_out_score(self._reserve, self._smoothings)

    def _cheapest(self) -> int:
        """Where no measured plan keeps within the limit with a finite loss: the cheapest there is."""
        return min(range(len(self._points)), key=lambda n: (self._points[n].loss is None, self._points[n].cost, n))

    def _judged(self, best: int, start: int | None, limit: float | None) -> tuple[int, str, Judgement | None]:
        """The best plan within the limit, unless held-out samples do not tell it from the scheme's own format."""
        chosen = self._points[best]
        within = "at no cost" if limit is None else "within the budget"
        lowest = f"lowest output loss of the {counted(len(self._points), 'choice')} measured {within}"
        if start is None or best == start:
            return best, lowest, None
        own = self._points[start]
        verdict = judged(self._held_out_score(own), self._held_out_score(chosen), self._reserve.weight)
        if verdict.accepted:
            return best, f"{lowest}; {verdict.reason}", verdict
        return start, f"{self._own} stays at every site: {verdict.reason}", verdict


def forms_of_front(
    candidate: CandidateModel, smoothings: Mapping[str, Smoothing], result: FormatResult
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Operators in the formats of every point that can be picked: of the front, the one that is kept, the scheme's own at every site.

    Args:
        candidate: The model; the float one afterwards.
        smoothings: What is kept, site by site.
        result: What was chosen.
    """
    needed: dict[str, list[SiteFormat]] = {}
    shown = [p for p in result.points if p.number in {*result.front, result.picked} or not p.changed]
    for site in sorted({site for point in shown for site in point.changed}):
        needed[site] = sorted({point.changed.get(site, result.own) for point in shown})
    return stored_forms(candidate, smoothings, result.request.schemes, result.schemes(), needed)


def _front(points: Sequence[Measured]) -> list[int]:
    """Numbers of the points that none is as good as in cost and loss and better in one of them, from the cheapest on."""
    finite = [(point.cost, point.loss, point.number) for point in points if point.loss is not None]
    kept: list[int] = []
    lowest = float("inf")
    for _, loss, place in sorted(finite):
        if loss < lowest:
            kept.append(place)
            lowest = loss
    return kept
