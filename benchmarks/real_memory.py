"""Peak memory of runs on real models: predicted before each starts, measured when it ends, each in a process of its own.

    python -m benchmarks.real_memory [--home DIR] [--models MiniLM Whisper] [--trials 4]

Short runs of ``benchmarks.real_runs`` with few trials a site; refinement, shares and advice as by default. Both figures are those of the
manifest: beyond the libraries, the model included. Measured is the kernel's peak resident size.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from dataclasses import dataclass
from pathlib import Path

from alphasmith.objectives.text import size_text
from alphasmith.search import run
from benchmarks.real_folders import AbsentError, home_folder, model_folder
from benchmarks.real_runs import Request, configured

MODELS = ("MiniLM", "Whisper", "DINOv2", "SmolLM2")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """One run [bytes].

    Attributes:
        predicted: Before it started.
        measured: At its end.
        parameters: Of the model as float32.
    """

    predicted: int
    measured: int
    parameters: int


def peak(name: str, home: Path, trials: int) -> Peak:
    """A run of one model in this process.

    Raises:
        AbsentError: Model or data are not here.
    """
    request = Request(model=name, scheme="w8a8-channel-static", seed=0, short=True, sweep=False, home=home)
    with tempfile.TemporaryDirectory() as work:
        config, batches = configured(request, model_folder(name, home), Path(work))
        config = config.model_copy(update={"search": config.search.model_copy(update={"trials": trials})})
        manifest = run(config, batches=batches).manifest
    measured = manifest.memory.measured
    if measured is None:
        raise AbsentError("this system does not tell a process its peak memory")
    return Peak(predicted=manifest.memory.predicted, measured=measured, parameters=4 * manifest.model.parameter_count)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=home_folder())
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--trials", type=int, default=4)
    given = parser.parse_args()
    print("| model | parameters, float32 | predicted | measured | predicted / measured |\n|---|---|---|---|---|")
    for name in given.models:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            try:
                found = pool.apply(peak, (name, given.home, given.trials))
            except AbsentError as error:
                print(f"| {name} | {error} | | | |", flush=True)
                continue
        sizes = " | ".join(size_text(value) for value in (found.parameters, found.predicted, found.measured))
        print(f"| {name} | {sizes} | {found.predicted / found.measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
