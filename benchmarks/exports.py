"""Exports as compressed-tensors: the metric in their consumer against our module on the same data, and what an export costs.

    python -m benchmarks.exports [--models MiniLM ...] [--schemes w8a8-channel-static ...] [--unsmoothed] [--short] [--large]
                                 [--home FOLDER] [--work FOLDER] [--out [docs/exports.md]]

A real model is searched in a small way (few samples, few trials, no division or shift at run time, for which the layout has no place), exported by a process of
its own whose time and highest memory are measured, and loaded by transformers. It and our module are judged on the data of benchmarks/real_models.py,
which nobody saw; differences are paired, with the standard error over the samples. ``--unsmoothed`` searches every model with divisions at run time,
too, and exports it without them (``unsmoothed_sites``). ``--large`` exports a generated model as well, which is only measured. Results
and lines that are in ``--work`` are taken, so that a table can be made in several commands.

Memory of an export is counted above that of a process that has imported what it needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from alphasmith.objectives.judge.candidate_batch import paired_difference
from alphasmith.objectives.judge.memory import peak_bytes, resident_bytes
from alphasmith.objectives.text import size_text
from alphasmith.search import RunConfig, export, load_quantized, load_smoothed, run
from benchmarks.real_folders import PACKAGES, AbsentError, home_folder, model_folder
from benchmarks.real_judges import SHORT, Judged, Measure, Sizes, make_judge
from benchmarks.real_runs import Request, configured
from benchmarks.timing import machine, publish, table

_ROOT = Path(__file__).resolve().parents[1]
_DOCUMENT = _ROOT / "docs/exports.md"
#: How a run is made that is only to be exported.
_SMALL = {"trials": 8, "rows": 256, "refine": False, "single_alphas": 5, "shift": ["none"]}
_LARGE = "generated"
#: Of language models: what is compared is the export with our module, however good the alphas are.
_LEAST = _SMALL | {"trials": 4, "rows": 64, "noise_model": False}
_WORDS = 32
#: Static ranges would be calibrated again on data that a run of these models was given in memory.
_UNSMOOTHED = "w8a8-channel-token"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an export took.

    Attributes:
        model: Bytes of the float checkpoint.
        layer: Bytes of its largest tensor.
        written: Bytes of the export.
        peak: Highest memory beyond that of the imports [bytes].
        wall: [s].
        cpu: [s].
    """

    model: int
    layer: int
    written: int
    peak: int
    wall: float
    cpu: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """A line of the table.

    Attributes:
        request: The model, by name, and the scheme; ``generated`` is calibrated on the texts of SmolLM2.
        unsmoothed: Search with divisions at run time, and export without them.
        work: Folder of this line.
        rounded: Round scales to powers of two in the end.
    """

    request: Request
    unsmoothed: bool
    work: Path
    rounded: bool = False

    @property
    def scheme(self) -> str:
        """As the table names it."""
        return f"{self.request.scheme}, --unsmoothed-sites" if self.unsmoothed else self.request.scheme


def result_of(case: Case) -> Path:
    """The output folder of a small run, made where it is not there yet.

    Args:
        case: The line.

    Raises:
        AbsentError: Model or data are not here.
    """
    request, folder = case.request, case.work
    if (folder / "out" / "manifest.json").is_file():
        return folder / "out"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "clips", ignore_errors=True)  # of a run that was interrupted: the same are written again
    read = model_folder("SmolLM2" if request.model == _LARGE else request.model, request.home)
    if request.model == _LARGE:
        request = dataclasses.replace(request, model="SmolLM2")
    config, batches = configured(dataclasses.replace(request, short=True), read, folder)
    values = config.model_dump()
    values["data"] = {n: v for n, v in values["data"].items() if n not in ("metric_name", "metric_goal")}
    values["model"]["path"] = read
    values["sites"]["explicit"] = "auto" if case.unsmoothed else "never"
    values["search"] |= _LEAST if request.model == "SmolLM2" else _SMALL
    values["round_scales"] = "pow2" if case.rounded else "none"
    if case.request.model == _LARGE:
        # Only measured: on a few words, block by block.
        values["model"]["path"] = _generated(folder / "model")
        values["memory"]["mode"] = "blockwise"
        batches = [{"input_ids": batch["input_ids"][:, :_WORDS]} for batch in batches or ()]
    return run(RunConfig.build(values), batches=batches).folder


def _generated(target: Path) -> Path:
    """A LLaMA of random weights, 1.5 GB in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (target / "config.json").is_file():
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=1536,
            intermediate_size=4096,
            num_hidden_layers=11,
            num_attention_heads=24,
            num_key_value_heads=8,
            tie_word_embeddings=True,
            architectures=["LlamaForCausalLM"],
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(target)
    return target


def cost_of(result: Path, out: Path, *, unsmoothed: bool) -> Cost:
    """Export in a process of its own, which tells what it took.

    Args:
        result: Of a run.
        out: Target; must not exist.
        unsmoothed: Export without divisions at run time.
    """
    command = [sys.executable, "-m", "benchmarks.exports", "--measure", str(result), str(out)]
    command += ["--unsmoothed"] if unsmoothed else []
    done = subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def _measure(result: Path, out: Path, *, unsmoothed: bool) -> None:
    """The work of :func:`cost_of`; what an export imports is imported before."""
    from transformers import AutoConfig, AutoModel

    files = sorted((result / "smoothed").glob("*.safetensors"))
    sizes = [size for file in files for size in _tensor_sizes(file)]
    with torch.device("meta"):
        AutoModel.from_config(AutoConfig.from_pretrained(result / "smoothed"))
    before, wall, cpu = resident_bytes(), time.perf_counter(), time.process_time()
    made = export(result, "compressed-tensors", out, unsmoothed_sites=unsmoothed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    cost = Cost(
        model=sum(file.stat().st_size for file in files),
        layer=max(sizes),
        written=made.bytes,
        peak=peak_bytes() - before,
        wall=wall,
        cpu=cpu,
    )
    print(json.dumps(asdict(cost)))


def _tensor_sizes(file: Path) -> Iterator[int]:
    """Bytes of every tensor of a file, from its head alone."""
    with file.open("rb") as stream:
        head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    for name, entry in head.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield end - begin


def _consumer(folder: Path) -> nn.Module:
    """An export as transformers loads it by the lines of its own model card."""
    lines = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    with tempfile.TemporaryDirectory() as place:
        script = Path(place) / "card.py"
        script.write_text(lines.replace('"FOLDER"', repr(str(folder))), encoding="utf-8")
        model: nn.Module = runpy.run_path(str(script))["model"]
    return model.eval()


def _paired(measure: Measure, ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """Difference of a measure's mean over samples, with its standard error."""
    difference = (theirs - ours).double()
    error = float(difference.std()) / len(difference) ** 0.5
    unit = " nats" if measure.exponential else ""
    return f"{float(difference.mean()):+.4f} ± {error:.4f}{unit}"


