"""ONNX exports in ONNX Runtime: what they compute against our module on the same data, how fast against their own float model, what they cost.

    python -m benchmarks.onnx_export [--models MiniLM ...] [--layouts ort-u8 ...] [--threads 1 2] [--repeats 9] [--again] [--anew]
                                     [--home FOLDER] [--work FOLDER] [--out [docs/exports.md]]

The demos, the models of the shared data folder and the real ones (benchmarks/real_models.py), each searched in a small way. Exports are
written by processes of their own, whose time and highest memory are measured; the float model is ``smoothed/`` out of the same exporter.
Results, exports and figures that are in ``--work`` are taken, so that the tables can be made in several commands: they show every model
that has figures. ``--again`` measures the chosen models again, ``--anew`` also writes their exports again; ``--models`` without names only makes the tables.

Errors are relative squared errors at the main output against the float model in torch, or divergences of logits [nats] of language and speech models,
on data that no run saw; differences are paired, with their standard error over samples. Times are of interleaved calls, of one thread of the
process' CPU, else of the clock on the wall: a round calls every model once, and each ratio is a median over rounds.

Under benchmarks/narrow_runtime.py exports are shared with other calls; figures are kept, and put into the document, apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.objectives.judge.candidate_batch import paired_difference
from alphasmith.objectives.judge.memory import peak_bytes
from alphasmith.search import export
from alphasmith.search.exports.onnx.models import float_models
from alphasmith.storage.output.result_folder import ResultFolder
from benchmarks.onnx_cases import SCHEME, Case, cases
from benchmarks.onnx_graphs import EncoderDecoder, GraphModel, loaded
from benchmarks.real_folders import AbsentError, home_folder
from benchmarks.real_judges import Judged, Measure
from benchmarks.timing import KERNELS_VARIABLE, interleaved_times, machine, median, publish, speedup, table

Variants = Mapping[str, tuple[str, bool]]
LAYOUTS = ("ort-u8", "ort-s8", "qdq")
#: What is run: a layout, and whether the session option that its card names is set.
_VARIANTS = {
    "ort-u8": ("ort-u8", False),
    "ort-s8": ("ort-s8", False),
    "qdq": ("qdq", True),
    "qdq, no option": ("qdq", False),
}
_ROOT = Path(__file__).resolve().parents[1]
_DOCUMENT = _ROOT / "docs/exports.md"


@dataclass(frozen=True, kw_only=True)
class Written:
    """An export, or what was told in its place.

    Attributes:
        refusal: Why there is none; empty: there is one.
        size: Of the graphs and their weights; of a causal language model without the graph that takes keys and values [bytes].
        seconds: Wall time of the export.
        peak: Highest memory of its process [bytes].
    """

    refusal: str = ""
    size: int = 0
    seconds: float = 0.0
    peak: int = 0


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the tables say of a model."""

    costs: Sequence[Sequence[object]]
    quality: Sequence[Sequence[object]] = ()
    speed: Sequence[Sequence[object]] = ()


