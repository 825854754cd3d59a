"""Scales of a tool's linears as smoothings of our sites, and what the quantized model loses with them.

Tools that keep a scale as a multiplication at run time choose one for every linear, also where several linears read one tensor. So
the model is quantized with every linear as a site of its own, which divides its own input; with weights rounded channel by channel
that equals folding, but for the rounding of float32. Ranges of activations are calibrated on the samples that the tool chose its
scales on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.judge.answers import loss_of_answers
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing
from alphasmith.search import RunConfig
from alphasmith.search.inputs.preparation import PreparedModel, prepare, survey
from alphasmith.search.inputs.task import Task, load_task
from alphasmith.search.launch.site_searches import input_ranges, skip_patterns
from alphasmith.search.model.search import ModelScales
from alphasmith.search.progress import Silent
from benchmarks.real_data import Arguments
from benchmarks.real_judges import Judge, Judged
from benchmarks.real_runs import SWEPT, statistics
from benchmarks.tools.adapters.contract import digest, first_output
from benchmarks.tools.exchange import AdapterError, ToolReply, relative_difference

#: Relative squared difference of outputs up to which two float models are one: float32 in another order of sums leaves 1e-12.
_SAME = 1e-6


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A tool's scales as they were judged.

    Attributes:
        judged: On data that no contestant saw.
        linears: That got scales.
        unused: Linears whose scales are not used: they stay in float here, or cannot be smoothed.
        loaded: Relative squared difference of the tool's float model from ours on the first batch.
    """

    judged: Judged
    linears: int
    unused: tuple[str, ...]
    loaded: float


@dataclass(frozen=True, kw_only=True)
class Swept:
    """One alpha for the whole model, swept as people do it by hand.

    Attributes:
        alpha: The one with the lowest output loss on the calibration batches.
        judged: On data that no contestant saw.
        wall: Time of the sweep [s].
        cpu: CPU time likewise [s].
    """

    alpha: float
    judged: Judged
    wall: float
    cpu: float


def split_site(site: Site) -> tuple[Site, ...]:
    """Every operator of a site as a site of its own that divides its own input; what cannot be smoothed stays as it is."""
    if site.mode == "left" or any(operator.raw for operator in site.operators):
        return (site,)
    return tuple(
        replace(
            site,
            name=operator.name,
            operators=(operator,),
            mode="explicit",
            reason="scored with scales of its own",
            ties=torch.arange(site.channels),
            edits=tuple(edit for edit in site.edits if edit.power > 0 and edit.parameter == operator.weight),
            producers=(),
            shift_edits=(),
        )
        for operator in site.operators
    )


def split_ranges(sites: Sequence[Site], ranges: Mapping[str, ChannelRange]) -> dict[str, ChannelRange]:
    """The ranges of sites as those of the sites that they are split into."""
    return {part.name: ranges[site.name] for site in sites if site.name in ranges for part in split_site(site)}


def smoothings_of(scales: Mapping[str, Tensor], sites: Sequence[Site]) -> tuple[dict[str, Smoothing], tuple[str, ...]]:
    """Scales of linears as smoothings of split sites, and the linears that no such site smooths.

    Args:
        scales: Linear -> (C,).
        sites: Split, see :func:`split_site`.
    """
    names = {site.name for site in sites if site.mode == "explicit"}
    return (
        {name: Smoothing(scales=scale) for name, scale in scales.items() if name in names},
        tuple(name for name in scales if name not in names),
    )


