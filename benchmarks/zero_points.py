"""What a zero point alone makes of searched runs: the same search with symmetric and with asymmetric static activations.

    python -m benchmarks.zero_points [--models MiniLM Whisper DINOv2] [--seeds 0] [--short] [--resume] [--check]
                                     [--home FOLDER] [--work FOLDER] [--threads 1] [--out [docs/formats.md]]

Two runs of the main job with default settings on the same data, ``w8a8-channel-static`` and ``w8au8-channel-static``, each in a process of
its own (see benchmarks/real_models.py, whose findings are taken or made). Both quantized models are judged on the same samples
that neither run saw, so that the difference is paired. A zero point folds into the bias: both do the same multiply-adds. ``--check``
fails where the asymmetric loss is not at least 20 % below the symmetric one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from alphasmith.objectives.judge.candidate_batch import paired_difference
from benchmarks.real_folders import PACKAGES, AbsentError, home_folder
from benchmarks.real_models import difference, finding
from benchmarks.real_runs import Finding, Request
from benchmarks.timing import machine, publish, table

_ROOT = Path(__file__).resolve().parents[1]
_DOCUMENT = _ROOT / "docs/formats.md"
SYMMETRIC, ASYMMETRIC = "w8a8-channel-static", "w8au8-channel-static"
#: What a zero point is to take of the loss.
PROMISED = 0.2
HEADER = ("model", "seed", "loss", "samples", "int8", "uint8", "change", "metrics, uint8 against int8", "CPU [s]")


def row(symmetric: Finding, asymmetric: Finding) -> tuple[list[str], float]:
    """A line of the table, and the change of the loss relative to the symmetric one.

    Args:
        symmetric: Of the run without zero points.
        asymmetric: Of the run with them, judged on the same samples.
    """
    before, after = symmetric.judged["ours"], asymmetric.judged["ours"]
    change, error = paired_difference(after.errors, before.errors, before.energy)
    metrics = [
        f"{measure.name} {difference(measure, after.values[place].double(), before.values[place].double())}"
        for place, measure in enumerate(symmetric.measures)
    ]
    cells = [
        symmetric.request.model,
        str(symmetric.request.seed),
        "divergence [nats]" if symmetric.request.model in ("SmolLM2", "Whisper") else "relative squared error",
        str(len(before.errors)),
        f"{before.loss:.5f}",
        f"{after.loss:.5f}",
        f"{change / before.loss:+.1%} ± {error / before.loss:.1%}",
        "; ".join(metrics),
        f"{symmetric.cpu:.0f}, {asymmetric.cpu:.0f}",
    ]
    return cells, change / before.loss


def rows(model: str, seeds: Sequence[int], arguments: argparse.Namespace) -> list[tuple[list[str], float]]:
    """Lines of one model, see :func:`row`.

    Raises:
        AbsentError: Model or data are not here.
        RuntimeError: A run failed.
    """
    made = []
    for seed in seeds:
        pair = [
            finding(
                Request(
                    model=model,
                    scheme=scheme,
                    seed=seed,
                    short=arguments.short,
                    sweep=False,
                    home=arguments.home.resolve(),
                ),
                arguments.work,
                threads=arguments.threads,
                resume=arguments.resume,
            )
            for scheme in (SYMMETRIC, ASYMMETRIC)
        ]
        made.append(row(*pair))
        print(" | ".join(made[-1][0]), flush=True)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [p.name for p in PACKAGES]
    parser.add_argument("--models", nargs="*", default=["MiniLM", "Whisper", "DINOv2"], choices=names)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--short", action="store_true", help="less data to calibrate and to judge on")
    parser.add_argument("--resume", action="store_true", help="take the findings that are in --work")
    parser.add_argument(
        "--check", action="store_true", help="fail where a zero point takes less than 20 %% of the loss"
    )
    parser.add_argument("--home", type=Path, default=home_folder(), help="where packages and model folders are kept")
    parser.add_argument("--work", type=Path, default=_ROOT / "build" / "real_models", help="where findings are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=Path, nargs="?", const=_DOCUMENT, help="document; alone: docs/formats.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = machine()
    found: list[tuple[list[str], float]] = []
    for model in arguments.models:
        try:
            found += rows(model, arguments.seeds, arguments)
        except (AbsentError, RuntimeError) as error:
            print(f"left out: {error}", flush=True)
    if not found:
        print("nothing was run")
        return 1
    publish("ZERO_POINTS", f"{where}\n\n{table(HEADER, [cells for cells, _ in found])}", arguments.out)
    return int(arguments.check and any(change > -PROMISED for _, change in found))


if __name__ == "__main__":
    sys.exit(main())
