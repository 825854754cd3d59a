"""Real trained models on their real media and metric: float, naive, alpha 0.5, best single alpha, ours.

    python benchmarks/shared_models.py SHARED_DATA [--models kwt1 stories260k ...] [--schemes ...] [--out docs/shared_models.md]

SHARED_DATA is the folder with zoo.py and zoo_eval.py; it is not part of this repository.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search import RunConfig, RunResult, run


@dataclass(frozen=True)
class Case:
    """A folder, its metric and the direction of the metric."""

    folder: str
    metric: str
    higher_is_better: bool


CASES = (
    Case("kwt1", "accuracy", True),
    Case("stories260k", "perplexity", False),
    Case("stories260k_outlier", "perplexity", False),
    Case("rwkv5_730k", "bits_per_byte", False),
    Case("charlstm_shakespeare", "bits_per_char", False),
    Case("dtln", "si_sdr_out", True),
    Case("dtln_norm500h", "si_sdr_out", True),
    Case("resnet8_cifar10", "accuracy_cifar10_test200", True),
    Case("resnet20_cifar10", "accuracy_cifar10_test200", True),
    Case("resnet56_cifar10", "accuracy_cifar10_test200", True),
    Case("mobilenet_vww", "accuracy", True),
    Case("retsim", "recall_at_1_60pct_typos", True),
    Case("ad_autoencoder", "auc", True),
)
SCHEMES = ("w8a8-channel-static", "w8a8-channel-token", "w4a8-channel-static")


def scheme_section(name: str) -> dict[str, Any]:
    """The configuration section of a scheme's name."""
    return asdict(Scheme.parse(name))


def run_case(case: Case, scheme: str, data: Path, work: Path, trials: int) -> RunResult:
    """One run of the main job on a shared model."""
    zoo, zoo_eval = (importlib.import_module(name) for name in ("zoo", "zoo_eval"))
    folder = str(data / case.folder)
    model, _ = zoo.load_model(folder)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    metric: Callable[[nn.Module], float] = lambda m: zoo_eval.evaluate(folder, model=m)[case.metric]
    config = RunConfig.build(
        {
            "name": f"{case.folder} {scheme}",
            "storage": f"sqlite:///{work}/trials.db",
            "out": str(work / f"{case.folder}-{scheme}"),
            "scheme": scheme_section(scheme),
            "search": {"trials": trials},
            "data": {"metric_name": case.metric, "metric_goal": "max" if case.higher_is_better else "min"},
        }
    )
    return run(config, model=model, batches=zoo_eval.calib_batches(folder), metric=metric)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="*", default=[c.folder for c in CASES])
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.data.resolve()))
    lines = [
        "| model | metric | scheme | float | naive | alpha 0.5 | best single | ours | sites kept | median gain | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as work:
        for case in (c for c in CASES if c.folder in arguments.models):
            for scheme in arguments.schemes:
                start = time.perf_counter()
                result = run_case(case, scheme, arguments.data, Path(work), arguments.trials)
                lines.append(row(case, scheme, result, time.perf_counter() - start))
                print(lines[-1], flush=True)
    if arguments.out:
        where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        heading = f"<!-- made by benchmarks/shared_models.py -->\n# Shared models\n\nMachine: {where}.\n\n"
        arguments.out.write_text(heading + "\n".join(lines) + "\n", encoding="utf-8")


def row(case: Case, scheme: str, result: RunResult, seconds: float) -> str:
    """One line of the table."""
    (metric,) = result.manifest.output.metrics
    values = (metric.float_model, metric.naive, metric.alpha_half, metric.best_single, metric.ours)
    sites = result.sites.dropna(subset=["ours"])
    kept = int((sites["ours"] <= sites["best_single"]).sum())
    gain = (sites["ours"] / sites["best_single"]).median()
    figures = " | ".join("failed" if v is None else f"{v:.4f}" for v in values)
    return (
        f"| {case.folder} | {case.metric} | {scheme} | {figures} | {kept}/{len(sites)} | {gain:.3f} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
