"""ONNX exports of results in ONNX Runtime: what they compute against our module on the same data, how fast against its own float, sizes.

    python -m benchmarks.onnx_export FOLDER... [--length 128] [--repeats 9] [--threads 1 2] [--batches 1 16] [--samples 16] [--out [docs/exports.md]]

FOLDERs are output folders of runs on models of transformers with one graph. The float model is ``smoothed/``, written by the same exporter. Errors are relative squared
errors at the main output against the float model in torch, on the held-out samples of the run where they are found again, else on random
tokens; the difference is paired, with its standard error over samples. Times are of interleaved calls: a round calls every model once,
and each ratio is a median over rounds.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.objectives.judge.candidate_batch import paired_difference
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.search import export, load_quantized, load_smoothed
from alphasmith.search.checkpoints.verification import original_config
from alphasmith.search.exports.onnx.examples import example
from alphasmith.search.exports.onnx.tracing import trace
from alphasmith.search.inputs.task import load_task
from alphasmith.storage.output.result_folder import ResultFolder
from benchmarks.timing import machine, median, publish, table

LAYOUTS = ("ort-u8", "qdq")
DOCUMENT = Path(__file__).resolve().parents[1] / "docs/exports.md"


def main() -> None:
    """Print the tables, and put them into the document where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--out", type=Path, nargs="?", const=DOCUMENT)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        _write(given.folders[0], *given.write)
        return
    torch.set_num_threads(1)
    told = machine()
    quality: list[list[object]] = []
    speed: list[list[object]] = []
    for folder in given.folders:
        with tempfile.TemporaryDirectory() as work:
            written, facts = _exports(folder, Path(work))
            quality += _quality(folder, written, facts, given.samples, given.length)
            for threads in given.threads:
                for batch in given.batches:
                    speed.append(_speed(folder, written, threads, batch, given.length, given.repeats))
    first = table(
        ["model", "layout", "file [MB]", "export [s]", "peak [MB]", "our error", "its error", "difference"], quality
    )
    second = table(
        ["model", "threads", "batch", "float [ms]", *(f"{name}, speed over float" for name in LAYOUTS)], speed
    )
    text = f"{told}\n\n{first}\n\n{given.length} tokens, where the model takes any number:\n\n{second}"
    print(text)
    publish("ONNX", text, given.out)


def _exports(folder: Path, work: Path) -> tuple[dict[str, Path], dict[str, tuple[float, int]]]:
    """Files by layout and ``float``; seconds and highest memory [bytes] of each, in a process of its own."""
    files: dict[str, Path] = {}
    facts: dict[str, tuple[float, int]] = {}
    for name in ("float", *LAYOUTS):
        start = time.perf_counter()
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.onnx_export",
            str(folder),
            "--write",
            name,
            str(work / name),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        facts[name] = (time.perf_counter() - start, int(done.stdout.split()[-1]))
        files[name] = work / name / "model.onnx"
    return files, facts


def _write(folder: Path, name: str, target: str) -> None:
    """One export; prints the highest memory of this process [bytes]."""
    if name == "float":
        model = load_smoothed(folder)
        made = trace(model, example(model, _processor(folder))).model
        Path(target).mkdir()
        onnx_ir.save(made, Path(target) / "model.onnx", external_data="model.onnx.data")
    else:
        export(folder, "onnx", target, layout=name)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _processor(folder: Path) -> dict[str, Any]:
    result = ResultFolder(folder)
    name = "smoothed/preprocessor_config.json"
    return result.read_json(name) if result.has(name) else {}


