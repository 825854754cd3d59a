"""Compressed models trained through their quantizers: what the search left, how much of it training recovers, what a step costs.

    python -m benchmarks.training SHARED_DATA [--models kwt1 ...] [--schemes w4a8-channel-static ...] [--seeds 0 1 2] [--short]
                                  [--updates N] [--ratios] [--home FOLDER] [--work FOLDER] [--out docs/training.md]

SHARED_DATA is the folder with zoo.py and zoo_eval.py, --home that of the models out of packages; neither is part of this
repository. One search for each model and scheme, one training for each seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from alphasmith.objectives.media.batch import call, main_output
from alphasmith.objectives.model.plain_operators import rewrite
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.training.fake_quantized import FakeQuantized
from alphasmith.objectives.training.loop import TrainingData, train
from alphasmith.objectives.training.losses import answers, task_of
from alphasmith.objectives.training.outcome import TrainingOutcome
from alphasmith.objectives.training.ports import Samples
from alphasmith.objectives.training.settings import TrainingSettings
from alphasmith.search import RunConfig, load_quantized, run
from alphasmith.storage.output.entries import MetricEntry
from alphasmith.storage.output.result_folder import ResultFolder
from benchmarks.real_folders import home_folder
from benchmarks.training_cases import NAMES, Case, load_case

SCHEMES = ("w8a8-channel-static", "w4a8-channel-static", "w4a16-channel")
#: Trials of a search in the short and the long form.
SHORT_TRIALS, TRIALS = 6, 24
#: Updates of the short form, and batches timed for the cost of a step.
SHORT_STEPS, TIMED = 60, 13

#: Gaps below this share of the float model's value are none.
_NO_GAP = 0.002


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One model under one scheme.

    Attributes:
        model: Its name.
        metric: What its metric is called.
        higher_is_better: Whether larger is better.
        data: Which data are in which part, in words.
        scheme: Name of the scheme.
        form: What was asked for: trials, seeds and settings; findings of another form are made anew.
        float_model: Metric of the float model.
        naive: Quantized without smoothing.
        searched: As the run wrote it.
        trained: After training, one for each seed; ``searched`` where training was not kept.
        kept: Trainings that were kept.
        ratio: Processor time of a step of the quantized model divided by that of the float model.
        search_seconds: Wall time of the search [s]; 0 where an earlier one was taken.
        train_seconds: Wall time of all trainings [s].
    """

    model: str
    metric: str
    higher_is_better: bool
    data: str
    scheme: str
    form: str
    float_model: float
    naive: float
    searched: float
    trained: list[float]
    kept: int
    ratio: float
    search_seconds: float
    train_seconds: float

    @property
    def recovered(self) -> float | None:
        """Share of the gap between search and float that training closed, mean over seeds; None where there is none to speak of."""
        sign = 1 if self.higher_is_better else -1
        gap = sign * (self.float_model - self.searched)
        return (
            None
            if gap <= _NO_GAP * abs(self.float_model)
            else sign * (statistics.mean(self.trained) - self.searched) / gap
        )


def step_ratio(case: Case, quantized: nn.Module, settings: TrainingSettings) -> float:
    """Processor time of an update of the fake-quantized model divided by one of the float model, on the same batches, by turns.

    The median of neighbouring turns: what else the machine does slows both. Recurrent layers and attention of both are
    written with plain operators, as the search left them.

    Args:
        case: Model and data.
        quantized: Its quantized form.
        settings: Batch size, and what is learned.
    """
    plain = copy.deepcopy(case.model).eval()
    rewrite(plain)
    plain.requires_grad_(True)
    twin = FakeQuantized(quantized, learn_steps=settings.learn_steps, learn_ranges=settings.learn_ranges)
    contestants: list[tuple[nn.Module, torch.optim.Optimizer, list[float]]] = [
        (model.train(), torch.optim.AdamW(model.parameters(), lr=1e-6), []) for model in (plain, twin)
    ]
    for module in plain.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.eval()
    size = min(settings.batch_size, len(case.train))
    for turn in range(TIMED):
        batch = case.train.batch([(turn * size + i) % len(case.train) for i in range(size)])
        for model, optimizer, times in contestants:
            start = time.process_time()
            optimizer.zero_grad()
            output = main_output(call(model, batch))
            found = answers(output, batch, task_of(output, batch))
            if found.classes is None:
                loss = found.scores.square().mean()
            else:
                loss = nn.functional.cross_entropy(found.scores, found.classes)
            loss.backward()
            optimizer.step()
            times.append(time.process_time() - start)
    float_times, twin_times = (times[1:] for _, _, times in contestants)
    return statistics.median(twin / plain for twin, plain in zip(twin_times, float_times, strict=True))


