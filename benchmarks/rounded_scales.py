"""What ``round_scales = "pow2"`` costs real models, and whether undo gives the original's bytes.

    python -m benchmarks.rounded_scales [--models MiniLM ...] [--short] [--home FOLDER] [--work FOLDER] [--out [docs/cli.md]]

The small runs of ``benchmarks.exports`` (w8a8-channel-static, no shift), without and with rounding, judged on the data of ``benchmarks.real_models``,
which nobody saw; differences are paired, with the standard error over the samples. Every tensor of the undone model is compared with
the original's. Runs and lines that are in ``--work`` are taken.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from alphasmith.objectives.judge.candidate_batch import paired_difference
from alphasmith.search import load_quantized, load_smoothed
from alphasmith.search.checkpoints.verification import undo
from alphasmith.storage.output.result_folder import ResultFolder
from benchmarks.exports import Case, result_of
from benchmarks.real_folders import PACKAGES, AbsentError, home_folder, model_folder
from benchmarks.real_judges import SHORT, Judged, Measure, Sizes, make_judge
from benchmarks.real_runs import Request
from benchmarks.timing import machine, publish, table

_ROOT = Path(__file__).resolve().parents[1]
_DOCUMENT = _ROOT / "docs/cli.md"
_SCHEME = "w8a8-channel-static"
HEADER = (
    *("model", "folded sites rounded", "loss at the output: without, with (paired difference)"),
    "metrics: float, without, with (paired difference of the last two)",
    *("tensors that undo gives back to the bit: without", "with"),
)


def compared(made: Path, original: Path) -> str:
    """How many tensors of one checkpoint are those of another, byte by byte.

    Args:
        made: Folder of the undone model.
        original: Folder it was made from.
    """
    ours, theirs = _tensors(made), _tensors(original)
    if new := ours.keys() - theirs.keys():
        return f"{len(new)} of {len(ours)} are not in the original"
    same = sum(_same_bytes(ours[name], theirs[name]) for name in ours)
    # What transformers does not load, such as position ids that it makes itself, no model has.
    dropped = len(theirs) - len(ours)
    return f"{same} of {len(ours)}" + (f", {dropped} not loaded by transformers" if dropped else "")


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    return found


def _same_bytes(left: Tensor, right: Tensor) -> bool:
    same = left.dtype == right.dtype and left.shape == right.shape
    return same and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def row_of(request: Request, work: Path) -> list[str]:
    """A line of the table, kept beside the runs.

    Args:
        request: The model.
        work: Where runs are kept.

    Raises:
        AbsentError: Model or data are not here.
    """
    kept = work / f"{request.model}-rounded.json"
    if kept.is_file():
        known: list[str] = json.loads(kept.read_text(encoding="utf-8"))
        return known
    folder = model_folder(request.model, request.home)
    name = f"{request.model}-{request.scheme}"
    plain = result_of(Case(request=request, unsmoothed=False, work=work / name))
    rounded = result_of(Case(request=request, unsmoothed=False, rounded=True, work=work / f"{name}-rounded"))
    with tempfile.TemporaryDirectory() as place:
        undone = []
        for number, result in enumerate((plain, rounded)):
            undo(result, Path(place) / str(number))
            undone.append(compared(Path(place) / str(number), folder))
        judge = make_judge(request.model, folder, SHORT if request.short else Sizes(), Path(place))
        models = (load_smoothed(plain), load_quantized(plain), load_quantized(rounded))
        judged = [judge(model) for model in models]
    entry = ResultFolder(rounded).manifest.rounding
    row = [request.model, "-" if entry is None else str(entry.sites), _losses(*judged[1:])]
    row += [_metrics(judge.measures, *judged), *undone]
    kept.write_text(json.dumps(row), encoding="utf-8")
    print(" | ".join(row), flush=True)
    return row


def _losses(before: Judged, after: Judged) -> str:
    difference, error = paired_difference(after.errors, before.errors, before.energy)
    return f"{before.loss:.3g}, {after.loss:.3g} ({difference:+.2g} ± {error:.1g})"


def _metrics(measures: tuple[Measure, ...], plain: Judged, before: Judged, after: Judged) -> str:
    told = []
    for measure, a, b, c in zip(measures, plain.values, before.values, after.values, strict=True):
        difference = (c - b).double()
        error = float(difference.std()) / len(difference) ** 0.5
        values = ", ".join(f"{measure.value(values):.4g}" for values in (a, b, c))
        told.append(f"{measure.name}: {values} ({float(difference.mean()):+.4f} ± {error:.4f})")
    return "; ".join(told)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["MiniLM", "DINOv2"], choices=[p.name for p in PACKAGES])
    parser.add_argument("--short", action="store_true", help="judge on less data")
    parser.add_argument("--home", type=Path, default=home_folder(), help="where packages and model folders are kept")
    parser.add_argument("--work", type=Path, default=_ROOT / "build/exports", help="where results are kept")
    parser.add_argument("--out", type=Path, nargs="?", const=_DOCUMENT, help="document; alone: docs/cli.md")
    given = parser.parse_args()
    lines = []
    for model in given.models:
        request = Request(
            model=model, scheme=_SCHEME, seed=0, short=given.short, sweep=False, home=given.home.resolve()
        )
        try:
            lines.append(row_of(request, given.work.resolve()))
        except AbsentError as absent:
            print(f"left out: {absent}", flush=True)
    publish("ROUNDING", f"{machine()}\n\n{table(HEADER, lines)}", given.out)


if __name__ == "__main__":
    main()
