"""Fold, decompose, train, measure, judge: the rounds. Source: claims B-1, B-2, B-5; formulas fB5 to fB7.

A round lowers the rank of layers, trains what is left, and measures it. The last model that lost no more than is tolerated is the
result; the round that lost more ends the rounds and is on record with its numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.drop import DropCondition
from alphasmith.objectives.joint.low_rank.classes import layer_classes
from alphasmith.objectives.joint.low_rank.covariances import input_covariances
from alphasmith.objectives.joint.low_rank.factorization import FactoredLayer, LowRankSettings, factorize
from alphasmith.objectives.joint.low_rank.norms import FoldedNorms, fold_norms, row_scales
from alphasmith.objectives.joint.low_rank.spectrum import FlatLayer, fallback_layers
from alphasmith.objectives.joint.ports import JointTask, Measured
from alphasmith.objectives.joint.rounds._updates import update
from alphasmith.objectives.joint.rounds.outcome import Round, RoundsOutcome, RoundsStatus, UpdatePoint
from alphasmith.objectives.joint.rounds.settings import RoundsSettings
from alphasmith.objectives.joint.sparsity.targets import SparsityTargets, find_targets
from alphasmith.objectives.joint.sparsity.terms import SparsityTerms, sparsity_terms
from alphasmith.objectives.joint.structure import read_structure
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model.plain_operators import rewrite
from alphasmith.objectives.model.private_copy import private_copy
from alphasmith.objectives.training.sampler import place_seed

#: Samples of one call while the inputs of layers are collected.
_AT_ONCE = 16


def run_rounds(
    model: nn.Module,
    task: JointTask,
    settings: RoundsSettings,
    condition: DropCondition,
    *,
    baseline: Measured | None = None,
    progress: Callable[[int, UpdatePoint], None] = lambda number, point: None,
    on_round: Callable[[Round, nn.Module], bool | None] = lambda done, model: None,
    stop: Callable[[], bool] = lambda: False,
) -> RoundsOutcome:
    """Lower the rank of a model round after round until it loses too much; the same settings give the same bits.

    Recurrent layers and attention modules are taken apart first, so that their matrices can be decomposed; layers that are factored are
    decomposed again as the product of their factors, and their rank never rises.

    Args:
        model: Left as it is.
        task: Loss, samples and metrics; decisions are taken on the split ``study``.
        settings: How.
        condition: What may be lost.
        baseline: Metrics that drops are counted from, e.g. those of the model before it was trained sparse; None: those of ``model``.
        progress: Receives the number of the round and every point of its training.
        on_round: Receives every round when it was judged, and its model, which must stay as it is; True ends the rounds.
        stop: Polled before every update and every round; True ends the rounds as interrupted.

    Raises:
        InputError: A tolerance cannot be judged or the baseline violates it, the model cannot be run on the samples, or it has no
            linear layer or convolution.
        NonFiniteError: The model's own metrics are NaN or infinite.
    """
    work = private_copy(model).eval()
    start = task.measure(work, "study")
    first = start if baseline is None else baseline
    condition.check(first, task.metrics)
    rounds = _Rounds(model, work, task, settings, condition, first, start)
    before = condition.verdict(first, start, task.metrics)
    if before.violated:
        return rounds.outcome("violated_before", f"before any round: {before}")
    return rounds.run(progress, on_round, stop)


class _Rounds:
    def __init__(
        self,
        model: nn.Module,
        work: nn.Module,
        task: JointTask,
        settings: RoundsSettings,
        condition: DropCondition,
        baseline: Measured,
        start: Measured,
    ) -> None:
        self._given, self._work, self._task = model, work, task
        self._settings, self._condition, self._baseline, self._start = settings, condition, baseline, start
        self._device = next((parameter.device for parameter in work.parameters()), None)
        self._best: nn.Module = model
        self._kept = 0
        self._rounds: list[Round] = []
        self._notes: list[str] = []
        self._folded: FoldedNorms | None = None
        self._rows: Mapping[str, str] = {}
        self._targets: SparsityTargets | None = None
        self._rewriting = rewrite(work)

    def run(
        self,
        progress: Callable[[int, UpdatePoint], None],
        on_round: Callable[[Round, nn.Module], bool | None],
        stop: Callable[[], bool],
    ) -> RoundsOutcome:
        self._prepare()
        for number in range(1, self._settings.max_rounds + 1):
            if stop():
                return self.outcome("interrupted", f"interrupted before round {number}")
            done = self._round(number, partial(progress, number), stop)
            if done.finetune is not None and done.finetune.ending == "interrupted":
                return self.outcome("interrupted", f"interrupted in round {number}")
            self._rounds.append(done)
            if done.met:
                self._best, self._kept = copy.deepcopy(self._work), number
            ended = on_round(done, self._work)
            if done.trouble:
                return self.outcome("diverged", f"round {number}: {done.trouble}")
            if done.verdict is None:
                return self.outcome("no_rank_fell", f"no rank fell in round {number}")
            if done.verdict.violated:
                status: RoundsStatus = "violated" if self._kept else "violated_at_first"
                told = "" if self._kept else "the model stays as it was: "
                return self.outcome(status, f"{told}round {number}: {done.verdict}")
            if ended:
                return self.outcome("ended", f"no round after round {number} was asked for")
        return self.outcome("round_cap", f"all {self._settings.max_rounds} rounds met the condition")

    def outcome(self, status: RoundsStatus, reason: str) -> RoundsOutcome:
        return RoundsOutcome(
            model=self._best,
            kept=self._kept,
            rounds=tuple(self._rounds),
            status=status,
            reason=reason,
            baseline=self._baseline,
            start=self._start,
            rewriting=self._rewriting,
            folded=self._folded,
            flat=self._flat(status),
            notes=tuple(dict.fromkeys(self._notes)),
        )

    def _prepare(self) -> None:
        """Normalizations folded into the weights, or what they weight of them found."""
        example = self._task.train.batch(range(min(2, len(self._task.train)))).to(self._device)
        if self._settings.norms == "fold":
            self._folded = fold_norms(self._work, example)
            return
        # Found once: a layer that is factored keeps its name, but no longer its kind.
        self._rows = {place.alone: place.name for place in read_structure(self._work, example).norms if place.alone}
        if self._settings.sparsity is not None:
            self._targets = find_targets(self._work, example)
            self._notes += self._targets.warnings

    def _round(self, number: int, progress: Callable[[UpdatePoint], None], stop: Callable[[], bool]) -> Round:
        settings = self._settings
        before = {layer.name: layer for layer in self._rounds[-1].layers} if self._rounds else {}
        energy, rank = settings.energies(number), settings.ranks(number)
        try:
            layers = self._lower(number)
        except NonFiniteError as error:
            numbers = sum(parameter.numel() for parameter in self._work.parameters())
            return Round(
                number=number, energy=energy, rank=rank, layers=(), fallen=(), numbers=numbers, trouble=str(error)
            )
        fallen = tuple(layer.name for layer in layers if _fell(layer, before.get(layer.name)))
        numbers = sum(parameter.numel() for parameter in self._work.parameters())
        done = Round(number=number, energy=energy, rank=rank, layers=layers, fallen=fallen, numbers=numbers)
        if not fallen:
            return done
        finetune = update(
            self._work,
            self._task,
            settings.finetune,
            terms=self._terms if self._targets is not None else None,
            seed=place_seed(settings.finetune.seed, number, "round"),
            progress=progress,
            stop=stop,
        )
        done = replace(done, finetune=finetune, trouble=finetune.trouble)
        if finetune.ending != "finished":
            return done
        try:
            measured = self._task.measure(self._work, "study")
            verdict = self._condition.verdict(self._baseline, measured, self._task.metrics)
        except NonFiniteError as error:
            return replace(done, trouble=str(error))
        return replace(done, measured=measured, verdict=verdict)

    def _lower(self, number: int) -> tuple[FactoredLayer, ...]:
        """Decompose at the energies and ranks of a round."""
        asked, weights = self._asked(self._work, number)
        layers = factorize(self._work, asked, **weights)
        self._notes += [note for layer in layers for note in layer.notes]
        return layers

    def _flat(self, status: RoundsStatus) -> tuple[FlatLayer, ...]:
        """The layers of the result that truncation does not make smaller at the energies of its round."""
        if not self._kept and status != "no_rank_fell":
            return ()
        model = self._best if self._kept else self._work
        asked, weights = self._asked(model, max(self._kept, 1))
        return fallback_layers(model, asked, **weights)

    def _asked(self, model: nn.Module, number: int) -> tuple[LowRankSettings, dict[str, Mapping[str, Tensor]]]:
        """What a round asks of the decomposition of a model, and what errors count by."""
        settings = self._settings
        exclude = list(settings.exclude)
        covariances: Mapping[str, Tensor] = {}
        if settings.metric != "plain":
            covariances = input_covariances(model, self._samples())
            unread = sorted(set(layer_classes(model)) - set(covariances))
            # The spatial form knows no such metric; what the samples do not reach has no inputs to count by.
            unread = [name for name in unread if getattr(model.get_submodule(name), "form", "") != "spatial"]
            exclude += unread
            self._notes += [f"{name} is not reached by the training samples and stays as it is" for name in unread]
        rows = {}
        for layer, norm in self._rows.items():
            scales = row_scales(model.get_submodule(norm))
            if scales is not None:
                rows[layer] = scales
        made = LowRankSettings(
            energy=settings.energies(number),
            rank=settings.ranks(number),
            metric=settings.metric,
            conv_form=settings.conv_form,
            exclude=exclude,
        )
        return made, {"covariances": covariances, "rows": rows}

    def _samples(self) -> list[Batch]:
        count = min(self._settings.calibration, len(self._task.train))
        starts = range(0, count, _AT_ONCE)
        return [self._task.train.batch(range(start, min(start + _AT_ONCE, count))) for start in starts]

    def _terms(self, model: nn.Module) -> SparsityTerms:
        if self._targets is None or self._settings.sparsity is None:
            raise InputError("rounds.sparsity", "has no targets", "give a model with normalizations")
        return sparsity_terms(model, self._targets, self._settings.sparsity)


def _fell(now: FactoredLayer, before: FactoredLayer | None) -> bool:
    """Whether a layer has a lower rank than before, or is factored for the first time."""
    return now.rank > 0 and (before is None or before.rank == 0 or now.rank < before.rank)
