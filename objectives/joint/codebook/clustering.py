"""Weights clustered on a line: starts, Lloyd's iteration and the optimum, all on sorted weights with running sums.

Sorting once makes a step of Lloyd's iteration cost K binary searches in place of a pass over the weights, so that it runs until
nothing moves. Source: claim B-7, formula fB8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.codebook._sorted import SortedValues, midpoints
from alphasmith.objectives.literals import CodebookStart
from alphasmith.objectives.partition import Floats, Ints, optimal_partition

#: Bins of the histogram that the optimum and the drawn start work on; as many distinct weights or fewer are taken as they are.
BINS = 2048
#: Share of weights that are exactly zero from which a tensor counts as sparse.
SPARSE = 0.1
#: Up to as many boundaries a weight is compared with each: that has no branches and is faster than bisection.
_COUNTED = 31
#: Most entries of a table: indices of 16 bits.
MOST_ENTRIES = 1 << 16


@dataclass(frozen=True, eq=False, kw_only=True)
class Clustering:
    """A table that weights are matched with.

    Attributes:
        table: (K,) float32, strictly ascending, in the unit of the weights.
        requested: K asked for; larger than K where the weights do not support as many.
        zero_kept: Whether an entry is held at exactly 0.
        iterations: Steps of Lloyd's iteration until nothing moved.
        error: Sum of squared distances of the weights to their entries, in the squared unit of the weights.
        notes: What people should know, a line each: fewer entries than asked for, iteration cut short.
    """

    table: Tensor
    requested: int
    zero_kept: bool
    iterations: int
    error: float
    notes: tuple[str, ...]


def cluster(
    weights: Tensor,
    k: int,
    *,
    start: CodebookStart = "optimal",
    keep_zero: bool | None = None,
    iterations: int = 1000,
    seed: int = 0,
    name: str = "weights",
) -> Clustering:
    """Cluster weights into at most ``k`` entries of a table. Source: claim B-7, formula fB8.

    Starts, each followed by Lloyd's iteration:
        - ``linear``: K values evenly spaced between the smallest and the largest weight (fB8).
        - ``density``: K quantiles, so that entries stand where weights are.
        - ``k-means++``: drawn among the bins of a histogram, each with a probability in proportion to its squared distance.
        - ``optimal``: the least squared error of all tables, exact for up to ``BINS`` distinct weights; of more, the optimum
          among the cuts between the bins of a histogram, moved to the weights by the iteration.

    An entry that no weight is nearest to moves into the entry with the largest squared error and splits it.

    Args:
        weights: Any shape, finite, at least one.
        k: Entries K, 2 to 65536; shrunk to the number of distinct weights, with a note.
        start: See above.
        keep_zero: Hold one entry at exactly 0 and give the others to the two signs in proportion to their counts. None: where
            at least a tenth of the weights is exactly zero.
        iterations: Most steps of Lloyd's iteration.
        seed: Of ``k-means++``.
        name: What to call the weights in errors and notes.

    Returns:
        The table. The same arguments give the same table on every machine with the same floating-point arithmetic.

    Raises:
        InputError: An argument is out of range, or there is no weight.
        NonFiniteError: A weight is NaN or infinite.
    """
    _check(k, start, iterations)
    data = SortedValues(_as_floats(weights, name))
    sparse = bool((torch.count_nonzero(weights.detach()) <= (1.0 - SPARSE) * weights.numel()).item())
    zero = sparse if keep_zero is None else keep_zero
    distinct = data.distinct + int(zero and not bool((data.values == 0).any()))
    notes = [f"{name}: {distinct} distinct values, {k} entries asked for"] * (distinct < k)
    size = min(k, distinct)
    generator = np.random.default_rng(seed)
    begin = _signed_start(data, size, start, generator) if zero else _start(data, size, start, generator)
    table, steps = _lloyd(data, begin, zero, iterations)
    if steps == iterations:
        notes.append(f"{name}: Lloyd's iteration stopped after {iterations} steps")
    # float32 can make two entries one; a zero that was reached from below would carry a sign.
    stored = np.unique(table.astype(np.float32)) + np.float32(0.0)
    return Clustering(
        table=torch.from_numpy(stored),
        requested=k,
        zero_kept=zero,
        iterations=steps,
        error=data.error(stored.astype(np.float64)),
        notes=tuple(notes),
    )


def match(weights: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest entry for every weight, by bisection where the table is long; midway between two, the lower one. Source: claim B-6, fB9.

    Args:
        weights: Any shape, finite; compared in float32.
        table: (K,) float32, strictly ascending, K at least 1.

    Returns:
        int64 in the shape and on the device of ``weights``.

    Raises:
        InputError: The table is empty, not ascending, or holds NaN.
    """
    if table.dim() != 1 or table.numel() == 0 or not bool((table.diff() > 0).all() & torch.isfinite(table).all()):
        raise InputError("table", "is not a row of ascending finite numbers", "give the table of a clustering")
    edges = midpoints(table.detach().cpu().double().numpy())
    values = weights.detach().to(torch.float32).contiguous()
    if edges.size > _COUNTED:
        return torch.bucketize(values, torch.from_numpy(edges).to(values.device))
    above = torch.zeros_like(values, dtype=torch.uint8)
    for edge in edges.tolist():
        above += values > edge
    return above.long()


