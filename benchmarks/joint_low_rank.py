"""Decomposition of one layer in units of the bare singular value decomposition.

    python -m benchmarks.joint_low_rank [--sizes 512 1024 2048] [--out docs/joint.md]

Both run on one thread; seconds are those of the processor, which other work on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.joint.low_rank.decomposition import saving_rank
from alphasmith.objectives.joint.low_rank.factored import FactoredLinear
from alphasmith.objectives.joint.low_rank.factorization import LowRankSettings, factorize
from alphasmith.objectives.joint.low_rank.norms import row_scales
from benchmarks.timing import machine, parser, publish, table, torch_threads


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call [s]."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def made_layer(size: int) -> Any:
    """A square linear layer of a spectrum that falls off, and a batch normalization behind it."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size // 8, generator=generator) for _ in range(2))
    layer = nn.Sequential(nn.Linear(size, size), nn.BatchNorm1d(size)).eval()
    noise = torch.randn(size, size, generator=generator)
    layer[0].weight = nn.Parameter(left @ right.T / size**0.5 + 0.1 * noise)
    return layer


def row(size: int) -> list[str]:
    """Bare seconds, and those of the whole stage for a layer in three metrics, over them."""
    layer = made_layer(size)
    weight = layer[0].weight.detach()
    inputs = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(1))
    covariances = {"0": inputs.T @ inputs / inputs.shape[0]}
    scales = row_scales(layer[1])
    bare = seconds(lambda: torch.linalg.svd(weight, full_matrices=False))
    found = [str(size), f"{bare:.2f}"]
    for settings in (
        LowRankSettings(rank=saving_rank(size, size) // 2),
        LowRankSettings(energy=0.9, metric="activation"),
        LowRankSettings(energy=0.9, metric="whitened"),
    ):
        model = made_layer(size)
        rows = {} if scales is None else {"0": scales}
        taken = seconds(partial(factorize, model, settings, covariances=covariances, rows=rows))
        rank = model[0].left.shape[1] if isinstance(model[0], FactoredLinear) else 0
        found.append(f"{taken / bare:.2f} (rank {rank})")
    return found


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048], help="rows and columns of the layer")
    given: argparse.Namespace = made.parse_args()
    where = machine()
    with torch_threads(1):
        header = ["rows and columns", "bare [s]", "plain", "activation", "whitened"]
        publish("LOW_RANK", f"{where}\n\n{table(header, [row(size) for size in given.sizes])}", given.out)


if __name__ == "__main__":
    main()
