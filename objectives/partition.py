"""Optimal one-dimensional k-means: ascending weighted points cut into intervals, for groups of channels and for codebooks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def optimal_partition(axis: Floats, weights: Floats, k: int) -> Ints:
    """Optimal 1-D k-means of ascending weighted points: each cluster is an interval, found by dynamic programming.

    ``cost[j]`` is the least within-cluster sum of squares of the first j points; the best last cut is monotone in j, so each
    layer is solved for all middles of a binary subdivision at once, O(n log n) per cluster. Source: Wang and Song 2011
    (Ckmeans.1d.dp) with the divide-and-conquer recursion.
    """
    live = np.flatnonzero(weights)
    labels = np.zeros(axis.shape[0], dtype=np.int64)
    if live.size == 0:
        return labels
    points, mass = axis[live] - np.average(axis[live], weights=weights[live]), weights[live]
    n = points.shape[0]
    sums = [np.concatenate(([0.0], np.cumsum(mass * points**power))) for power in range(3)]

    def spread(start: Ints, stop: Ints) -> Floats:
        """Sum of squares about their mean of the points start..stop-1, start < stop."""
        zeroth, first, second = (s[stop] - s[start] for s in sums)
        return np.asarray(np.maximum(second - first**2 / zeroth, 0.0))

    ends = np.arange(1, n + 1)
    cost = np.concatenate(([0.0], spread(np.zeros(n, dtype=np.int64), ends)))
    cuts: list[Ints] = []
    for clusters in range(2, min(k, n) + 1):
        cost, cut = _next_layer(cost, clusters, spread)
        cuts.append(cut)
    stop = n
    for cluster in range(len(cuts), 0, -1):
        start = int(cuts[cluster - 1][stop])
        labels[live[start:stop]] = cluster
        stop = start
    return labels


def _next_layer(cost: Floats, clusters: int, spread: Callable[[Ints, Ints], Floats]) -> tuple[Floats, Ints]:
    """Least cost of the first j points in exactly ``clusters`` clusters, and the start of the last one, for every j."""
    n = cost.shape[0] - 1
    best, cut = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
    first, last = np.array([clusters]), np.array([n])
    low, high = np.array([clusters - 1]), np.array([n - 1])
    while first.size:
        middle = (first + last) // 2
        lengths = np.minimum(high, middle - 1) - low + 1
        begins = np.cumsum(lengths) - lengths
        segment = np.repeat(np.arange(lengths.size), lengths)
        start = np.arange(segment.size) - begins[segment] + low[segment]
        total = cost[start] + spread(start, middle[segment])
        best[middle] = np.minimum.reduceat(total, begins)
        hits = np.flatnonzero(total == best[middle][segment])
        cut[middle] = start[hits[np.unique(segment[hits], return_index=True)[1]]]
        first, last = np.concatenate((first, middle + 1)), np.concatenate((middle - 1, last))
        low, high = np.concatenate((low, cut[middle])), np.concatenate((cut[middle], high))
        open_ = first <= last
        first, last, low, high = first[open_], last[open_], low[open_], high[open_]
    return best, cut