def trained_once(
    case: Case, quantized: nn.Module, samples: Samples, settings: TrainingSettings
) -> tuple[float, TrainingOutcome]:
    """Metric of the model after one training, on the judged data, and how it went.

    Args:
        case: Model, metric, held-out samples.
        quantized: What is trained; left as it is.
        samples: What it is trained on.
        settings: How.
    """
    twin = FakeQuantized(quantized, learn_steps=settings.learn_steps, learn_ranges=settings.learn_ranges)
    data = TrainingData(samples=samples, held_out=case.held_out, teacher=case.model)
    outcome = train(twin, data, settings)
    return case.metric(twin.integers()), outcome


def settings_of(case: Case, *, short: bool, updates: int | None) -> TrainingSettings:
    """How a model is trained in a form of the measurement.

    Args:
        case: The model, with the settings of the long form.
        short: Fewer updates, with a look half-way and one at the end.
        updates: This many instead, with six looks; None: as the form says.
    """
    if updates is not None:
        return replace(case.settings, steps=updates, evaluate_every=max(1, updates // 6))
    if short:
        steps = min(case.settings.steps or SHORT_STEPS, SHORT_STEPS)
        return replace(case.settings, steps=steps, evaluate_every=SHORT_STEPS // 2)
    return case.settings


def found(case: Case, scheme: str, seeds: Sequence[int], work: Path, *, short: bool, updates: int | None) -> Finding:
    """Search, then train once for each seed; what ``work`` has of it from an earlier call is taken.

    Args:
        case: Model and data.
        scheme: Name of the scheme.
        seeds: Of the trainings.
        work: An existing folder.
        short: Fewer trials and updates.
        updates: Of each training; None: as the form says.
    """
    settings = settings_of(case, short=short, updates=updates)
    form = json.dumps([SHORT_TRIALS if short else TRIALS, list(seeds), asdict(settings)], sort_keys=True)
    kept = work / f"{case.name}-{scheme}.json"
    if kept.exists():
        finding = Finding(**json.loads(kept.read_text(encoding="utf-8")))
        if finding.form == form:
            return finding
    start = time.perf_counter()
    quantized, measured = searched_model(case, scheme, work, short=short)
    searched = time.perf_counter()
    ratio = step_ratio(case, quantized, settings)
    trained = [trained_once(case, quantized, case.train, replace(settings, seed=seed)) for seed in seeds]
    finding = Finding(
        model=case.name, metric=case.metric_name, higher_is_better=case.higher_is_better, data=case.data,
        scheme=scheme, form=form,
        float_model=_known(measured.float_model), naive=_known(measured.naive), searched=case.metric(quantized),
        trained=[metric for metric, _ in trained], kept=sum(outcome.kept for _, outcome in trained),
        ratio=ratio, search_seconds=searched - start, train_seconds=time.perf_counter() - searched,
    )  # fmt: skip
    kept.write_text(json.dumps(asdict(finding), indent=1), encoding="utf-8")
    return finding


def searched_model(case: Case, scheme: str, work: Path, *, short: bool) -> tuple[nn.Module, MetricEntry]:
    """The integer model of a search, and the metrics that the search measured; one that ``work`` has is taken.

    Args:
        case: Model and data.
        scheme: Name of the scheme.
        work: An existing folder.
        short: Fewer trials.
    """
    out = work / f"{case.name}-{scheme}"
    if not (out / "manifest.json").exists():
        _search(case, scheme, SHORT_TRIALS if short else TRIALS, work, out)
    (measured,) = ResultFolder(out).manifest.output.metrics
    return load_quantized(out, case.model), measured


def _search(case: Case, scheme: str, trials: int, work: Path, out: Path) -> None:
    config = RunConfig.build(
        {
            "name": f"{case.name} {scheme}",
            "storage": f"sqlite:///{work}/trials.db",
            "out": str(out),
            "scheme": asdict(Scheme.parse(scheme)),
            "search": {"trials": trials},
            "data": {"metric_name": case.metric_name, "metric_goal": "max" if case.higher_is_better else "min"},
        }
    )
    run(config, model=copy.deepcopy(case.model), batches=case.calibration, metric=case.metric)


HEADER = (
    "| model | metric | scheme | float | no smoothing | searched | trained | kept | recovered | step ratio | training [s] |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(finding: Finding) -> str:
    """One line of the table."""
    values = finding.trained
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    recovered = "no gap" if finding.recovered is None else f"{finding.recovered:.0%}"
    return (
        f"| {finding.model} | {finding.metric} | {finding.scheme} | {finding.float_model:.4f} | {finding.naive:.4f} "
        f"| {finding.searched:.4f} | {statistics.mean(values):.4f} +- {error:.4f} | {finding.kept}/{len(values)} | {recovered} "
        f"| {finding.ratio:.2f} | {finding.train_seconds:.0f} |"
    )


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def page(findings: Sequence[Finding], command: str) -> str:
    """The part of docs/training.md that this command makes.

    Args:
        findings: What was measured.
        command: Which made it.
    """
    data = dict.fromkeys(f"- {finding.model}: {finding.data}." for finding in findings)
    where = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return "\n".join(
        [f"    {command}", "", f"Machine: {where}.", "", HEADER, *map(row, findings), "", "Data:", "", *data, ""]
    )


#: Around the part of the page that this command makes.
BEGIN, END = "<!-- figures: made by benchmarks/training.py -->", "<!-- end of the figures -->"


def write(out: Path, text: str) -> None:
    """Put the figures in their place on the page.

    Args:
        out: The page, with both marks.
        text: The figures.
    """
    before, _, rest = out.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    out.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="*", choices=NAMES, default=list(NAMES))
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--short", action="store_true", help="fewer trials and updates")
    parser.add_argument("--updates", type=int, help="of each training, instead of the form's")
    parser.add_argument("--ratios", action="store_true", help="only what a step costs, without training")
    parser.add_argument("--home", type=Path, default=home_folder())
    parser.add_argument("--work", type=Path, help="keeps searches and findings, so that a later call goes on")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.data.resolve()))
    findings = []
    updates = [] if arguments.updates is None else ["--updates", str(arguments.updates)]
    flags = [
        *(["--short"] if arguments.short else []),
        *updates,
        "--models",
        *arguments.models,
        "--schemes",
        *arguments.schemes,
    ]
    command = f"python -m benchmarks.training SHARED_DATA {' '.join(flags)}"
    if not arguments.ratios:
        print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for name in arguments.models:
            case = load_case(name, arguments.data, arguments.home)
            for scheme in arguments.schemes:
                if arguments.ratios:
                    quantized, _ = searched_model(case, scheme, work, short=arguments.short)
                    print(f"{name} {scheme}: {step_ratio(case, quantized, case.settings):.2f}", flush=True)
                    continue
                findings.append(
                    found(case, scheme, arguments.seeds, work, short=arguments.short, updates=arguments.updates)
                )
                print(row(findings[-1]), flush=True)
                if arguments.out:
                    write(arguments.out, page(findings, command))


if __name__ == "__main__":
    main()
