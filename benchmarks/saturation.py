"""What kernels that saturate make of a search that takes products as exact, and what a search for them saves.

    python -m benchmarks.saturation [--models image text MiniLM DINOv2] [--searched image text MiniLM] [--threads 1] [--home FOLDER]
                                    [--work FOLDER] [--out docs/exports.md]

Loss at the model's output. One alpha for the whole model out of a few, and for every site 8 or 7 bits of weights, are chosen on the tuning
samples, for the kernel that the column names; what stands in the table is of the held-out samples. ``told`` is what a search for exact kernels
reports, ``served`` what a processor without VNNI delivers of the same model. Weights int8 per channel, activations static, signed and with a zero point.

A second table has small runs of the whole search for either kernel (``benchmarks.saturated_search``), judged where products saturate on samples
that no run saw. Lines that are in ``--work`` are taken, so that the tables can be made in several commands.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

from alphasmith.objectives.judge.answers import loss_of_answers
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.config import RunConfig
from alphasmith.search.model.held_out import HeldOutScore, held_out_score, judged
from alphasmith.search.model.search import ModelScales
from benchmarks import saturated_search
from benchmarks.real_folders import AbsentError, home_folder, model_folder
from benchmarks.real_runs import Request, candidates, configured
from benchmarks.timing import machine, parser, publish, table, torch_threads, with_threads

_ROOT = Path(__file__).resolve().parents[1]
Activations = Literal["int8", "uint8"]
ACTIVATIONS: tuple[Activations, ...] = ("int8", "uint8")
_ALPHAS = (0.35, 0.5, 0.65, 0.75, 0.85, 0.95)
HEADER = (
    *("model", "loss", "activations", "told", "served", "alpha chosen for it", "7 bits", "8 bits back where better"),
    "of what saturation adds, saved",
)


class Case:
    """One model: choices on its tuning samples, scores on its held-out ones."""

    def __init__(self, config: RunConfig, batches: Sequence[object] | None) -> None:
        self.candidate, statistics, task = candidates(config, batches)  # type: ignore[arg-type]
        self.scales = ModelScales(statistics)
        kind = loss_of_answers(self.candidate.model, task.held_out[0])
        self.kind = kind
        self.tuning = ModelObjective(self.candidate, task.judging, loss=kind)
        self.reserve = ModelObjective(self.candidate, task.held_out, loss=kind)

    def best(self, schemes: Scheme | SiteSchemes) -> Mapping[str, Smoothing]:
        """Smoothings of the alpha of lowest tuning loss."""
        self.candidate.use(schemes)
        found = [(self.tuning.loss(self.scales.single(alpha)), alpha) for alpha in _ALPHAS]
        print(schemes.name, " ".join(f"{alpha}:{loss:.5f}" for loss, alpha in found), flush=True)
        return self.scales.single(min(found)[1])

    def score(self, schemes: Scheme | SiteSchemes, smoothings: Mapping[str, Smoothing]) -> HeldOutScore:
        """On the held-out samples."""
        self.candidate.use(schemes)
        found = held_out_score(self.reserve, smoothings)
        if found is None:
            raise SystemExit("the output is not finite")
        return found

    def mixed(self, scheme: Scheme, smoothings: Mapping[str, Smoothing]) -> SiteSchemes:
        """Weights of 7 bits everywhere, but at the sites where 8 lower the tuning loss, one after the other."""
        seven = replace(scheme, weights="int7")
        kept = dict.fromkeys(smoothings, seven)
        self.candidate.use(SiteSchemes.build(scheme, kept))
        lowest = self.tuning.loss(smoothings)
        for site in smoothings:
            tried = kept | {site: scheme}
            self.candidate.use(SiteSchemes.build(scheme, tried))
            loss = self.tuning.loss(smoothings)
            if loss < lowest:
                kept, lowest = tried, loss
        eight = sum(s.weights == "int8" for s in kept.values())
        print(f"8 bits at {eight} of {len(smoothings)} sites", flush=True)
        return SiteSchemes.build(scheme, kept)


def line(name: str, case: Case, activations: Activations) -> list[str]:
    """A line of the first table."""
    exact = replace(Scheme(), activations=activations)
    pairs, seven = replace(exact, kernel="u8s8-pairs16"), replace(exact, weights="int7")
    with case.candidate.restored():
        before = case.best(exact)
        told, served = case.score(exact, before), case.score(pairs, before)
        chosen = case.best(pairs)
        aware = case.score(pairs, chosen)
        in_seven = case.best(seven)
        alone = case.score(seven, in_seven)
        mixed = case.score(case.mixed(pairs, in_seven), in_seven)
    gain = judged(served, mixed, case.reserve.weight)
    added = served.loss - told.loss
    saved = "-" if added <= 0 else f"{(served.loss - mixed.loss) / added:.0%}"
    error = "" if gain.standard_error is None else f" (+- {gain.standard_error / abs(added):.0%})"
    losses = [f"{score.loss:.5f}" for score in (told, served, aware, alone, mixed)]
    return [name, case.kind, activations, *losses, saved + error]


def searched_line(name: str, home: Path, work: Path) -> list[str]:
    """A line of the second table; runs that are in ``work`` are taken, or gone on with.

    Raises:
        AbsentError: Model or data are not here.
    """
    work.mkdir(parents=True, exist_ok=True)
    config, batches = saturated_search.configuration(name, home, work)
    runs = saturated_search.runs(config, batches, work)
    case = Case(config, batches)
    pairs = replace(Scheme(), kernel="u8s8-pairs16")
    with tempfile.TemporaryDirectory() as place:
        judge = saturated_search.judge_of(name, home, Path(place))
        with case.candidate.restored():
            smoothings = case.best(pairs)
            with case.candidate.applied(smoothings) as model:
                one_alpha = judge(model)
        return saturated_search.row(name, judge, runs, one_alpha, case.kind)


def kept(place: Path, make: Callable[[], list[str]]) -> list[str]:
    """A line that is kept in a file, made where it is not there yet."""
    if not place.is_file():
        made = make()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(made), encoding="utf-8")
        print(" | ".join(made), flush=True)
    known: list[str] = json.loads(place.read_text(encoding="utf-8"))
    return known


def lines_of(model: str, home: Path, work: Path) -> Iterator[list[str]]:
    """Lines of a model in the first table.

    Raises:
        AbsentError: Model or data are not here.
    """
    with tempfile.TemporaryDirectory() as place:
        case = cache(partial(case_of, model, home, Path(place)))
        for activations in ACTIVATIONS:
            yield kept(work / f"{model}-{activations}.json", partial(_line, model, case, activations))


def _line(name: str, case: Callable[[], Case], activations: Activations) -> list[str]:
    return line(name, case(), activations)


def case_of(model: str, home: Path, work: Path) -> Case:
    """A demo or a real model.

    Raises:
        AbsentError: Model or data are not here.
    """
    if model in ("image", "text"):
        return Case(RunConfig.build({"model": {"demo": model}}), None)
    request = Request(model=model, scheme="w8a8-channel-static", seed=0, short=True, sweep=False, home=home)
    return Case(*configured(request, model_folder(model, home), work))


def main() -> None:
    """Print the tables."""
    made = with_threads(parser(__doc__))
    made.add_argument("--home", type=Path, default=home_folder())
    made.add_argument("--models", nargs="*", default=["image", "text", "MiniLM", "DINOv2"])
    made.add_argument("--searched", nargs="*", default=["image", "text", "MiniLM"], help="models of the second table")
    made.add_argument("--work", type=Path, default=_ROOT / "build/saturation", help="where lines and runs are kept")
    given = made.parse_args()
    home, work = given.home.resolve(), given.work.resolve()
    lines: list[list[str]] = []
    searched: list[list[str]] = []
    with torch_threads(given.threads):
        where = machine()
        for model in given.models:
            try:
                lines += lines_of(model, home, work)
            except AbsentError as absent:
                print(f"left out: {absent}", flush=True)
        for model in given.searched:
            place = work / f"searched-{model}"
            try:
                searched.append(kept(place / "row.json", partial(searched_line, model, home, place)))
            except AbsentError as absent:
                print(f"left out: {absent}", flush=True)
    tables = [table(HEADER, lines)] if lines else []
    tables += [f"Small runs:\n\n{table(saturated_search.HEADER, searched)}"] if searched else []
    publish("SATURATION", "\n\n".join([where, *tables]), given.out)


if __name__ == "__main__":
    main()