def main() -> None:
    """Print the tables, and put them into the document where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="default: all")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--again", action="store_true", help="measure again what has figures")
    parser.add_argument("--anew", action="store_true", help="the same, and write exports that are there again")
    parser.add_argument("--home", type=Path, default=home_folder(), help="where packages and model folders are kept")
    parser.add_argument("--work", type=Path, default=_ROOT / "build/onnx", help="where results and exports are kept")
    parser.add_argument("--out", type=Path, nargs="?", const=_DOCUMENT, help="document; alone: docs/exports.md")
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    known = cases(given.work.resolve(), given.home.resolve())
    if given.write:
        name, layout, target = given.write
        _write(known[name], layout, Path(target))
        return
    torch.set_num_threads(1)
    chosen = list(known) if given.models is None else given.models
    if unknown := set(chosen) - set(known):
        parser.error(f"--models: {', '.join(sorted(unknown))} unknown; one of {', '.join(known)}")
    for case in (known[name] for name in chosen):
        if given.again or given.anew or not _kept(case).is_file():
            start = time.perf_counter()
            rows = _measured(case, given)
            _kept(case).write_text(json.dumps(asdict(rows)), encoding="utf-8")
            print(f"{case.name}: {time.perf_counter() - start:.0f} s", rows, flush=True)
    found = [
        Rows(**json.loads(_kept(case).read_text(encoding="utf-8"))) for case in known.values() if _kept(case).is_file()
    ]
    publish(f"ONNX{_kernels()}", _text(found, given.threads), given.out)


def _kernels() -> str:
    """What the libraries are kept to, as a part of names; empty: to nothing."""
    limit = os.environ.get(KERNELS_VARIABLE)
    return f"-{limit}" if limit else ""


def _kept(case: Case) -> Path:
    return case.work / f"rows{_kernels()}.json"


def _measured(case: Case, given: argparse.Namespace) -> Rows:
    load = os.getloadavg()[0]
    try:
        written = {name: _exported(case, name, given) for name in ("float", *given.layouts)}
    except (AbsentError, AlphasmithError) as error:
        return Rows(costs=[[case.name, "-", "-", "-", "-", str(error)]])
    if any(written[layout].refusal for layout in given.layouts):
        return Rows(costs=[_cost(case, written)])
    variants = {name: run for name, run in _VARIANTS.items() if run[0] in given.layouts}
    quality = list(_quality(case, variants))
    speed = [] if written["float"].refusal else list(_speed(case, variants, given, load))
    return Rows(costs=[_cost(case, written)], quality=quality, speed=speed)


def _text(found: Sequence[Rows], threads: Sequence[int]) -> str:
    errors = ["model", "", "metric: float, our module, export", "our error", "its error", "difference"]
    timed = [
        "model",
        "batch",
        *(f"{n} thread{'s' * (n > 1)}: float [ms]; {'; '.join(_VARIANTS)}" for n in threads),
        "load",
    ]
    paid = [
        "model",
        f"float, {', '.join(LAYOUTS)} [MB]",
        "export [s]",
        "peak of its process [MB]",
        "operators",
        "notes",
    ]
    return "\n\n".join(
        (
            machine(),
            f"Results are of `{SCHEME}`. Metric and error in ONNX Runtime and in our module:",
            table(errors, [row for rows in found for row in rows.quality]),
            "Time of the float model in ONNX Runtime, and how many times as fast the exports are:",
            table(timed, [row for rows in found for row in rows.speed]),
            "What the exports take:",
            table(paid, [row for rows in found for row in rows.costs]),
        )
    )


# ------------------------------------------------------------------------------------------------------------------- exports


def _exported(case: Case, layout: str, given: argparse.Namespace) -> Written:
    """An export in the case's folder, made where it is not there yet."""
    folder = _folder(case, layout)
    facts = folder.with_suffix(".json")
    if facts.is_file() and not given.anew:
        return Written(**json.loads(facts.read_text(encoding="utf-8")))
    _ = case.result
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.onnx_export",
        "--write",
        case.name,
        layout,
        str(folder),
    ]
    command += ["--work", str(given.work.resolve()), "--home", str(given.home.resolve())]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=_ROOT, check=False, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    lines = (done.stdout if not done.returncode else done.stderr).splitlines()
    if done.returncode:
        made = Written(refusal=next((line for line in reversed(lines) if line.strip()), "no word"))
    else:
        graphs = [file for file in folder.glob("*.onnx*") if "_with_past" not in file.name]
        size = sum(file.stat().st_size for file in graphs)
        made = Written(size=size, seconds=seconds, peak=int(lines[-1]))
    facts.write_text(json.dumps(asdict(made)), encoding="utf-8")
    return made


def _folder(case: Case, layout: str) -> Path:
    return case.work / f"graph-{layout}"


def _write(case: Case, layout: str, target: Path) -> None:
    """One export; prints the highest memory of this process [bytes]."""
    torch.set_num_threads(1)
    try:
        if layout == "float":
            target.mkdir(parents=True)
            for stem, model in float_models(case.float_model(), case.traced, _processor(case)).items():
                onnx_ir.save(model, target / f"{stem}.onnx", external_data=f"{stem}.onnx.data")
        else:
            export(case.result, "onnx", target, layout=layout, model=case.architecture, batch=case.traced)
    except AlphasmithError as error:
        sys.exit(str(error))
    print(peak_bytes())


def _processor(case: Case) -> Mapping[str, Any]:
    result = ResultFolder(case.result)
    name = "smoothed/preprocessor_config.json"
    found: Mapping[str, Any] = result.read_json(name) if result.has(name) else {}
    return found


