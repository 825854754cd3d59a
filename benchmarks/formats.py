"""Formats of sites under a budget on real models: how much of what the best swept alpha leaves to float they close, at which cost.

    python -m benchmarks.formats [--models MiniLM SmolLM2] [--formats int8-static int8-token int16-static] [--share 0.25]
                                 [--alphas 0.65 0.75 0.85] [--under 0.55 0.65] [--full] [--home FOLDER] [--out docs/formats.md]

One alpha for the whole model is swept over ``--alphas`` on the tuning samples; under the best of them formats are chosen as a run does. With
``--under`` they are chosen under each of those alphas as well, and what has the lowest loss on the tuning samples is kept: a site that
has got a better format may leave the others a better alpha.
Losses of points are of the tuning samples, "unseen" is of data that nothing else uses. Closed: 1 - loss over that of the swept alpha, the
float model's being 0. Off by: the largest factor between predicted and measured loss of the points, in either direction. Without ``--full``
as few samples as the short form of ``benchmarks.real_models`` takes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from alphasmith.objectives.judge.answers import loss_of_answers
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.literals import SiteFormat
from alphasmith.objectives.quantization.formats import FORMATS, told
from alphasmith.search.budget import BudgetConfig
from alphasmith.search.formats.record import Measured, NoRecord
from alphasmith.search.formats.stage import FormatRequest, FormatResult, choose_formats
from alphasmith.search.inputs.hardware import HardwareBudget
from alphasmith.search.model.search import ModelScales
from benchmarks.real_folders import PACKAGES, AbsentError, home_folder, model_folder
from benchmarks.real_judges import SHORT, Judge, Sizes, make_judge
from benchmarks.real_runs import Request, candidates, configured
from benchmarks.timing import machine, parser, publish, table, torch_threads, with_threads

HEADER = (
    "model",
    "alpha",
    "choices",
    "sites",
    "swept alpha",
    "with formats",
    "closed",
    "dearer multiply-adds",
    "formats",
    "unseen, float",
    "unseen, swept alpha",
    "unseen, with formats",
    "points, on the front",
    "off by",
    "passes",
    "CPU seconds",
)
POINTS = ("model", "point", "dearer multiply-adds", "predicted", "measured", "formats")


def lines(
    request: Request,
    formats: Sequence[SiteFormat],
    share: float,
    alphas: Sequence[float],
    under: Sequence[float],
    work: Path,
) -> tuple[list[str], list[list[str]]]:
    """A row of the table, and one for every point of the front.

    Args:
        request: Model, scheme and data.
        formats: What sites may have.
        share: Largest share of multiply-adds in formats dearer than the scheme's own.
        alphas: What is swept.
        under: Alphas under which formats are chosen, beside the best of those.
        work: An empty folder.

    Raises:
        AbsentError: Model or data are not here.
    """
    folder = model_folder(request.model, request.home)
    config, batches = configured(request, folder, work)
    candidate, statistics, task = candidates(config, batches)
    scales = ModelScales(statistics)
    kind = loss_of_answers(candidate.model, task.held_out[0])
    judge = ModelObjective(candidate, task.judging, loss=kind)
    reserve = ModelObjective(candidate, task.held_out, loss=kind)
    swept = {}
    for alpha in alphas:
        with candidate.restored():
            swept[alpha] = judge.loss(scales.single(alpha))
    best = min(swept, key=lambda alpha: swept[alpha])
    began = time.process_time()
    found: dict[float, FormatResult] = {}
    for alpha in dict.fromkeys((best, *under)):
        result = choose_formats(
            candidate,
            scales.single(alpha),
            judge,
            reserve,
            FormatRequest(
                schemes=candidate.schemes,
                formats=tuple(name for name in FORMATS if name in formats),
                budget=BudgetConfig(share_of_macs=share),
                hardware=HardwareBudget(),
                seed=request.seed,
                calibration=sum(batch.size for batch in task.calibration),
            ),
            NoRecord(),
            advance=lambda text: print(text, flush=True) if text else None,
        )
        if result is None:
            raise AbsentError(f"{request.model}: nothing can be predicted")
        found[alpha] = result
        print(f"alpha {alpha:g}: {result.chosen.loss}", flush=True)
    seconds = time.process_time() - began
    kept = min(found, key=lambda alpha: found[alpha].chosen.loss or float("inf"))
    result = found[kept]
    unseen = make_judge(request.model, folder, Sizes() if not request.short else SHORT, work)
    judged = [_judged(unseen, candidate.reset())]  # the float model comes first: the others are compared with it
    for alpha, point in ((best, replace(result.chosen, changed={})), (kept, result.chosen)):
        with candidate.using(result.schemes(point)), candidate.applied(scales.single(alpha)) as model:
            judged.append(_judged(unseen, model))
    chosen = result.chosen
    row = [
        request.model,
        f"{best:g}" if kept == best else f"{best:g}, formats under {kept:g}",
        ", ".join(formats),
        str(len(result.sites)),
        f"{swept[best]:.4g}",
        f"{chosen.loss:.4g}",
        f"{1 - (chosen.loss or 0.0) / swept[best]:.0%}",
        f"{chosen.share_of_macs:.1%}",
        told(chosen.changed, len(result.sites), result.own, named=False),
        *judged,
        f"{len(result.points)}, {len(result.front)}",
        f"{off_by(result):.2f}",
        f"{result.passes:.1f}",
        f"{seconds:.0f}",
    ]
    return row, [_point(request.model, result, result.points[place]) for place in result.front]


def off_by(result: FormatResult) -> float:
    """The largest factor between predicted and measured loss, in either direction.

    Args:
        result: What was measured.
    """
    pairs = [(point.predicted, point.loss) for point in result.points if point.predicted and point.loss]
    return max(max(one / other, other / one) for one, other in pairs)


def _point(model: str, result: FormatResult, point: Measured) -> list[str]:
    kept = " (picked)" if point.number == result.picked else ""
    formats = told(point.changed, len(result.sites), result.own, named=False)
    losses = [f"{value:.4g}" for value in (point.predicted or 0.0, point.loss or 0.0)]
    return [model, f"{point.number}{kept}", f"{point.share_of_macs:.1%}", *losses, formats]


def _judged(judge: Judge, model: nn.Module) -> str:
    """Output loss and task metrics on unseen data."""
    judged = judge(model)
    metrics = [f"{of.name} {of.value(values):.4g}" for of, values in zip(judge.measures, judged.values, strict=True)]
    return "; ".join([f"{judged.loss:.3g}", *metrics])


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    names = [p.name for p in PACKAGES]
    arguments_of.add_argument("--home", type=Path, default=home_folder())
    arguments_of.add_argument("--models", nargs="*", default=["MiniLM", "SmolLM2"], choices=names)
    arguments_of.add_argument("--scheme", default="w8a8-channel-static")
    arguments_of.add_argument(
        "--formats", nargs="*", default=["int8-static", "int8-token", "int16-static"], choices=FORMATS
    )
    arguments_of.add_argument("--share", type=float, default=0.25)
    arguments_of.add_argument("--alphas", nargs="*", type=float, default=[0.65, 0.75, 0.85, 0.9])
    arguments_of.add_argument("--under", nargs="*", type=float, default=[])
    arguments_of.add_argument("--full", action="store_true", help="as many samples as benchmarks.real_models takes")
    arguments = arguments_of.parse_args()
    rows, points = [], []
    with torch_threads(arguments.threads):
        where = machine()
        for model in arguments.models:
            request = Request(
                model=model, scheme=arguments.scheme, seed=0, short=not arguments.full, sweep=False, home=arguments.home
            )
            try:
                with tempfile.TemporaryDirectory() as work:
                    row, front = lines(
                        request, arguments.formats, arguments.share, arguments.alphas, arguments.under, Path(work)
                    )
            except AbsentError as absent:
                print(f"left out: {absent}", flush=True)
                continue
            rows.append(row)
            points += front
            print(" | ".join(row), flush=True)
    told_of = (
        f"{where} Scheme {arguments.scheme}, at most {arguments.share:.0%} of the multiply-adds in dearer formats."
    )
    publish("FORMATS", f"{told_of}\n\n{table(HEADER, rows)}\n\nThe fronts:\n\n{table(POINTS, points)}", arguments.out)


if __name__ == "__main__":
    main()
