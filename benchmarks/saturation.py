"""What kernels that saturate make of a search that takes products as exact, and what a search for them saves.

    python -m benchmarks.saturation [--models image text MiniLM DINOv2] [--threads 1] [--out docs/exports.md]

Loss at the model's output. One alpha for the whole model out of a few, and for every site 8 or 7 bits of weights, are chosen on the tuning
samples, for the kernel that the column names; what stands in the table is of the held-out samples. ``told`` is what a search for exact kernels
reports, ``served`` what a processor without VNNI delivers of the same model. Weights int8 per channel, activations static, signed and with a zero point.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from alphasmith.objectives.judge.answers import loss_of_answers
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.config import RunConfig
from alphasmith.search.model.held_out import HeldOutScore, held_out_score, judged
from alphasmith.search.model.search import ModelScales
from benchmarks.real_folders import AbsentError, home_folder, model_folder
from benchmarks.real_runs import Request, candidates, configured
from benchmarks.timing import machine, parser, publish, table, torch_threads, with_threads

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


def rows(name: str, case: Case) -> list[tuple[str, ...]]:
    """Two lines of the table."""
    made = []
    for activations in ("8", "u8"):
        exact = Scheme.parse(f"w8a{activations}-channel-static")
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
        made.append((name, case.kind, "int8" if activations == "8" else "uint8", *losses, saved + error))
        print(" | ".join(made[-1]), flush=True)
    return made


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
    """Print the table."""
    made = with_threads(parser(__doc__))
    made.add_argument("--home", type=Path, default=home_folder())
    made.add_argument("--models", nargs="*", default=["image", "text", "MiniLM", "DINOv2"])
    given = made.parse_args()
    lines: list[tuple[str, ...]] = []
    with torch_threads(given.threads):
        where = machine()
        for model in given.models:
            try:
                with tempfile.TemporaryDirectory() as work:
                    lines += rows(model, case_of(model, given.home.resolve(), Path(work)))
            except AbsentError as absent:
                print(f"left out: {absent}", flush=True)
    publish("SATURATION", f"{where}\n\n{table(HEADER, lines)}", given.out)


if __name__ == "__main__":
    main()