def _check(k: int, start: str, iterations: int) -> None:
    if not 2 <= k <= MOST_ENTRIES:
        raise InputError("cluster.k", f"{k} entries make no table", f"use 2 to {MOST_ENTRIES}")
    if start not in get_args(CodebookStart):
        known = ", ".join(get_args(CodebookStart))
        raise InputError("cluster.start", f"{start!r} is unknown", f"use one of {known}")
    if iterations < 1:
        raise InputError("cluster.iterations", f"{iterations} is below 1", "use a positive number")


def _as_floats(weights: Tensor, name: str) -> NDArray[np.float32]:
    if weights.numel() == 0:
        raise InputError(name, "holds no weights", "leave it out")
    values = weights.detach().to("cpu", torch.float32).reshape(-1)
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"{name}: NaN or infinity among the weights")
    return values.numpy()


def _start(data: SortedValues, k: int, start: CodebookStart, generator: np.random.Generator) -> Floats:
    """(K,) ascending first entries."""
    if start == "linear":
        return np.linspace(float(data.values[0]), float(data.values[-1]), k)
    if start == "density":
        positions = ((np.arange(k) + 0.5) / k * len(data)).astype(np.int64)
        return data.values[positions].astype(np.float64)
    bins = data.bins(max(BINS, k))
    if start == "optimal":
        labels = optimal_partition(bins.means, bins.counts.astype(np.float64), k)
        mass = np.bincount(labels, weights=bins.counts)
        return np.asarray(np.bincount(labels, weights=bins.counts * bins.means) / mass)
    return _drawn(bins.means, bins.counts, k, generator)


def _drawn(points: Floats, counts: Ints, k: int, generator: np.random.Generator) -> Floats:
    """k-means++: each next point with a probability in proportion to its count times its squared distance to the nearest."""
    chosen = [int(generator.choice(points.size, p=counts / counts.sum()))]
    nearest = (points - points[chosen[0]]) ** 2
    for _ in range(1, k):
        odds = counts * nearest
        total = odds.sum()
        if total == 0:  # distances too small to be squared
            break
        chosen.append(int(generator.choice(points.size, p=odds / total)))
        nearest = np.minimum(nearest, (points - points[chosen[-1]]) ** 2)
    return np.sort(points[chosen])


def _signed_start(data: SortedValues, k: int, start: CodebookStart, generator: np.random.Generator) -> Floats:
    """Zero, and the other entries split between the signs by the counts of their weights."""
    sides = [side for side in (data.side(negative=True), data.side(negative=False)) if side is not None]
    if not sides:
        return np.zeros(1)
    left = k - 1
    if len(sides) == 1:
        share = [left]
    else:
        # Both signs keep an entry where there are two or more, and neither gets more than it has values.
        one = min(1, left - 1)
        lowest = max(one, left - sides[1].distinct)
        highest = min(left - one, sides[0].distinct)
        first = min(max(round(left * len(sides[0]) / (len(sides[0]) + len(sides[1]))), lowest), highest)
        share = [first, left - first]
    parts = [_start(side, n, start, generator) for side, n in zip(sides, share, strict=True) if n > 0]
    return np.sort(np.concatenate((*parts, [0.0])))


def _lloyd(data: SortedValues, table: Floats, zero: bool, most: int) -> tuple[Floats, int]:
    """Lloyd's iteration until no weight changes its entry, and its steps; with ``zero`` the entry at 0 stays there."""
    size, before = table.size, np.zeros(0, dtype=np.int64)
    for step in range(most):
        cuts = data.cuts(table)
        if np.array_equal(cuts, before):
            return table, step
        counts = np.diff(cuts)
        means = np.where(counts > 0, data.sums(cuts) / np.maximum(counts, 1), table)
        held = np.flatnonzero(table == 0)[:1] if zero else np.zeros(0, dtype=np.int64)
        means[held] = 0.0
        idle = counts == 0
        idle[held] = False
        before = cuts
        table = _reseeded(data, cuts, means, idle, held, size) if bool(idle.any()) or table.size < size else means
        table = np.sort(table)
    return table, most


def _reseeded(data: SortedValues, cuts: Ints, means: Floats, idle: NDArray[np.bool_], held: Ints, size: int) -> Floats:
    """The means without those of no weights, and the entries of the largest errors split at their mean until there are ``size``.

    An entry is split once a step: where the errors lie in few of them it takes several steps.
    """
    spreads = data.spreads(cuts)
    spreads[held] = 0.0
    wide = np.argsort(-spreads, kind="stable")[: size - int(np.count_nonzero(~idle))]
    wide = wide[spreads[wide] > 0]
    kept = ~idle
    kept[wide] = False
    halves = [_halves(data, int(cuts[i]), int(cuts[i + 1]), float(means[i])) for i in wide]
    return np.concatenate((means[kept], *halves))


def _halves(data: SortedValues, first: int, last: int, mean: float) -> Floats:
    """Means of the values of an interval on either side of its mean."""
    middle = first + int(np.searchsorted(data.values[first:last], mean, side="right"))
    cuts = np.array([first, min(max(middle, first + 1), last - 1), last])
    return data.sums(cuts) / np.diff(cuts)
