"""All contestants on one model: the run of Alphasmith with its baselines, one swept alpha, and every tool."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.real_folders import model_folder
from benchmarks.real_judges import SHORT, Sizes, make_judge
from benchmarks.real_models import finding
from benchmarks.real_runs import Contestant, Finding, Request, configured
from benchmarks.timing import machine
from benchmarks.tools.adapters.contract import read_batches
from benchmarks.tools.catalogue import Tool
from benchmarks.tools.environments import InstallError, environment
from benchmarks.tools.exchange import AdapterError, ToolReply, ask, read_reply, write_request
from benchmarks.tools.scoring import Bench
from benchmarks.tools.tables import OURS, Comparison, Row

_LOSSES = {"SmolLM2": "divergence of the logits [nats]", "Whisper": "divergence of the logits [nats]"}
#: What the run judges beside its own model, and what the rows are called.
_PLAIN: dict[Contestant, str] = {
    "none": "no smoothing",
    "alpha 0.5": "alpha 0.5",
    "best single": "best single alpha of every site",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where everything is, and what is taken from earlier.

    Attributes:
        environments: Folder of the tools' environments.
        work: Folder of findings, requests and replies.
        threads: CPU threads.
        resume: Take findings and replies that are there.
        patience: How long a tool may take on a model [s].
        with_run: Compare with the run of Alphasmith; else the tools alone are judged, beside no smoothing and alpha 0.5.
    """

    environments: Path
    work: Path
    threads: int
    resume: bool
    patience: float
    with_run: bool = True


def folder_of(request: Request, work: Path) -> Path:
    """Where requests, replies and the comparison of one model are kept."""
    form = "-short" if request.short else ""
    return work / "tools" / f"{request.model}-seed{request.seed}{form}"


def compared(request: Request, tools: tuple[Tool, ...], setting: Setting) -> Comparison:
    """All contestants on one model; kept as a file, see :func:`kept`.

    Args:
        request: The run that they are compared with.
        tools: The tools.
        setting: Where everything is.

    Raises:
        AbsentError: Model or data are not here.
        RuntimeError: The run failed, or was judged on other data than the tools.
    """
    versions: dict[str, str] = {}
    where = machine()
    found: Finding | None = None
    if setting.with_run:
        found = finding(request, setting.work, threads=setting.threads, resume=setting.resume)
    with tempfile.TemporaryDirectory() as work:
        folder = model_folder(request.model, request.home)
        judge = make_judge(request.model, folder, SHORT if request.short else Sizes(), Path(work))
        config, batches = configured(request, folder, Path(work))
        bench = Bench(config, batches, judge)
        rows = list(_plain_rows(bench, found))
        for tool in tools:
            rows.append(row_of(tool, folder_of(request, setting.work) / tool.folder_name, bench, setting, versions))
            print(rows[-1].name, rows[-1].judged and rows[-1].judged.loss, rows[-1].note, flush=True)
        if found is not None:
            rows.append(Row(name=OURS, judged=found.judged["ours"], wall=found.wall, cpu=found.cpu))
        comparison = Comparison(
            model=request.model,
            scheme=request.scheme,
            loss=_LOSSES.get(request.model, "relative squared error"),
            measures=judge.measures,
            float_model=bench.float_model,
            rows=tuple(rows),
            versions=versions,
            where=where,
        )
    keep(comparison, request, setting.work)
    return comparison


def keep(comparison: Comparison, request: Request, work: Path) -> None:
    """Write a comparison, for :func:`kept`."""
    place = _place(request, work)
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(comparison, place)


def kept(request: Request, work: Path) -> Comparison:
    """A comparison that was made before.

    Raises:
        RuntimeError: There is none.
    """
    place = _place(request, work)
    if not place.is_file():
        raise RuntimeError(f"{request.model} {request.scheme}, seed {request.seed}")
    comparison: Comparison = torch.load(place, weights_only=False)
    return comparison


def _place(request: Request, work: Path) -> Path:
    return folder_of(request, work) / f"{request.scheme}.pt"


def _plain_rows(bench: Bench, found: Finding | None) -> Iterator[Row]:
    """What people do without a search; the sweep, and all of it where there is no run, is made here.

    Raises:
        RuntimeError: The run was judged on other data.
    """
    if found is None:
        for alpha, name in ((None, "no smoothing"), (0.5, "alpha 0.5")):
            yield Row(name=name, judged=bench.judged_at(alpha))
        return
    if not _same_data(found, bench):
        raise RuntimeError(f"{found.request.model}: the run was judged on other data; run it anew, without --resume")
    for known, name in _PLAIN.items():
        yield Row(name=name, judged=found.judged.get(known))
    swept = bench.sweep()
    note = f"alpha {swept.alpha:g}"
    yield Row(name="one alpha, swept", judged=swept.judged, wall=swept.wall, cpu=swept.cpu, note=note)


def row_of(tool: Tool, place: Path, bench: Bench, setting: Setting, versions: dict[str, str]) -> Row:
    """The row of a tool on one model; what goes wrong is in its note.

    Args:
        tool: The tool.
        place: Folder of its request and its reply.
        bench: Scores its scales.
        setting: Where everything is.
        versions: Receives those of the packages that took part.
    """
    try:
        reply = _reply(tool, place, bench, setting)
        versions.update({n: v for n, v in reply.file.versions.items() if n not in {"torch", "transformers"}})
        scored = bench.score(reply, read_batches(place / "request" / "batches.safetensors")[0])
    except InstallError as error:
        return Row(name=tool.name, note=f"not installed: {_cell(error)}")
    except AdapterError as error:
        return Row(name=tool.name, note=_cell(error))
    unused = f"; not used: {', '.join(scored.unused)}" if scored.unused else ""
    return Row(
        name=tool.name,
        judged=scored.judged,
        wall=reply.file.wall,
        cpu=reply.file.cpu,
        change=reply.change,
        note=f"{scored.linears} of {len(bench.channels)} linears smoothed{unused}",
    )


def _reply(tool: Tool, place: Path, bench: Bench, setting: Setting) -> ToolReply:
    """What an adapter answers, or what it answered to the same question."""
    asked, answered = place / "request", place / "reply"
    if not (setting.resume and (answered / "reply.json").is_file()):
        python = environment(tool.requirements, setting.environments / tool.environment)
        shutil.rmtree(answered, ignore_errors=True)
        write_request(asked, bench.folder, bench.batches, tool, setting.threads)
        ask(python, tool, asked, answered, setting.patience)
    return read_reply(answered, bench.channels, bench.weights)


def _cell(error: Exception) -> str:
    """An error inside a cell of a table."""
    return str(error).replace("|", "/")[:200]


def _same_data(found: Finding, bench: Bench) -> bool:
    """Whether a finding was judged on the samples of this bench: the float model answers the same."""
    mine, theirs = bench.float_model, found.float_model
    pairs = zip(mine.values, theirs.values, strict=True)
    return all(len(a) == len(b) and torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)
