"""What every benchmark needs: the machine in words, threads, medians, markdown tables and their place in a document."""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from alphasmith.objectives.errors import InputError

#: Where the tables are kept, from the root of the repository.
DOCUMENT = Path("docs/performance.md")
#: Names the instructions that libraries are kept to, see benchmarks/narrow_runtime.py; oneDNN reads it.
KERNELS_VARIABLE = "ONEDNN_MAX_CPU_ISA"

Name = TypeVar("Name")


def machine() -> str:
    """One sentence on where the figures were made: processor, cores, threads, versions, load of other work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    busy = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    units = ", ".join((platform.machine(), *_units()))
    if limit := os.environ.get(KERNELS_VARIABLE):
        units += f"; kernels of {limit} alone"
    where = f"{_processor()} ({units}), {cores} cores, {torch.get_num_threads()} threads{busy}"
    return f"Machine: {where}; Python {platform.python_version()}, torch {torch.__version__}."


#: Flags of a processor that decide how fast 8-bit products are, and what they are called.
_UNITS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "amx_int8": "AMX-INT8",
    "asimddp": "dot products",
    "i8mm": "I8MM",
}


def _processor() -> str:
    return _told("model name") or platform.processor() or "unknown processor"


def _units() -> tuple[str, ...]:
    flags = (_told("flags") or _told("Features")).split()
    return tuple(name for flag, name in _UNITS.items() if flag in flags)


def _told(entry: str) -> str:
    """What Linux says of the first processor; empty where it says nothing."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(rf"^{entry}\s*:\s*(.+)$", told, re.MULTILINE)
    return found.group(1).strip() if found else ""


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run torch on ``count`` CPU threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_of(work: Callable[[], object], repeats: int, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median time of ``work`` [s], after one call that warms up; wall time unless another clock is given."""
    work()
    taken = []
    for _ in range(repeats):
        start = clock()
        work()
        taken.append(clock() - start)
    return statistics.median(taken)


def interleaved_times(
    calls: Mapping[Name, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[Name, list[float]]:
    """Seconds of every round after the first, which warms up; a round calls everything once.

    Args:
        calls: What is timed, by name.
        repeats: Rounds that count.
        clock: Of the process' CPU, or of the wall.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, work in calls.items():
            start = clock()
            work()
            if round_:
                times[name].append(clock() - start)
    return times


def speedup(base: Sequence[float], times: Sequence[float]) -> float:
    """How many times as fast as ``base`` something is: median of the ratios of their rounds."""
    return median([a / b for a, b in zip(base, times, strict=True)])


def median(values: Sequence[float]) -> float:
    """Median, NaN of nothing."""
    return statistics.median(values) if values else math.nan


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table; numbers come ready as text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Command line of a benchmark with ``--out``, the document its table goes into."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--out", type=Path, nargs="?", const=DOCUMENT, help=f"write the table into a document; alone: {DOCUMENT}"
    )
    return made


def with_threads(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same command line with ``--threads``."""
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    return made


def publish(name: str, text: str, out: Path | None) -> None:
    """Print a table, and put it between ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a document if there is one.

    Raises:
        InputError: The document has no such pair of markers.
    """
    print(f"\n{text}", flush=True)
    if out is None:
        return
    document = out.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, found, rest = document.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise InputError("--out", f"{out} has no {begin} ... {end}", "add the two markers where the table belongs")
    out.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
