"""From a trained model to a packed one, stage by stage; what was made before is taken from the cache. Source: claims B-1 to B-7."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.errors import NonFiniteError
from alphasmith.objectives.joint.branch.placement import BranchedLayer, branch_layers
from alphasmith.objectives.joint.branch.rows import collect_rows
from alphasmith.objectives.joint.branch.settings import BranchSettings
from alphasmith.objectives.joint.drop import DropCondition, Verdict
from alphasmith.objectives.joint.low_rank.classes import layer_classes
from alphasmith.objectives.joint.packed.inputs import parameter_inputs
from alphasmith.objectives.joint.packed.packing import ClassClusters, PackedModel, PackedSettings, model_bytes, pack
from alphasmith.objectives.joint.packed.restoring import restore
from alphasmith.objectives.joint.packed.tuning import TuningSettings, finetune_tables, task_steps, with_trained
from alphasmith.objectives.joint.ports import JointTask, Measured
from alphasmith.objectives.joint.rounds.loop import run_rounds
from alphasmith.objectives.joint.rounds.outcome import Round, RoundsOutcome
from alphasmith.objectives.joint.rounds.regularised import train_regularised
from alphasmith.objectives.joint.rounds.settings import RegularisedSettings, RoundsSettings, Updates
from alphasmith.objectives.joint.sparsity.targets import find_targets
from alphasmith.objectives.joint.sparsity.terms import SparsitySettings
from alphasmith.objectives.media import data_digest
from alphasmith.objectives.media.batch import Batch, call, device_of
from alphasmith.objectives.model.plain_operators import rewrite
from alphasmith.objectives.model.private_copy import private_copy
from alphasmith.objectives.text import counted
from alphasmith.search.compression._cache import AS_IT_IS, StageCache, stage_key
from alphasmith.search.compression._space import Choice, Space
from alphasmith.search.compression._study import DroppedError, Point
from alphasmith.search.compression.config import CompressConfig
from alphasmith.search.devices import thread_budget
from alphasmith.search.interruption import Interrupted, leave
from alphasmith.storage.output.compression_manifest import RoundEntry, RoundsEntry

#: Forward calls that are timed, after one that is not.
_TIMED = 7
#: Training samples whose rows calibrate branches, and rows of a layer.
_SAMPLES, _ROWS = 64, 2048
#: Shows which tensors a codebook can make smaller, with as little work as possible.
_CHEAPEST = PackedSettings(
    clusters=ClassClusters(conv=2, recurrent=2, linear=2, embedding=2, other=2),
    start="linear",
    coding="packed",
    squeeze=False,
    iterations=1,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Made:
    """A model before its weights are clustered.

    Attributes:
        key: Of its stage.
        model: It.
        facts: What is known of it, JSON-able: ``rounds``, ``ending``, ``kept``, ``flat``, ``reasons``, ``notes``.
    """

    key: str = ""
    model: nn.Module
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Compressed:
    """The model of a choice.

    Attributes:
        packed: What is stored of it.
        model: Restored from that.
        facts: What its stages say: ``rounds``, ``ending``, ``kept``, ``flat``, ``reasons``, ``notes``.
    """

    packed: PackedModel
    model: nn.Module
    facts: Mapping[str, Any]


class ModelStages:
    """Makes the models of choices, and measures them on the study split.

    Attributes:
        original: The model that was given, as a private copy.
        baseline: Its metrics.
        condition: As given.
        digest: sha256 over the original and the training samples' first batches.
        float_bytes: Bytes of the original.

    Args:
        model: Trained; left as it is.
        task: What it is for.
        condition: How much worse it may become.
        config: The configuration.
        cache: Finished stages.
        stop: Polled.
        told: Receives the name of every costly stage that begins.
        clock: Seconds, monotonic.

    Raises:
        InputError: The condition cannot be judged, or the original itself violates it.
        NonFiniteError: The original's metrics are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        task: JointTask,
        condition: DropCondition,
        config: CompressConfig,
        cache: StageCache,
        *,
        stop: Callable[[], bool],
        told: Callable[[str], None] = lambda stage: None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.original = private_copy(model).eval()
        self._task, self.condition, self._config, self._cache = task, condition, config, cache
        self._stop, self._told, self._clock = stop, told, clock
        self._read: tuple[str, Mapping[str, torch.Tensor]] | None = None
        self.digest = model_digest(model, task)
        self.float_bytes = model_bytes(model)
        self.baseline = task.measure(self.original, "study")
        condition.check(self.baseline, task.metrics)

    def point(self, choice: Choice) -> Point:
        """See :class:`~alphasmith.search.compression._study.Stages`."""
        made = self.compressed(choice)
        measured = self._task.measure(made.model, "study")
        verdict = self.verdict(measured)
        return Point(
            stored=made.packed.stored_bytes,
            ratio=self.float_bytes / made.packed.stored_bytes,
            latency=self.latency(made.model) if self._config.study.latency else None,
            measured=measured,
            drops={drop.metric.name: drop.drop for drop in verdict.drops if drop.drop is not None},
            constraints=verdict.constraints,
            rounds=str(made.facts.get("ending", "")),
            notes=tuple(made.facts.get("notes", ())),
        )

    def space(self) -> Space:
        """What a study of this model chooses from.

        Raises:
            InputError: The model cannot be run on the samples.
        """
        example = self._task.train.batch(range(min(2, len(self._task.train)))).to(device_of(self.original))
        targets = find_targets(self.original, example)
        terms = {"encoder": targets.encoder, "recurrent": targets.recurrent}
        plain = private_copy(self.original)
        rewrite(plain)
        return Space(
            config=self._config,
            terms=tuple(name for name, norms in terms.items() if norms),  # type: ignore[misc]  # of both
            decomposed=tuple(dict.fromkeys(layer_classes(plain).values())),
            clustered=tuple(
                dict.fromkeys(
                    tensor.kind for tensor in pack(self.original, _CHEAPEST).report if tensor.stored == "codebook"
                )
            ),
        )

    def verdict(self, measured: Measured) -> Verdict:
        """What the condition says of a model's metrics.

        Args:
            measured: They, on the study split.
        """
        return self.condition.verdict(self.baseline, measured, self._task.metrics)

    def compressed(self, choice: Choice) -> Compressed:
        """Go through all stages.

        Args:
            choice: What to do.

        Raises:
            DroppedError: No round kept within the limits.
            Interrupted: Somebody asked to stop.
            NonFiniteError: A training found no finite loss.
        """
        key, trained = self._trained(choice)
        match choice.role:
            case "off":
                made = trained
            case "truncate":
                made = self._truncated(key, trained, choice)
            case "branch":
                made = self._branched(key, trained, choice)
        leave(self._stop)
        clusters = self._config.clusters
        settings = PackedSettings(
            clusters=ClassClusters(**choice.clusters),
            start=clusters.start,
            coding=clusters.coding,
            float16=clusters.halves,
            channels=clusters.channels,
            seed=self._config.study.seed,
        )
        packed = self._tuned(made, pack(made.model, settings, covariances=self._inputs(made)))
        return Compressed(packed=packed, model=restore(self.original, packed), facts=made.facts)

    def _inputs(self, made: _Made) -> Mapping[str, torch.Tensor] | None:
        """What the matrices of a model read, where its indices are to make up for errors; that of the last model is remembered."""
        if self._config.clusters.match == "nearest":
            return None
        if self._read is None or self._read[0] != made.key:
            count = min(_SAMPLES, len(self._task.train))
            device = device_of(made.model)
            batches = (self._task.train.batch([number]).to(device) for number in range(count))
            self._read = made.key, parameter_inputs(made.model, batches)
        return self._read[1]

    def _tuned(self, made: _Made, packed: PackedModel) -> PackedModel:
        """Tables trained on the task, where that was asked for and makes the first metric better on the study split."""
        steps = self._config.clusters.finetune
        if not steps or not packed.structure.codebooks:
            return packed
        goal = self._task.metrics[0]
        seed = self._config.study.seed
        size = self._config.train.batch_size
        # Digests of all codebooks stand for the clusters and for everything they were made with.
        key = stage_key(
            "tables", made.key, {"stored": packed.structure.to_json(), "steps": steps, "batch": size, "seed": seed}
        )
        loss = task_steps(self._task, batch_size=size, seed=seed)

        def judge(model: nn.Module) -> float:
            value = self._task.measure(model, "study").values[goal.name]
            return -math.inf if value is None else value if goal.goal == "max" else -value

        settings = TuningSettings(steps=steps, floats=True, seed=seed)

        def trained() -> tuple[PackedModel, dict[str, Any]]:
            self._told(f"{counted(steps, 'update')} of {counted(len(packed.structure.codebooks), 'table')}")
            found = finetune_tables(made.model, packed, loss, settings, judge=judge, stop=self._stop)
            leave(self._stop)
            return found.packed, {"kept": found.kept}

        found, facts = self._cache.made(key, trained, self._stop)
        return with_trained(packed, found.structure, found.tensors) if facts["kept"] else packed

    def example(self) -> Batch:
        """One training sample, on the original's device."""
        return self._task.train.batch([0]).to(device_of(self.original))

    def latency(self, model: nn.Module) -> float:
        """Median time of a forward call of one training sample on one thread [s].

        Args:
            model: Any form of it.
        """
        batch = self.example()
        times = []
        with thread_budget(1), torch.no_grad():
            call(model.eval(), batch)
            for _ in range(_TIMED):
                began = self._clock()
                call(model, batch)
                times.append(self._clock() - began)
        return statistics.median(times)

    def _trained(self, choice: Choice) -> tuple[str, _Made]:
        train = self._config.train
        if not train.steps:
            return self.digest, _Made(key=self.digest, model=self.original, facts={})
        settings = RegularisedSettings(
            updates=self._updates(train.steps),
            sparsity=SparsitySettings(kind=train.kind, encoder=choice.encoder, recurrent=choice.recurrent),
        )

        def make() -> _Made:
            self._told(f"training at lambda {choice.encoder:g}/{choice.recurrent:g}")
            found = train_regularised(self.original, self._task, settings, stop=self._stop)
            _ended(found.training.ending, found.training.trouble)
            skipped = [f"{name}: {reason}" for name, reason in found.targets.skipped.items()]
            return _Made(model=found.model, facts={"notes": [*found.targets.warnings, *skipped]})

        key = stage_key("train", self.digest, asdict(settings))
        return key, self._made(key, make)

    def _truncated(self, parent: str, trained: _Made, choice: Choice) -> _Made:
        rounds = self._config.rounds
        energies: dict[Any, float] = {name: 1 - drop for name, drop in choice.drops.items()}
        settings = RoundsSettings(
            energy=energies,
            step=rounds.step,
            max_rounds=rounds.most,
            metric=rounds.metric,
            conv_form=rounds.conv_form,
            finetune=self._updates(rounds.steps),
        )

        def make() -> _Made:
            self._told("rounds of truncation and training")
            found = run_rounds(
                trained.model, self._task, settings, self.condition, baseline=self.baseline, stop=self._stop
            )
            return self._judged(found, trained)

        key = stage_key("rounds", parent, {**asdict(settings), "limits": asdict(self.condition)})
        made = self._made(key, make)
        if choice.flat == "branch" and made.facts["flat"]:
            return self._branched(key, made, choice, why=made.facts["flat"])
        if made.facts["kept"]:
            return made
        raise DroppedError(str(made.facts["ending"]))

    def _judged(self, found: RoundsOutcome, trained: _Made) -> _Made:
        """The last model that kept within the limits."""
        if found.status == "interrupted":
            raise Interrupted(found.reason)
        if found.status == "diverged" and not found.kept:
            raise NonFiniteError(found.reason)
        facts = {
            "ending": found.reason,
            "rounds": _rounds_entry(found).model_dump(mode="json"),
            "notes": [*trained.facts.get("notes", ()), *found.notes],
            "kept": found.kept,
            "flat": {layer.name: layer.reason for layer in found.flat},
            "reasons": _reasons(found),
        }
        return _Made(model=found.model, facts=facts)

    def _branched(self, parent: str, given: _Made, choice: Choice, *, why: Mapping[str, str] | None = None) -> _Made:
        """Layers as branch and residual: all, or those that ``why`` names."""
        branch = self._config.branch
        by_class = choice.clusters
        settings = BranchSettings(
            alpha=choice.alpha,
            rank=choice.rank,
            branch_bits=branch.bits,
            residual=choice.residual or "int4",
            k=by_class.get("linear", 16),
            activation_bits=branch.activations or None,
            refits=branch.refits,
        )

        def make() -> _Made:
            where = (
                "" if why is None else f" in place of truncation for {counted(len(why), 'layer')} with a flat spectrum"
            )
            self._told(f"branches of rank {choice.rank} at alpha {choice.alpha:.2f}{where}")
            model = private_copy(given.model).eval()
            rewrite(model)
            count = min(_SAMPLES, len(self._task.train))
            batches = (self._task.train.batch([number]).to(device_of(model)) for number in range(count))
            rows = collect_rows(model, batches, count=_ROWS, seed=self._config.study.seed)
            layers = branch_layers(model, rows, settings, why=why)
            reasons = {**given.facts.get("reasons", {}), **_reasons_of_branches(layers, why or {})}
            notes = [*given.facts.get("notes", ())]
            if why is not None:
                notes.append(_fallen_back(layers, why, choice))
            return _Made(model=model, facts={**given.facts, "reasons": reasons, "notes": notes})

        key = stage_key("branch", parent, {**asdict(settings), "why": None if why is None else dict(why)})
        return self._made(key, make)

    def _made(self, key: str, make: Callable[[], _Made]) -> _Made:
        """A stage's model from the cache, or made and put there; the same bits either way."""
        leave(self._stop)

        def stored() -> tuple[PackedModel, dict[str, Any]]:
            made = make()
            return pack(made.model, AS_IT_IS), dict(made.facts)

        packed, facts = self._cache.made(key, stored, self._stop)
        return _Made(key=key, model=restore(self.original, packed), facts=facts)

    def _updates(self, steps: int) -> Updates:
        train = self._config.train
        return Updates(
            steps=steps,
            learning_rate=train.learning_rate,
            batch_size=min(train.batch_size, len(self._task.train)),
            clip=train.clip,
            seed=self._config.study.seed,
        )