class Bench:
    """A real model with its data and a judge, on which contestants are scored.

    Args:
        config: Of the run that the tools are compared with: the same data calibrate.
        batches: Likewise.
        judge: Judges on data that no contestant saw.

    Raises:
        InputError: The run reads no model folder, which is what tools read.
    """

    def __init__(self, config: RunConfig, batches: Sequence[Arguments] | None, judge: Judge) -> None:
        if config.model.path is None:
            raise InputError("model.path", "is missing", "tools read model folders")
        self.folder = config.model.path
        self._given = batches
        # Rows are not looked at here: statistics are those of all positions, however few rows are kept.
        self._config = RunConfig.build({**config.model_dump(), "search": {**config.search.model_dump(), "rows": 16}})
        self._task: Task = load_task(self._config, batches=batches)
        self._model: nn.Module = self._task.loaded.model.eval()
        self._given = batches
        self._judge = judge
        self.float_model = judge(self._model)

    @cached_property
    def _calibrated(self) -> PreparedModel:
        """The model with statistics and ranges of the run's own calibration."""
        return prepare(self._config, self._task, survey(self._config, self._task), Silent())

    @cached_property
    def _informed(self) -> PreparedModel:
        """The same with those of all samples, as tools see them: scales and ranges that come from different data clip."""
        task = replace(self._task, calibration=self.batches)
        return prepare(self._config, task, survey(self._config, task), Silent())

    @property
    def batches(self) -> list[Batch]:
        """All samples that the run is given, as it is given them. Short batches come first: some tools weigh the last one most."""
        task = self._task
        split = [*task.calibration, *task.tuning, *task.held_out, *task.proof]
        given = split if self._given is None else [Batch(kwargs=arguments) for arguments in self._given]
        return sorted(given, key=lambda batch: batch.size)

    @property
    def channels(self) -> dict[str, int]:
        """Linear -> its input channels."""
        return {name: m.in_features for name, m in self._model.named_modules() if isinstance(m, nn.Linear)}

    @property
    def weights(self) -> dict[str, str]:
        """Linear -> digest of its weight."""
        return {name: digest(m.weight) for name, m in self._model.named_modules() if isinstance(m, nn.Linear)}

    def score(self, reply: ToolReply, asked: Mapping[str, Tensor]) -> Scored:
        """Quantize with a tool's scales, and judge.

        Args:
            reply: Of the tool.
            asked: Arguments of the batch that its outputs answer to.

        Raises:
            AdapterError: The tool read another model than ours, or its scales cannot be applied.
        """
        wanted = first_output(self._model, dict(asked))
        if reply.before.shape != wanted.shape:
            raise AdapterError(
                f"its float model answers with shape {tuple(reply.before.shape)}, ours with {tuple(wanted.shape)}"
            )
        loaded = relative_difference(reply.before, wanted)
        if not loaded < _SAME:
            raise AdapterError(f"its float model is not ours: the outputs differ by {loaded:.2g}")
        if not reply.change < _SAME:
            raise AdapterError(
                f"its smoothed float model is not the float model: the outputs differ by {reply.change:.2g}"
            )
        prepared = self._informed
        sites = [part for site in prepared.sites for part in split_site(site)]
        smoothings, unused = smoothings_of(reply.scales, sites)
        try:
            with self._candidate(prepared, sites, split_ranges(prepared.sites, input_ranges(prepared))) as candidate:
                candidate.apply(smoothings)
                judged = self._judge(candidate.model)
        except AlphasmithError as error:
            raise AdapterError(f"its scales cannot be applied: {error}") from None
        return Scored(judged=judged, linears=len(smoothings), unused=unused, loaded=loaded)

    def judged_at(self, alpha: float | None) -> Judged:
        """The model quantized with one alpha at every site, or without smoothing, as judged."""
        prepared = self._calibrated
        scales = ModelScales(statistics(prepared))
        with self._candidate(prepared, prepared.sites, input_ranges(prepared)) as candidate:
            candidate.apply({} if alpha is None else scales.single(alpha))
            return self._judge(candidate.model)

    def sweep(self) -> Swept:
        """One alpha for the whole model, of 0.5 to 0.95, by the output loss on the calibration batches."""
        prepared = self._calibrated
        scales = ModelScales(statistics(prepared))
        with self._candidate(prepared, prepared.sites, input_ranges(prepared)) as candidate:
            wall, cpu = time.perf_counter(), time.process_time()
            data = list(self._task.calibration)
            objective = ModelObjective(candidate, data, loss=loss_of_answers(candidate.reset(), data[0]))
            losses = {alpha: objective.loss(scales.single(alpha)) for alpha in SWEPT}
            best = min(losses, key=lambda alpha: losses[alpha])
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            candidate.apply(scales.single(best))
            judged = self._judge(candidate.model)
        return Swept(alpha=best, judged=judged, wall=wall, cpu=cpu)

    @contextmanager
    def _candidate(
        self, prepared: PreparedModel, sites: Sequence[Site], ranges: Mapping[str, ChannelRange]
    ) -> Iterator[CandidateModel]:
        candidate = CandidateModel(
            prepared.survey.model,
            sites,
            ranges,
            self._config.scheme.build(),
            skip_patterns(self._config, prepared),
            keep_dense=prepared.plan.dense > 0,
        )
        with candidate.restored():
            yield candidate
