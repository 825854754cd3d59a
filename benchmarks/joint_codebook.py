"""Codebooks against scikit-learn's k-means: signal to noise at an equal number of entries, and seconds at a million weights.

    python -m benchmarks.joint_codebook [--data SHARED_DATA] [--entries 16 32 256] [--out docs/joint.md]

SHARED_DATA is a folder of model folders with safetensors; without it only the seconds are measured. Both run on one thread; seconds are those of
the processor, which other work on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from alphasmith.objectives.joint.codebook.clustering import cluster, match
from alphasmith.objectives.joint.codebook.tensors import CodebookSettings, decode_weight, encode_weight
from alphasmith.objectives.literals import CodebookStart
from benchmarks.timing import machine, median, parser, publish, table, torch_threads

STARTS: tuple[CodebookStart, ...] = ("linear", "density", "k-means++", "optimal")
#: Weights of the timed tensor.
MILLION = 1_000_000


def shared_tensors(data: Path) -> Iterator[tuple[str, Tensor]]:
    """(model, weight) of every floating tensor of two or more axes in the folders of ``data``."""
    for file in sorted(data.glob("*/*.safetensors")):
        for _, value in sorted(load_file(file).items()):
            if value.is_floating_point() and value.dim() > 1:
                yield file.parent.name, value.float()


def decibels(weight: Tensor, error: float) -> float:
    """Signal to noise of a restored weight [dB]."""
    return 10 * math.log10(float(weight.double().square().sum()) / error)


def compared(weight: Tensor, k: int) -> dict[str, float]:
    """Start -> signal to noise [dB] above scikit-learn's k-means with as many entries, one run of k-means++."""
    errors: dict[str, float] = {start: cluster(weight, k, start=start).error for start in STARTS}
    reference = KMeans(k, n_init=1, random_state=0).fit(weight.reshape(-1, 1).numpy())
    centres = torch.unique(torch.from_numpy(reference.cluster_centers_).float().reshape(-1))
    base = float((weight - centres[match(weight, centres)]).double().square().sum())
    return {start: decibels(weight, error) - decibels(weight, base) for start, error in errors.items()}


def quality(data: Path, entries: list[int]) -> list[list[str]]:
    """A row a model and number of entries: how far every start is from scikit-learn at its worst tensor."""
    rows = []
    for k in entries:
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        for model, weight in shared_tensors(data):
            if torch.unique(weight).numel() > k:
                found[model].append(compared(weight, k))
        for model, gains in found.items():
            worst = [f"{min(gain[start] for gain in gains):+.2f}" for start in STARTS]
            rows.append([model, str(k), str(len(gains)), f"{median([g['optimal'] for g in gains]):+.2f}", *worst])
    return rows


def speed(entries: list[int]) -> list[list[str]]:
    """A row a number of entries: seconds of table and indices of a million weights."""
    weight = torch.randn(MILLION, generator=torch.Generator().manual_seed(0))
    rows = []
    for k in entries:
        seconds = []
        for start in STARTS:
            begin = time.process_time()
            match(weight, cluster(weight, k, start=start).table)
            seconds.append(time.process_time() - begin)
        begin = time.process_time()
        KMeans(k, n_init=1, random_state=0).fit(weight.reshape(-1, 1).numpy())
        reference = time.process_time() - begin
        rows.append([str(k), f"{reference:.1f}", *(f"{s:.2f} ({reference / s:.0f}x)" for s in seconds)])
    return rows


def sizes(entries: list[int]) -> list[list[str]]:
    """A row a number of entries: bytes of a million weights under both codings, and that they come back."""
    weight = torch.randn(1000, MILLION // 1000, generator=torch.Generator().manual_seed(0))
    rows = []
    for k in entries:
        begin = time.process_time()
        stored = encode_weight(weight, CodebookSettings(k=k, coding="huffman"))
        made = time.process_time() - begin
        begin = time.process_time()
        restored = decode_weight("weight", stored.entry, stored.tensors)
        read = time.process_time() - begin
        error = float((restored - weight).double().square().sum())
        rows.append(
            [
                str(k),
                f"{stored.float_bytes / stored.packed_bytes:.2f}x",
                f"{stored.float_bytes / stored.huffman_bytes:.2f}x",
                f"{decibels(weight, error):.1f}",
                f"{made:.2f}",
                f"{read:.2f}",
            ]
        )
    return rows


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="folder of model folders with safetensors")
    made.add_argument("--entries", type=int, nargs="+", default=[16, 32, 256], help="numbers of entries K")
    given: argparse.Namespace = made.parse_args()
    where = machine()
    with torch_threads(1), threadpool_limits(1):
        timed = table(["K", "scikit-learn [s]", *(f"{start} [s]" for start in STARTS)], speed(given.entries))
        header = ["K", "packed", "Huffman", "SQNR [dB]", "made [s]", "read [s]"]
        stored = table(header, sizes(given.entries))
        publish("CODEBOOK_SPEED", f"{where}\n\n{timed}\n\n{stored}", given.out)
        if given.data:
            header = ["model", "K", "tensors", "median, optimal", *(f"worst, {start}" for start in STARTS)]
            publish("CODEBOOK_QUALITY", f"{where}\n\n{table(header, quality(given.data, given.entries))}", given.out)


if __name__ == "__main__":
    main()
