"""One run of the main job on a real model, and what becomes of the model under it and under the baselines on unseen data."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.calibrate import weight_absmax
from alphasmith.objectives.calibration.producers import Producers
from alphasmith.objectives.judge.answers import loss_of_answers
from alphasmith.objectives.judge.memory import peak_bytes
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search import RunConfig, load_quantized, run
from alphasmith.search.inputs.preparation import PreparedModel, prepare, survey
from alphasmith.search.inputs.task import Task, load_task
from alphasmith.search.launch.site_searches import input_ranges, skip_patterns
from alphasmith.search.model.search import ModelScales, SiteStatistics
from alphasmith.search.progress import Silent
from benchmarks.real_data import (
    Arguments,
    calibration_texts,
    drawn,
    encoded,
    image_sets,
    windows,
    write_crops,
)
from benchmarks.real_folders import AbsentError, model_folder
from benchmarks.real_judges import SHORT, Judge, Judged, Measure, Sizes, make_judge

#: From the simplest to the richest; "ours" is the quantized model that the run wrote.
Contestant = Literal["none", "alpha 0.5", "one alpha", "best single", "ours"]
CONTESTANTS: tuple[Contestant, ...] = ("none", "alpha 0.5", "one alpha", "best single", "ours")
BASELINES = CONTESTANTS[:-1]
#: Exit status of a process that could not have its model or data.
ABSENT = 3
#: Alphas that are swept over the whole model, as people do it by hand.
SWEPT = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to run.

    Attributes:
        model: Name of a package's model.
        scheme: Name of a scheme.
        seed: Draws the calibration data and is the seed of the search.
        short: Less data to calibrate and to judge on.
        sweep: Sweep one alpha for the model here, too, where the run reports its own.
        home: Where models are kept.
    """

    model: str
    scheme: str
    seed: int
    short: bool
    sweep: bool
    home: Path


@dataclass(frozen=True, eq=False, kw_only=True)
class Finding:
    """What a run found, judged on data it did not see.

    Attributes:
        request: What was run.
        measures: Task metrics.
        float_model: The float model as judged; no errors.
        judged: Every contestant that did not break down.
        one_alpha: The alpha that the benchmark's own sweep on the calibration batches chose; None: that of the run was judged.
        kept: What the run wrote, in the words of its manifest.
        own_losses: Output losses that the run itself reports on its held-out data, by name.
        sites: Sites searched.
        wall: Wall time of the run without its judging [s].
        cpu: CPU time likewise [s].
        sweep: CPU time of the sweep of one alpha, preparation included [s].
        peak: Highest memory of the process when the run had ended [bytes].
        commit: Of the code that ran, empty where it is not known.
    """

    request: Request
    measures: tuple[Measure, ...]
    float_model: Judged
    judged: Mapping[Contestant, Judged]
    one_alpha: float | None
    kept: str
    own_losses: Mapping[str, float | None]
    sites: int
    wall: float
    cpu: float
    sweep: float
    peak: int
    commit: str = ""


@dataclass(eq=False)
class Witness:
    """A metric for a run that judges every model it is called with, and remembers it by the number it returned.

    The run reports the number of each variant and decides nothing by it, so that what was remembered can be named.
    """

    judge: Judge
    records: list[Judged] = field(default_factory=list)
    wall: float = 0.0
    cpu: float = 0.0

    def __call__(self, model: nn.Module) -> float:
        """The output loss on the judge's data."""
        wall, cpu = time.perf_counter(), time.process_time()
        judged = self.judge(model)
        self.records.append(judged)
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return judged.loss

    def named(self, number: float | None) -> Judged | None:
        """What was judged when this number was returned."""
        return next((r for r in self.records if r.loss == number), None)


def configured(request: Request, folder: Path, work: Path) -> tuple[RunConfig, list[Arguments] | None]:
    """Configuration of a run with default settings, and batches where they are given in memory.

    Args:
        request: What to run.
        folder: The model's folder.
        work: An existing folder for what is written.
    """
    data, batches = _calibration(request, folder, work)
    config = RunConfig.build(
        {
            "storage": f"sqlite:///{work}/trials.db",
            "out": str(work / "out"),
            "model": {"path": folder},
            "scheme": asdict(Scheme.parse(request.scheme)),
            "data": {**data, "metric_name": "output loss on unseen data", "metric_goal": "min"},
            "search": {"seed": request.seed},
        }
    )
    return config, batches


def _calibration(request: Request, folder: Path, work: Path) -> tuple[dict[str, Any], list[Arguments] | None]:
    from transformers import AutoTokenizer

    seed = request.seed
    if request.model == "Whisper":
        counts = (12, 4, 6, 2) if request.short else (20, 8, 12, 2)
        write_crops(work / "clips", sum(counts), seed)
        return {"path": work / "clips", **_counted(counts, 4)}, None
    counts = (24, 16, 24, 2) if request.model == "SmolLM2" else (64, 32, 32, 8)
    if request.short:
        counts = (8, 8, 8, 2) if request.model == "SmolLM2" else (32, 16, 24, 4)
    total = sum(counts)
    if request.model == "DINOv2":
        pixels = drawn(image_sets()[0].pixels[:600], total, seed)
        return _counted(counts, 8), [{"pixel_values": part} for part in pixels.split(8)]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if request.model == "SmolLM2":
        ids = drawn(windows(tokenizer, "wikitext2_valid.txt"), total, seed)
        return _counted(counts, 8), [{"input_ids": part} for part in ids.split(8)]
    return _counted(counts, 8), encoded(tokenizer, calibration_texts(total, seed), 8)


