"""What the format of activations alone makes of the loss at the output of a real model, under one alpha for the whole model.

    python -m benchmarks.activation_formats [--models MiniLM DINOv2 Whisper] [--threads 1] [--out]

Calibrated once a model, short form of the data; every format has the best of the alphas that are tried, on the held-out samples that are
reported, so all of them gain alike by the choice. ``shifted`` subtracts the middle of every channel first, where that can be folded:
the best that symmetric codes can have. int8 and uint8 cost the same multiply-adds. The same weights throughout: int8 per channel.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from alphasmith.objectives.judge.answers import loss_of_answers
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.model.search import ModelScales
from benchmarks.real_folders import AbsentError, home_folder, model_folder
from benchmarks.real_runs import Request, candidates, configured
from benchmarks.timing import machine, parser, publish, table, torch_threads, with_threads

_ALPHAS = (0.5, 0.65, 0.8, 0.9)
_OWN = "w8a8-channel-static"
FORMATS = (
    ("int8", _OWN, False),
    ("int8 shifted", _OWN, True),
    ("uint8", "w8au8-channel-static", False),
    ("uint8 shifted", "w8au8-channel-static", True),
    ("int8 per token", "w8a8-channel-token", False),
    ("int16", "w8ai16-channel-static", False),
    ("float", "w8a16-channel", False),
)
HEADER = ("model", "loss", *(name for name, _, _ in FORMATS), "best uint8 / best int8")


def losses(model: str, home: Path, work: Path) -> tuple[str, list[float]]:
    """Kind of the loss, and the least of it in every format.

    Raises:
        AbsentError: Model or data are not here.
    """
    request = Request(model=model, scheme=_OWN, seed=0, short=True, sweep=False, home=home)
    config, batches = configured(request, model_folder(model, home), work)
    candidate, sites, task = candidates(config, batches)
    judge = ModelObjective(candidate, task.held_out, loss=loss_of_answers(candidate.model, task.held_out[0]))
    scales = ModelScales(sites)
    found = []
    with candidate.restored():
        for name, scheme, shifted in FORMATS:
            candidate.use(Scheme.parse(scheme))
            of_alphas = [
                judge.loss(_shifted(candidate, scales.single(a)) if shifted else scales.single(a)) for a in _ALPHAS
            ]
            found.append(min(of_alphas))
            print(model, name, " ".join(f"{loss:.5f}" for loss in of_alphas), flush=True)
    return judge.kind, found


def _shifted(candidate: CandidateModel, smoothings: Mapping[str, Smoothing]) -> dict[str, Smoothing]:
    """Smoothings that centre every channel where the site can take a shift."""
    made = dict(smoothings)
    for site in candidate.sites:
        if site.shiftable and site.name in made:
            made[site.name] = replace(made[site.name], shift=candidate.ranges[site.name].middle(site.ties))
    return made


def row(model: str, kind: str, found: list[float]) -> tuple[str, ...]:
    """One line of the table."""
    symmetric, asymmetric = min(found[:2]), min(found[2:4])
    return (model, kind, *(f"{loss:.5f}" for loss in found), f"{asymmetric / symmetric:.2f}")


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    arguments_of.add_argument("--home", type=Path, default=home_folder())
    arguments_of.add_argument("--models", nargs="*", default=["MiniLM", "DINOv2", "Whisper"])
    arguments = arguments_of.parse_args()
    rows = []
    with torch_threads(arguments.threads):
        where = machine()
        for model in arguments.models:
            try:
                with tempfile.TemporaryDirectory() as work:
                    rows.append(row(model, *losses(model, arguments.home.resolve(), Path(work))))
                print(" | ".join(rows[-1]), flush=True)
            except AbsentError as absent:
                print(f"left out: {absent}", flush=True)
    publish("ACTIVATION_FORMATS", f"{where}\n\n{table(HEADER, rows)}", arguments.out)


if __name__ == "__main__":
    main()