def _quality(
    folder: Path, files: dict[str, Path], facts: dict[str, tuple[float, int]], samples: int, length: int
) -> Iterator[list[object]]:
    """A row for every layout."""
    float_model, ours = load_smoothed(folder), load_quantized(folder)
    batches = list(_batches(folder, float_model, samples, length))
    with torch.no_grad():
        expected = [main_output(call(float_model, batch)).double() for batch in batches]
        answers = [main_output(call(ours, batch)).double() for batch in batches]
    energy = float(sum(float((value**2).sum()) for value in expected))
    mine = _errors(expected, answers)
    for layout in LAYOUTS:
        session = _session(files[layout], 1)
        found = [torch.from_numpy(session.run(None, _numbers(batch, session))[0]).double() for batch in batches]
        theirs = _errors(expected, found)
        change, scatter = paired_difference(theirs, mine, energy)
        seconds, peak = facts[layout]
        size = sum(file.stat().st_size for file in files[layout].parent.glob("model.onnx*")) / 1e6
        whole = sum(file.stat().st_size for file in files["float"].parent.glob("model.onnx*")) / 1e6
        own, other = float(mine.sum()) / energy, float(theirs.sum()) / energy
        yield [
            folder.name if folder.name != "out" else folder.parent.name,
            layout,
            f"{size:.1f} of {whole:.1f}",
            f"{seconds:.0f}",
            f"{peak / 1e6:.0f}",
            f"{own:.4g}",
            f"{other:.4g}",
            f"{change:+.2g} ± {scatter:.1g}",
        ]


def _errors(expected: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
    """Squared error of every sample."""
    return torch.cat([((a - b) ** 2).flatten(1).sum(1) for a, b in zip(expected, found, strict=True)])


def _batches(folder: Path, model: nn.Module, samples: int, length: int) -> Iterator[Batch]:
    """Held-out samples of the run, else random tokens, one batch a sample."""
    manifest = ResultFolder(folder).manifest
    config = original_config(manifest, None, None, None, None)
    if config.data.path is not None:
        try:
            task = load_task(config)
        except AlphasmithError:
            task = None
        if task is not None:
            single = [batch.narrow(i, i + 1) for batch in task.held_out for i in range(batch.size)]
            yield from single[:samples]
            return
    generator = torch.Generator().manual_seed(0)
    made = example(model, _processor(folder))
    for _ in range(samples):
        yield _sized(made, model, 1, length, generator)


def _sized(made: Batch, model: nn.Module, batch: int, length: int, generator: torch.Generator) -> Batch:
    """An example of another batch and length, with random content."""
    config: Any = model.config
    given: dict[str, Tensor] = {}
    for name, value in made.kwargs.items():
        if name == "input_ids":
            given[name] = torch.randint(1, int(config.vocab_size), (batch, length), generator=generator)
        elif value.is_floating_point():
            given[name] = torch.randn(batch, *value.shape[1:], generator=generator)
        else:
            given[name] = value[:1, :1].expand(batch, length).contiguous()
    return Batch(kwargs=given)


def _session(file: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _numbers(batch: Batch, session: Any) -> dict[str, NDArray[Any]]:
    """What a graph takes of a batch; kinds of tokens that the batch leaves to the model are 0."""
    given = {name: value.numpy() for name, value in batch.kwargs.items()}
    return {
        v.name: given[v.name] if v.name in given else np.zeros_like(given["input_ids"]) for v in session.get_inputs()
    }


def _speed(folder: Path, files: dict[str, Path], threads: int, batch: int, length: int, repeats: int) -> list[object]:
    """Median time of the float model, and how many times as fast every layout is."""
    model = load_smoothed(folder)
    made = _sized(example(model, _processor(folder)), model, batch, length, torch.Generator().manual_seed(1))
    sessions = {name: _session(file, threads) for name, file in files.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    clock = time.process_time if threads == 1 else time.perf_counter
    for round_ in range(repeats + 1):
        for name, session in sessions.items():
            numbers = _numbers(made, session)
            start = clock()
            session.run(None, numbers)
            if round_:
                times[name].append(clock() - start)
    base = np.array(times["float"])
    ratios = [median(list(base / np.array(times[name]))) for name in LAYOUTS]
    name = folder.name if folder.name != "out" else folder.parent.name
    return [name, threads, batch, f"{1e3 * median(list(base)):.1f}", *(f"{ratio:.2f}" for ratio in ratios)]


if __name__ == "__main__":
    main()