def _counted(counts: Sequence[int], size: int) -> dict[str, Any]:
    samples, tuning, held_out, proof = counts
    return {"samples": samples, "tuning": tuning, "held_out": held_out, "proof": proof, "batch_size": size}


def found(request: Request, work: Path) -> Finding:
    """Run, and judge. Peak memory is that of the process, so call it in one of its own.

    Args:
        request: What to run.
        work: An empty folder.

    Raises:
        AbsentError: Model or data are not here.
    """
    folder = model_folder(request.model, request.home)
    judge = make_judge(request.model, folder, SHORT if request.short else Sizes(), work)
    config, batches = configured(request, folder, work)
    witness = Witness(judge)
    wall, cpu = time.perf_counter(), time.process_time()
    result = run(config, batches=batches, metric=witness)
    wall, cpu = time.perf_counter() - wall - witness.wall, time.process_time() - cpu - witness.cpu
    peak = peak_bytes()
    output = result.manifest.output
    (metric,) = output.metrics
    known: dict[Contestant, Judged | None] = {
        "none": witness.named(metric.naive),
        "alpha 0.5": witness.named(metric.alpha_half),
        "one alpha": witness.named(getattr(metric, "one_alpha", None)),
        "best single": witness.named(metric.best_single),
        "ours": judge(load_quantized(result.folder)),
    }
    alpha, sweep = None, 0.0
    if request.sweep or known["one alpha"] is None:
        cpu_before = time.process_time()
        alpha, candidate, smoothings = swept(config, batches)
        sweep = time.process_time() - cpu_before
        with candidate.applied(smoothings) as model:
            known["one alpha"] = judge(model)
    float_model = witness.named(metric.float_model)
    if float_model is None:
        raise RuntimeError("the run reports a metric of the float model that it was not given")
    return Finding(
        request=request,
        measures=judge.measures,
        float_model=float_model,
        judged={name: judged for name in CONTESTANTS if (judged := known[name]) is not None},
        one_alpha=alpha,
        kept=output.kept,
        own_losses={n: v for n, v in output.model_dump().items() if v is None or isinstance(v, float)},
        sites=len(result.sites),
        wall=wall,
        cpu=cpu,
        sweep=sweep,
        peak=peak,
        commit=_commit(),
    )


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def swept(
    config: RunConfig, batches: Sequence[Arguments] | None
) -> tuple[float, CandidateModel, Mapping[str, Smoothing]]:
    """One alpha for the whole model with the lowest output loss on the calibration batches, as people choose it by hand.

    Args:
        config: Of the run it is compared with: the same data calibrate.
        batches: Likewise.

    Returns:
        The alpha, a candidate model and the smoothings of the alpha.
    """
    candidate, of_sites, task = candidates(config, batches)
    scales = ModelScales(of_sites)
    data = list(task.calibration)
    judge = ModelObjective(candidate, data, loss=loss_of_answers(candidate.reset(), data[0]))
    losses = {alpha: judge.loss(scales.single(alpha)) for alpha in SWEPT}
    best = min(losses, key=lambda alpha: losses[alpha])
    return best, candidate, scales.single(best)


def candidates(
    config: RunConfig, batches: Sequence[Arguments] | None
) -> tuple[CandidateModel, Mapping[str, SiteStatistics], Task]:
    """The float model of a run, ready to become candidates, the statistics of its sites, and its data."""
    # Rows are not looked at here: statistics are those of all positions, however few rows are kept.
    small = RunConfig.build({**config.model_dump(), "search": {**config.search.model_dump(), "rows": 16}})
    task = load_task(small, batches=batches)
    prepared = prepare(small, task, survey(small, task), Silent())
    candidate = CandidateModel(
        prepared.survey.model,
        prepared.sites,
        input_ranges(prepared),
        small.scheme.build(),
        skip_patterns(small, prepared),
        keep_dense=prepared.plan.dense > 0,
    )
    return candidate, statistics(prepared), task


def statistics(prepared: PreparedModel) -> dict[str, SiteStatistics]:
    """What smoothing needs of every site."""
    model = prepared.survey.model
    parameters: dict[str, Tensor] = {n: p.detach() for n, p in model.named_parameters()}
    parameters |= dict(model.named_buffers())
    producers = Producers(prepared.sites, parameters, prepared.calibration, prepared.skip)
    return {
        site.name: SiteStatistics(
            activation=prepared.calibration.activation_statistic(site.name),
            weight=weight_absmax(site, parameters),
            ties=site.ties.cpu(),
            producer=producers.peaks(site),
        )
        for site in prepared.sites
        if site.name in prepared.order
    }


def main(model: str, scheme: str, seed: str, form: str, sweep: str, home: str, threads: str, out: str) -> None:
    """A run in this process; the finding goes into a file."""
    torch.set_num_threads(int(threads))
    request = Request(
        model=model, scheme=scheme, seed=int(seed), short=form == "short", sweep=sweep == "sweep", home=Path(home)
    )
    with tempfile.TemporaryDirectory() as work:
        try:
            torch.save(found(request, Path(work)), f"{out}.part")
        except AbsentError as absent:
            print(absent, file=sys.stderr)
            sys.exit(ABSENT)
    Path(f"{out}.part").replace(out)


if __name__ == "__main__":
    # What is saved must be of the module that others import, not of the one that is run.
    from benchmarks.real_runs import main as imported

    imported(*sys.argv[1:])