def model_digest(model: nn.Module, task: JointTask) -> str:
    """sha256 over a model's structure and tensors, the task's metrics, its first training samples and how many there are.

    Args:
        model: Any.
        task: What it is for.
    """
    found = hashlib.sha256(str(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    count = len(task.train)
    first = data_digest(task.train.batch([number]) for number in range(min(8, count)))
    found.update(f"{first} {count} {[asdict(metric) for metric in task.metrics]}".encode())
    return found.hexdigest()


def _ended(ending: str, trouble: str) -> None:
    """Raise what a training that did not finish stands for."""
    if ending == "interrupted":
        raise Interrupted("asked to stop")
    if ending == "diverged":
        raise NonFiniteError(trouble)


def _reasons(found: RoundsOutcome) -> dict[str, str]:
    """Layer -> why it stays dense in the round whose model is the result, or in the first one."""
    number = max(found.kept, 1)
    return {
        layer.name: layer.reason
        for done in found.rounds
        if done.number == number
        for layer in done.layers
        if layer.reason
    }


def _reasons_of_branches(layers: Sequence[BranchedLayer], why: Mapping[str, str]) -> dict[str, str]:
    """Layer -> why it is a branch, or why it is none although it was to become one."""
    found = {}
    for layer in layers:
        if layer.name in why:
            told = f"stays dense, with a flat spectrum ({layer.reason})" if layer.reason else why[layer.name]
            found[layer.name] = told
        elif layer.reason and not why:
            found[layer.name] = layer.reason
    return found


def _fallen_back(layers: Sequence[BranchedLayer], why: Mapping[str, str], choice: Choice) -> str:
    """In a line, which layers became branches in place of truncation."""
    names = [layer.name for layer in layers if layer.name in why and not layer.reason]
    told = f"branches of rank {choice.rank} at alpha {choice.alpha:.2f} in place of truncation, for flat spectra: "
    return told + (", ".join(names) or "none, since a branch saves nothing there")


def _rounds_entry(found: RoundsOutcome) -> RoundsEntry:
    """Rounds as a manifest has them."""
    return RoundsEntry(
        status=found.status, reason=found.reason, kept=found.kept, rounds=tuple(map(_round_entry, found.rounds))
    )


def _round_entry(done: Round) -> RoundEntry:
    drops = () if done.verdict is None else done.verdict.drops
    return RoundEntry(
        number=done.number,
        energy={str(name): value for name, value in done.energy.items()},
        ranks={layer.name: layer.rank for layer in done.layers if layer.rank},
        fallen=done.fallen,
        numbers=done.numbers,
        steps=0 if done.finetune is None else done.finetune.steps,
        metrics={} if done.measured is None else dict(done.measured.values),
        drops={drop.metric.name: drop.drop for drop in drops},
        verdict="met" if done.met else "not judged" if done.verdict is None else "violated",
        reason=str(done.verdict or "") or done.trouble,
    )