def _cost(case: Case, written: Mapping[str, Written]) -> list[object]:
    refusal = next((one.refusal for one in reversed(list(written.values())) if one.refusal), "")
    layouts = [layout for layout in LAYOUTS if layout in written]
    if any(written[layout].refusal for layout in layouts):
        return [case.name, "-", "-", "-", "-", refusal]
    record = json.loads((_folder(case, layouts[0]) / "export.json").read_text(encoding="utf-8"))
    left = [note for note in record["notes"] if "float one" in note or note.startswith("no ")]
    of = [written.get(layout) for layout in LAYOUTS]
    return [
        case.name,
        ", ".join(f"{one.size / 1e6:.1f}" if one else "-" for one in (written["float"], *of)),
        ", ".join(f"{one.seconds:.0f}" if one else "-" for one in of),
        ", ".join(f"{one.peak / 1e6:.0f}" if one else "-" for one in of),
        len(record["operators"]),
        "; ".join([*left, refusal] if refusal else left),
    ]


# ------------------------------------------------------------------------------------------------------------------- quality


def _quality(case: Case, variants: Variants) -> Iterator[list[object]]:
    """A row for every layout."""
    with tempfile.TemporaryDirectory() as place:
        judge = case.judge(Path(place))
        plain, ours = judge(case.float_model()), judge(case.quantized())
        for name, (layout, exact) in variants.items():
            theirs = judge(loaded(_folder(case, layout), exact=exact))
            change, scatter = paired_difference(theirs.errors, ours.errors, plain.energy)
            yield [
                case.name,
                name,
                "; ".join(_metrics(judge.measures, plain, ours, theirs)),
                f"{ours.loss:.4g}",
                f"{theirs.loss:.4g}",
                f"{change:+.2g} ± {scatter:.1g}",
            ]


def _metrics(measures: Sequence[Measure], *judged: Judged) -> Iterator[str]:
    for number, measure in enumerate(measures):
        values = [one.values[number] for one in judged]
        shown = ", ".join(f"{measure.value(value):.4g}" for value in values)
        yield f"{measure.name}: {shown}{_paired(values[2] - values[1])}"


def _paired(difference: Tensor) -> str:
    if len(difference) < 2:
        return ""
    return f" ({float(difference.mean()):+.2g} ± {float(difference.std()) / len(difference) ** 0.5:.1g})"


# --------------------------------------------------------------------------------------------------------------------- speed


def _speed(case: Case, variants: Variants, given: argparse.Namespace, load: float) -> Iterator[list[object]]:
    """A row for every part and size: median time of the float model, and how many times as fast every layout is."""
    runs = {"float": ("float", False), **variants}
    cells: dict[tuple[str, int], list[str]] = {}
    for count in given.threads:
        models = {n: loaded(_folder(case, layout), count, exact=exact) for n, (layout, exact) in runs.items()}
        for size in case.sizes:
            for part, calls in _calls(models, case, size).items():
                clock = time.process_time if count == 1 else time.perf_counter
                times = interleaved_times(calls, given.repeats, clock)
                ratios = [_ratio(times, name) for name in _VARIANTS]
                shown = f"{1e3 * median(times['float']):.3g}; {'; '.join(ratios)}"
                cells.setdefault((part, size), []).append(shown)
    for (part, size), shown_cells in cells.items():
        yield [f"{case.name} {part}".strip(), size, *shown_cells, f"{load:.1f}"]


def _ratio(times: Mapping[str, Sequence[float]], name: str) -> str:
    if name not in times:
        return "-"
    return f"{speedup(times['float'], times[name]):.2f}"


def _calls(models: Mapping[str, nn.Module], case: Case, size: int) -> dict[str, dict[str, Callable[[], object]]]:
    """What is timed, by part and model."""
    batch = case.inputs(size)
    found: dict[str, dict[str, Callable[[], object]]] = {}
    for name, model in models.items():
        if isinstance(model, EncoderDecoder):
            heard = {n: v for n, v in batch.kwargs.items() if not n.startswith("decoder_")}
            hidden = model.encoder(**heard).last_hidden_state
            ids = batch.kwargs["decoder_input_ids"]
            found.setdefault("encoder", {})[name] = _call(model.encoder, (), heard)
            decoded = {"decoder_input_ids": ids, "encoder_hidden_states": hidden, **heard}
            found.setdefault("decoder", {})[name] = _call(model.decoder, (), decoded)
        elif isinstance(model, GraphModel):
            found.setdefault("", {})[name] = _call(model, batch.args, dict(batch.kwargs))
    return found


def _call(model: GraphModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    numbers = model.numbers(args, kwargs)
    return lambda: model.session.run(None, numbers)


if __name__ == "__main__":
    main()