def _row(case: Case, judged: Sequence[Judged], measures: Sequence[Measure], cost: Cost) -> list[str]:
    plain, ours, theirs = judged
    shown = [
        f"{m.name}: {m.value(a):.4g}, {m.value(b):.4g}, {m.value(c):.4g} ({_paired(m, b, c)})"
        for m, a, b, c in zip(measures, plain.values, ours.values, theirs.values, strict=True)
    ]
    difference, error = paired_difference(theirs.errors, ours.errors, ours.energy)
    losses = f"{ours.loss:.3g}, {theirs.loss:.3g} ({difference:+.2g} ± {error:.1g})"
    return [case.request.model, case.scheme, losses, "; ".join(shown), *_cost_cells(cost)]


def _cost_cells(cost: Cost) -> list[str]:
    return [
        f"{size_text(cost.model)} -> {size_text(cost.written)}",
        f"{size_text(cost.peak)} of {size_text(cost.model + cost.layer)}",
        f"{cost.wall:.1f}, {cost.cpu:.1f}",
    ]


def _judged(request: Request, result: Path, exported: Path) -> tuple[list[Judged], tuple[Measure, ...]]:
    """The float model, our module and the consumer's on the same data."""
    folder = model_folder(request.model, request.home)
    with tempfile.TemporaryDirectory() as place:
        judge = make_judge(request.model, folder, SHORT if request.short else Sizes(), Path(place))
        made = [judge(load_smoothed(result)), judge(load_quantized(result)), judge(_consumer(exported))]
        return made, judge.measures


def row_of(case: Case) -> list[str]:
    """A line of the table, kept in the folder of the case.

    Args:
        case: The line.
    """
    kept, exported = case.work / "row.json", case.work / "served"
    if kept.is_file():
        known: list[str] = json.loads(kept.read_text(encoding="utf-8"))
        return known
    shutil.rmtree(exported, ignore_errors=True)
    name = case.request.model
    try:
        result = result_of(case)
        cost = cost_of(result, exported, unsmoothed=case.unsmoothed)
        if name == _LARGE:
            row = [name, case.scheme, "-", "-", *_cost_cells(cost)]
        else:
            row = _row(case, *_judged(case.request, result, exported), cost)
    except AbsentError as error:
        return [name, case.scheme, "-", str(error), "-", "-", "-"]
    kept.write_text(json.dumps(row), encoding="utf-8")
    print(" | ".join(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="*", default=["SmolLM2", "MiniLM", "DINOv2", "Whisper"], choices=[p.name for p in PACKAGES]
    )
    parser.add_argument("--schemes", nargs="*", default=["w8a8-channel-static", "w8a8-channel-token", "w4a16-g64"])
    parser.add_argument("--unsmoothed", action="store_true", help="export with divisions left out, too")
    parser.add_argument("--short", action="store_true", help="judge on less data")
    parser.add_argument("--large", action="store_true", help="measure a generated model of 1.5 GB, too")
    parser.add_argument("--home", type=Path, default=home_folder(), help="where packages and model folders are kept")
    parser.add_argument("--work", type=Path, default=_ROOT / "build/exports", help="where results are kept")
    parser.add_argument("--out", type=Path, nargs="?", const=_DOCUMENT, help="document; alone: docs/exports.md")
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        _measure(*arguments.measure, unsmoothed=arguments.unsmoothed)
        return
    asked = [(model, scheme, False) for model in arguments.models for scheme in arguments.schemes]
    asked += [(model, _UNSMOOTHED, True) for model in arguments.models] if arguments.unsmoothed else []
    asked += [(_LARGE, "w8a8-channel-token", False)] if arguments.large else []
    cases = [
        Case(
            request=Request(
                model=m, scheme=s, seed=0, short=arguments.short, sweep=False, home=arguments.home.resolve()
            ),
            unsmoothed=unsmoothed,
            work=arguments.work.resolve() / f"{m}-{s}{'-unsmoothed' if unsmoothed else ''}",
        )
        for m, s, unsmoothed in asked
    ]
    names = (
        "model",
        "scheme",
        "output loss: our module, consumer",
        "metrics: float, our module, consumer (paired difference of the last two)",
        "size",
        "peak memory, model plus one tensor",
        "seconds: wall, CPU",
    )
    publish("EXPORTS", f"{machine()}\n\n{table(names, [row_of(case) for case in cases])}", arguments.out)


if __name__ == "__main__":
    main()
