"""A run block by block: one block's weights, rows and activations in memory at a time, everything else in files.

The whole model is searched as the resident way searches it, with the same rows and statistics to the bit, since the float states go
from block to block. Beside them go those of the held-out samples through every baseline and through the winners, each through its own
quantized blocks: so the model's output judges here, too. What needs the whole model again and again does not take place: the sweep of
one alpha, the refinement at the output, and the shares of the output's error. Models are made in a second pass, once it is known what
is kept.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.blocks.parts import around_batch
from alphasmith.objectives.blocks.streamed_model import Start, StreamedModel
from alphasmith.objectives.calibration.calibrate import Calibration
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.answers import loss_of_answers
from alphasmith.objectives.judge.losses import relative_loss
from alphasmith.objectives.judge.memory import measured_peak
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.sites.coverage import CoveredWeight
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.objectives.stored_types import cast_to
from alphasmith.search.config import RunConfig
from alphasmith.search.devices import search_device, thread_budget
from alphasmith.search.engines.types import Engine
from alphasmith.search.inputs.preparation import begin, site_schemes, survey
from alphasmith.search.inputs.task import Task
from alphasmith.search.interruption import leave
from alphasmith.search.launch._look_ahead import VARIANTS, LookAhead, light
from alphasmith.search.launch._outcome import Products, SearchOutcome, decide, produce
from alphasmith.search.launch._parts import PART_FORMAT, PartProgress, PartRecord, joined, joined_products
from alphasmith.search.launch._rounded import RoundedModel, folded, rounded_smoothings, with_rounded
from alphasmith.search.launch._states import StatesFolder, StreamBatches
from alphasmith.search.launch.recorder import RunRecorder, RunResult
from alphasmith.search.launch.site_searches import (
    input_ranges,
    search_sites,
    single_alpha,
    skip_patterns,
    statistics_of,
)
from alphasmith.search.model.held_out import HeldOutScore
from alphasmith.search.model.variants import ModelScores
from alphasmith.search.progress import Progress
from alphasmith.search.site.result import SiteResult
from alphasmith.search.study.alpha_ranges import DEFAULT_ALPHA
from alphasmith.search.study.writer import Writer
from alphasmith.search.work.session import RunHandle
from alphasmith.search.work.site_results import SiteResults
from alphasmith.storage.output.checkpoint import INDEX
from alphasmith.storage.output.output_folder import OutputFolder

#: Streams of float states, by the split of the data that they are of.
_SPLITS = ("calibration", "held_out", "proof")
#: The part that is no block.
_AROUND = "around the blocks"
_NOTE = (
    "the model was read block by block (memory.mode): the variants were judged at its output, each through its own quantized blocks; "
    "one alpha for the whole model, the refinement and the shares of the output's error were left out"
)
_NO_FORMATS = (
    "formats of sites were not chosen (sites.formats, budget): that takes the whole model, memory.mode = 'resident'"
)
#: What the name of a stream ends with that has rounded scales.
_ROUNDED = "-pow2"


def finish_blockwise(
    config: RunConfig,
    task: Task,
    streamed: StreamedModel,
    ahead: LookAhead,
    handle: RunHandle,
    engine: Engine,
    progress: Progress,
    stop: Callable[[], bool],
) -> RunResult:
    """Everything from the first block on.

    Args:
        config: The run's configuration.
        task: Its data.
        streamed: Its model.
        ahead: What was seen of it.
        handle: The run, driven by this process.
        engine: Searches sites.
        progress: Receives stages and notes.
        stop: Polled; returns True to stop.

    Raises:
        EquivalenceError: Folding changed what a block computes; nothing is written.
        Interrupted: ``stop`` said so; blocks that are done stay so.
    """
    with thread_budget(config.search.threads):
        return _BlockwiseRun(config, task, streamed, ahead, handle, engine, progress, stop).run()


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """Figures of the whole model.

    Attributes:
        variants: Of the variants.
        streams: Of these and of those with rounded scales, where they are finite.
        metrics: Task metrics, likewise; empty without a metric.
    """

    variants: ModelScores
    streams: Mapping[str, HeldOutScore]
    metrics: Mapping[str, float | None]


class _BlockwiseRun:
    """The two passes over the parts: blocks in order, then what is around them."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        streamed: StreamedModel,
        ahead: LookAhead,
        handle: RunHandle,
        engine: Engine,
        progress: Progress,
        stop: Callable[[], bool],
    ) -> None:
        self._config = config
        left = (_NO_FORMATS,) if config.sites.formats or config.budget.given else ()
        self._task = replace(task, notes=(*task.notes, _NOTE, *left))
        rounded = [f"{variant}{_ROUNDED}" for variant in VARIANTS if variant != "identity"]
        self._streams = (*VARIANTS, *(rounded if config.round_scales != "none" else ()))
        self._streamed = streamed
        self._ahead = ahead
        self._handle = handle
        self._engine = engine
        self._whole_progress = progress
        self._progress = PartProgress(progress, set())
        self._stop = stop
        self._device = search_device(config)
        self._states = StatesFolder(handle.blocks_folder)
        self._results: dict[str, SiteResult] = {}
        self._keeper = SiteResults(
            handle.board, handle.kept, scheme=lambda site: config.scheme.of(site).name, position=lambda _: 0
        )
        self._nothing = Calibration(
            sites={}, missing={}, statistics=config.search.statistic, percentile=config.search.percentile
        )

    def run(self) -> RunResult:
        """Search, judge, make and write."""
        records = self._known()
        self._begin(len(records))
        scores: _Scores | None = None
        for number in range(len(records), self._streamed.blocks + 1):
            self._handle.check_driving()
            leave(self._stop)
            record, scores = self._search(number, sum(len(r.sites) for r in records))
            records.append(record)
        if scores is None:
            scores = self._judge(records[-1])
        self._progress.of("")
        smoothings = {variant: self._smoothings(variant, records) for variant in VARIANTS}
        found = decide(self._config, scores.variants, smoothings, self._progress, sites=self._results)
        found = self._rounded(found, scores, records)
        whole = self._streamed.whole()
        prepared = joined(records, whole, self._ahead.survey, self._ahead.plan, self._nothing)
        task = replace(self._task, loaded=replace(self._task.loaded, model=whole))
        if prepared.coverage.left:
            self._progress.note(f"warning: {prepared.coverage.account()}")
        recorder = RunRecorder(self._handle, self._config, task, prepared)
        recorder.outcome(found)
        self._streamed.without_blocks()
        return recorder.write_with(found, lambda folder: self._write(folder, records, found, recorder))

    # --- the first pass

    def _known(self) -> list[PartRecord]:
        """Parts that an earlier process of this run has done: as many as the states that are there lie behind."""
        plan = {"plan": torch.frombuffer(bytearray(self._plan().encode()), dtype=torch.uint8)}
        before = self._states.kept("plan", "plan")
        if before is None or not torch.equal(before["plan"], plan["plan"]):
            self._states.discard()
            self._states.keep("plan", "plan", plan)
        records: list[PartRecord] = []
        for number in range(self._states.step()):
            state = self._states.kept("part", self._name(number))
            if state is None:
                break
            records.append(PART_FORMAT.record(state))
        names = [name for record in records for name in record.order]
        self._results = self._keeper.recall(names) if names else {}
        if len(records) < max(self._states.step(), 0) or any(name not in self._results for name in names):
            self._states.discard()  # what was found of sites stays; only the states are made again
            self._states.keep("plan", "plan", plan)
            return []
        if records:
            told = f"{len(records)} of {self._streamed.blocks} blocks are on record and not searched again"
            self._progress.note(told)
        return records

    def _plan(self) -> str:
        """What the files of states belong to: a run may go on with other batches, or on another device."""
        sizes = {split: [batch.size for batch in getattr(self._task, split)] for split in _SPLITS}
        told = {"sizes": sizes, "device": str(self._device), "torch": torch.__version__}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def _begin(self, done: int) -> None:
        """What the blocks are called with, and the states before the first of them."""
        total = sum(len(getattr(self._task, split)) for split in _SPLITS)
        self._progress.of("").stage("before the blocks", total)
        first = done == 0 and self._states.step() < 0
        if first:
            self._states.begin(0)
        with self._streamed.around(self._device) as model:
            for split in _SPLITS:
                for number, batch in enumerate(getattr(self._task, split)):
                    leave(self._stop)
                    start = self._streamed.start(model, batch.to(self._device))
                    self._states.keep("others", f"{split}-{number:05}", start.leaves)
                    if first:
                        self._states.write(0, split, number, start.hidden)
                    if split == "proof":
                        self._states.keep("start", f"{number:05}", {"hidden": start.hidden})
                    self._progress.advance()
        if first:
            self._states.complete(0)

    def _search(self, number: int, first: int) -> tuple[PartRecord, _Scores | None]:
        """Search the sites of a part, and pass all streams on through it."""
        progress = self._progress.of(self._name(number))
        with self._part(number) as model:
            task = self._part_task(model, lambda split, index: self._batch(number, split, split, index))
            found = replace(survey(light(self._config), task), scarcity=self._ahead.survey.scarcity)
            prepared = begin(light(self._config), task, found, progress, self._stop, self._handle.kept).prepared
            statistics = statistics_of(prepared)
            with Writer() as writer:
                results = search_sites(
                    self._config, prepared, self._handle, self._engine, writer, progress, self._stop, first=first
                )
            self._results |= results
            record = PartRecord(
                sites=prepared.sites,
                order=prepared.order,
                ranges=input_ranges(prepared),
                skip=skip_patterns(self._config, prepared),
                weights=tuple(self._of_whole(weight) for weight in prepared.coverage.weights),
                alpha_half=single_alpha(statistics, DEFAULT_ALPHA),
                plan=prepared.plan,
                notes=prepared.survey.notes,
            )
            del prepared, statistics
            candidate = self._candidate(model, record)
            if number == self._streamed.blocks:
                return record, self._scores(candidate, record)
            self._pass_on(number, model, candidate, record, task)
        self._states.keep("part", self._name(number), PART_FORMAT.state(record))
        self._states.complete(number + 1)
        return record, None

    def _of_whole(self, weight: CoveredWeight) -> CoveredWeight:
        """The same with its share of the whole model."""
        return replace(weight, share=math.prod(weight.shape) / self._task.loaded.parameter_count)

    def _pass_on(
        self, number: int, model: nn.Module, candidate: CandidateModel, record: PartRecord, task: Task
    ) -> None:
        """The states behind a block, of every stream."""
        self._progress.stage("passing states on", len(_SPLITS) + len(self._streams))
        self._states.begin(number + 1)
        with torch.no_grad():
            for split in _SPLITS:
                for index, batch in enumerate(getattr(task, split)):
                    leave(self._stop)
                    states = call(model, batch.to(self._device))
                    self._states.write(number + 1, split, index, states)
                self._progress.advance()
            for variant in self._alive(number):
                try:
                    with candidate.applied(self._smoothings(variant, [record])) as changed:
                        for index in range(len(self._task.held_out)):
                            leave(self._stop)
                            states = call(changed, self._batch(number, "held_out", self._from(number, variant), index))
                            if not bool(torch.isfinite(states).all()):
                                raise NonFiniteError(f"{variant} answers with NaN or infinity")
                            self._states.write(number + 1, variant, index, states)
                except NonFiniteError as error:
                    self._states.drop(number + 1, variant)
                    self._progress.note(f"warning: {variant} cannot be scored ({error})")
                self._progress.advance()
        candidate.check_pristine()

    # --- the judgement

    def _judge(self, record: PartRecord) -> _Scores:
        """Losses at the output, where the last part was searched before."""
        with self._part(self._streamed.blocks) as model:
            return self._scores(self._candidate(model, record), record)

    def _scores(self, candidate: CandidateModel, record: PartRecord) -> _Scores:
        """Loss at the model's output, and the task metric, of every stream on held-out samples."""
        last = self._streamed.blocks
        metric = self._task.metric.on_batches if self._task.metric is not None else None

        def batches(stream: str) -> StreamBatches:
            return StreamBatches(len(self._task.held_out), lambda i: self._batch(last, "held_out", stream, i))

        floats = list(batches("held_out"))
        kind = loss_of_answers(candidate.reset(), floats[0])
        reserve = ModelObjective(candidate, floats, loss=kind)
        losses: dict[str, float | None] = {}
        errors: dict[str, Tensor] = {}
        metrics: dict[str, float | None] = {}
        if metric is not None:
            self._progress.stage("metric of the float model", 1)
            metrics["float"] = metric(candidate.reset(), floats)
        self._progress.stage("whole model", len(self._streams))
        for variant in self._streams:
            losses[variant] = metrics[variant] = None
            if variant in self._alive(last):
                try:
                    stream = batches(self._from(last, variant))
                    with candidate.applied(self._smoothings(variant, [record])) as model, torch.no_grad():
                        found = [reserve.errors_of(main_output(call(model, b)), i) for i, b in enumerate(stream)]
                        errors[variant] = torch.cat(found)
                        losses[variant] = relative_loss(float(errors[variant].sum()), reserve.weight)
                        if metric is not None:
                            metrics[variant] = metric(model, stream)
                except NonFiniteError as error:
                    self._progress.note(f"warning: {variant} cannot be scored ({error})")
            self._progress.advance()
        if metric is None:
            metrics = {}
        candidate.reset()
        variants = ModelScores(
            loss=kind,
            losses={variant: losses[variant] for variant in VARIANTS},
            metrics={name: value for name, value in metrics.items() if not name.endswith(_ROUNDED)},
            errors={variant: errors[variant] for variant in VARIANTS if variant in errors},
            weight=reserve.weight,
        )
        scores = {n: HeldOutScore(errors=errors[n], loss=loss) for n, loss in losses.items() if loss is not None}
        return _Scores(variants=variants, streams=scores, metrics=metrics)

    def _rounded(self, found: SearchOutcome, scores: _Scores, records: Sequence[PartRecord]) -> SearchOutcome:
        """The outcome with rounded scales, where the configuration asks for it."""
        kept, sites = found.fallback or "ours", [site for record in records for site in folded(record.sites).values()]
        name = f"{kept}{_ROUNDED}"
        if name not in self._streams or not {site.name for site in sites} & found.final.keys():
            return found
        made = RoundedModel(
            smoothings=self._smoothings(name, records),
            before=scores.streams.get(kept),
            after=scores.streams.get(name),
            weight=scores.variants.weight,
            metric=scores.metrics.get(name),
        )
        return with_rounded(found, made, sites, self._progress)

    # --- the second pass

    def _write(
        self, folder: OutputFolder, records: Sequence[PartRecord], found: SearchOutcome, recorder: RunRecorder
    ) -> Products:
        """Fold, prove and quantize part after part, each into files of its own."""
        total = len(records)
        made: list[Products] = []
        places: dict[str, dict[str, str]] = {"quantized": {}, "smoothed": {}}
        sizes = dict.fromkeys(places, 0)
        for number, record in enumerate(records):
            self._handle.check_driving()
            self._progress.of(self._name(number))
            with self._part(number) as model:
                products = self._produce(number, model, record, found)
                smoothed = _stored(model, self._streamed.stored_names(model), products.types)
                for below, tensors in (("quantized", products.tensors), ("smoothed", smoothed)):
                    file = f"model-{number + 1:05}-of-{total:05}.safetensors"
                    folder.write_tensors(f"{below}/{file}", tensors, {"format": "pt"})
                    places[below] |= dict.fromkeys(tensors, file)
                    sizes[below] += sum(tensor.nbytes for tensor in tensors.values())
                made.append(replace(products, folded=nn.Module(), tensors={}))
                del products, smoothed, tensors
        products = joined_products(made, self._streamed.whole(), measured_peak(self._ahead.baseline))
        cast_to(products.folded, products.types)
        self._progress.of("").stage("writing")
        for below, where in places.items():
            index = {"metadata": {"total_size": sizes[below]}, "weight_map": where}
            folder.write_json(f"{below}/{INDEX}", index)
        _write_config(folder, self._streamed.skeleton, products.types)
        recorder.copy_companions(folder, "smoothed")
        recorder.describe_quantized(folder, products.structure)
        return products

    def _produce(self, number: int, model: nn.Module, record: PartRecord, found: SearchOutcome) -> Products:
        """The two models of a part, after its float states of the proof samples went on."""
        proof = [self._proof_batch(number, index).to(self._device) for index in range(len(self._task.proof))]
        if number < self._streamed.blocks:
            with torch.no_grad():
                for index, batch in enumerate(proof):
                    self._states.keep("proof", f"{index:05}", {"hidden": call(model, batch)})
        task = self._part_task(model, lambda _, index: proof[index])
        prepared = record.prepared(replace(self._ahead.survey, model=model), self._nothing)
        mine = {variant: self._smoothings(variant, [record]) for variant in VARIANTS}
        if found.rounding is not None:
            kept = found.fallback or "ours"
            mine[kept] = self._smoothings(f"{kept}{_ROUNDED}", [record])
        candidate = self._candidate(model, record)
        return produce(
            self._config,
            task,
            prepared,
            candidate,
            replace(found, smoothings=mine),
            self._ahead.baseline,
            self._progress,
        )

    def _proof_batch(self, number: int, index: int) -> Batch:
        kept = self._states.kept("proof" if number else "start", f"{index:05}")
        if kept is None:
            raise InputError("out", f"{self._states.folder} lost states of the proof", "resume the run")
        return self._called(number, "proof", index, kept["hidden"])

    # --- parts

    def _name(self, number: int) -> str:
        return self._streamed.block_name(number) if number < self._streamed.blocks else _AROUND

    @contextmanager
    def _part(self, number: int) -> Iterator[nn.Module]:
        """A part of the model, in memory inside."""
        inside = number < self._streamed.blocks
        with self._streamed.block(number, self._device) if inside else self._streamed.around(self._device) as model:
            yield model

    def _candidate(self, model: nn.Module, record: PartRecord) -> CandidateModel:
        return CandidateModel(
            model,
            record.sites,
            record.ranges,
            site_schemes(self._config, record.sites, part=True),
            record.skip,
            keep_dense=record.plan.dense > 0,
        )

    def _part_task(self, model: nn.Module, read: Callable[[str, int], Batch]) -> Task:
        """The task of a part: its model, and batches that are read when asked for."""

        def batches(split: str) -> StreamBatches:
            return StreamBatches(len(getattr(self._task, split)), lambda index: read(split, index))

        names = model.state_dict().keys()
        types = {name: kind for name, kind in self._task.loaded.types.items() if name in names}
        loaded = replace(self._task.loaded, model=model, types=types)
        return replace(
            self._task,
            loaded=loaded,
            calibration=batches("calibration"),
            tuning=(),
            held_out=batches("held_out"),
            proof=batches("proof"),
            metric=None,
            part=True,
        )

    def _batch(self, number: int, split: str, stream: str, index: int) -> Batch:
        """A batch of a part: of a split, with the states of a stream before it."""
        return self._called(number, split, index, self._states.read(number, stream, index)).to(self._device)

    def _called(self, number: int, split: str, index: int, hidden: Tensor) -> Batch:
        batch: Batch = getattr(self._task, split)[index]
        if number == self._streamed.blocks:
            return around_batch(batch, hidden)
        leaves = self._states.kept("others", f"{split}-{index:05}")
        return self._streamed.batch(number, batch, Start(hidden, leaves or {}))

    def _alive(self, number: int) -> list[str]:
        """Streams of variants whose states before a part are finite."""
        streams = self._states.streams(number)
        return [stream for stream in self._streams if number == 0 or stream in streams]

    def _from(self, number: int, variant: str) -> str:
        """The stream of a variant before a part: the float one, before the first."""
        return variant if number else "held_out"

    def _smoothings(self, stream: str, records: Sequence[PartRecord]) -> dict[str, Smoothing]:
        """What the variant of a stream does to the sites of some parts."""
        variant = stream.removesuffix(_ROUNDED)
        found: dict[str, Smoothing] = {}
        for record in records:
            mine: Mapping[str, Smoothing] = {}
            if variant == "alpha_0.5":
                mine = record.alpha_half
            elif variant != "identity":
                of = {name: self._results[name] for name in record.order}
                mine = {n: r.smoothing if variant == "ours" else r.best_single for n, r in of.items()}
            found |= rounded_smoothings(mine, folded(record.sites)) if stream != variant else mine
        return found


def _stored(model: nn.Module, names: Sequence[str], types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Tensors of a folded part as its checkpoint has them."""
    tensors = model.state_dict()
    return {name: tensors[name].to(types.get(name, tensors[name].dtype)) for name in names}


def _write_config(folder: OutputFolder, model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """``config.json`` of the smoothed model."""
    config: Any = copy.deepcopy(model.config)
    config.dtype = next(iter(types.values()), torch.float32)
    config.architectures = [type(model).__name__]
    folder.write_text("smoothed/config.json", config.to_json_string(use_diff=True))
