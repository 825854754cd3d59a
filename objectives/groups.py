"""Groups of channels by magnitude: claims A-6, A-8, A-10. Deterministic, on the CPU in float64.

Whatever the method, groups are disjoint, cover every channel, are never empty, stand in ascending order of magnitude, and keep
equal magnitudes and tied channels together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import GroupMethod
from alphasmith.objectives.partition import Floats, Ints, optimal_partition
from alphasmith.objectives.smoothing import tie_index, tied_extreme


@dataclass(frozen=True, eq=False)
class Grouping:
    """Channels split into K groups, ascending in magnitude.

    Attributes:
        labels: (C,) int64, 0..K-1.
        values: (K,) float64, the mean magnitude of each group's channels (of each tie its largest), ascending.
        method: How the groups were made.
        outliers: K flags, True for groups the method calls outliers.
        requested_k: Groups asked for; larger than K when the magnitudes do not support as many.
    """

    labels: Tensor
    values: Tensor
    method: GroupMethod
    outliers: tuple[bool, ...]
    requested_k: int

    @property
    def k(self) -> int:
        """Number of groups K."""
        return len(self.outliers)


def group_channels(
    values: Tensor,
    *,
    method: GroupMethod,
    k: int,
    bins: int = 10,
    ties: Tensor | None = None,
    log: bool = False,
    deviations: float = 3.0,
) -> Grouping:
    """Split channels into at most ``k`` groups by magnitude. Source: claims A-6, A-8, A-10, formula fA8, traps T4 and T7.

    Methods:
        - ``range``: ``bins`` equal-width bins over [min, max], right-closed, the first closed on both sides; empty bins dropped.
        - ``kmeans``: optimal one-dimensional k-means on log magnitude (exact, by dynamic programming).
        - ``outlier``: normal = the most populated bin (ties: the lowest) and all below it; everything above is one group.
        - ``multi_outlier``: the same, every occupied bin above being its own group.
        - ``mean_difference``: outlier = above the mean by more than ``deviations`` standard deviations (fA8). Channels far
          *below* the mean stay normal: they cannot widen a quantization range. Misses nested outliers (trap T4).

    Bins beyond ``k`` are merged: again and again the two neighbours whose mean magnitudes are closest (ties: the lowest). The
    normal group counts towards ``k`` and never merges with outliers unless ``k`` is 1.

    Args:
        values: (C,) magnitudes >= 0.
        method: See above.
        k: Largest number of groups, at least 1.
        bins: Number of bins of the binned methods, at least 1.
        ties: (C,) int64; channels with the same value stay in one group, placed by the largest of them. None: all free.
        log: Bins of equal width in log magnitude, for values that span decades. Zeros count as the smallest positive value.
        deviations: Threshold of ``mean_difference`` [standard deviations].

    Returns:
        The grouping; ``requested_k`` tells when there are fewer groups than asked for.

    Raises:
        InputError: A magnitude is NaN, infinite or negative, or an argument is out of range.
    """
    _check(values, method, k, bins, deviations)
    magnitudes = values.detach().to("cpu", torch.float64)
    if ties is not None:
        magnitudes = tied_extreme(magnitudes, tie_index(ties.cpu(), magnitudes.shape[0]), "amax")
    levels, inverse, counts = np.unique(magnitudes.numpy(), return_inverse=True, return_counts=True)
    axis = _log_axis(levels) if log or method == "kmeans" else levels
    normals = 0
    if k == 1:
        level_labels = np.zeros(levels.shape[0], dtype=np.int64)
    elif method == "kmeans":
        level_labels = optimal_partition(axis, np.where(levels > 0, counts, 0).astype(np.float64), k)
    elif method == "range":
        level_labels = _merge(_bin(axis, bins), axis, counts, k)
    else:
        outlying = _outlying(method, levels, axis, counts, bins, deviations)
        normals = int(np.count_nonzero(~outlying))
        level_labels = np.zeros(levels.shape[0], dtype=np.int64)
        if normals < levels.shape[0]:
            above = (
                _bin(axis, bins)[normals:] if method == "multi_outlier" else np.zeros(outlying.sum(), dtype=np.int64)
            )
            level_labels[normals:] = 1 + _merge(above, axis[normals:], counts[normals:], k - 1)
    groups = int(level_labels.max()) + 1
    sums = np.bincount(level_labels, weights=levels * counts, minlength=groups)
    outliers = tuple(normals > 0 and group > 0 for group in range(groups))
    return Grouping(
        labels=torch.from_numpy(level_labels[inverse.reshape(-1)]).to(values.device),
        values=torch.from_numpy(sums / np.bincount(level_labels, weights=counts, minlength=groups)),
        method=method,
        outliers=outliers,
        requested_k=k,
    )


def _log_axis(levels: Floats) -> Floats:
    """Log magnitude; a zero stands where the smallest positive magnitude does, so dead channels join the lowest group."""
    positive = levels[levels > 0]
    return np.log(np.maximum(levels, positive[0] if positive.size else 1.0))


def _bin(axis: Floats, bins: int) -> Ints:
    """Bin of every ascending level: right-closed, equal width over [first, last]."""
    edges = np.linspace(axis[0], axis[-1], bins + 1)[1:-1]
    return np.searchsorted(edges, axis, side="left").astype(np.int64)


def _outlying(
    method: GroupMethod, levels: Floats, axis: Floats, counts: Ints, bins: int, deviations: float
) -> NDArray[np.bool_]:
    """Which ascending levels are outliers; always a tail."""
    if method == "mean_difference":
        mean = np.average(levels, weights=counts)
        spread = np.sqrt(np.average((levels - mean) ** 2, weights=counts))
        return np.asarray(levels - mean > deviations * spread)
    bin_of = _bin(axis, bins)
    # Empty bins have count 0 and argmax takes the first of equals: the lowest of the most populated bins.
    return np.asarray(bin_of > np.argmax(np.bincount(bin_of, weights=counts)))


def _merge(bin_of: Ints, axis: Floats, counts: Ints, k: int) -> Ints:
    """Number the occupied bins 0, 1, ..., merging neighbours with the closest means until at most ``k`` remain."""
    labels = np.unique(bin_of, return_inverse=True)[1].reshape(-1).astype(np.int64)
    while labels[-1] + 1 > k:
        means = np.bincount(labels, weights=axis * counts) / np.bincount(labels, weights=counts)
        labels[labels > np.argmin(np.diff(means))] -= 1
    return labels


def _check(values: Tensor, method: str, k: int, bins: int, deviations: float) -> None:
    if values.dim() != 1 or values.numel() == 0:
        raise InputError("values", f"has shape {tuple(values.shape)}", "give one magnitude per channel")
    bad = torch.nonzero(~torch.isfinite(values) | (values < 0)).reshape(-1)
    if bad.numel():
        channel = int(bad[0])
        raise InputError(
            "values",
            f"channel {channel} is {float(values[channel])} ({bad.numel()} such channels)",
            "calibrate on finite data and give magnitudes, which are never negative",
        )
    if method not in get_args(GroupMethod):
        raise InputError("groups.method", f"{method!r} is unknown", f"use one of {', '.join(get_args(GroupMethod))}")
    for field, number in (("groups.k", k), ("groups.bins", bins)):
        if number < 1:
            raise InputError(field, f"{number} is below 1", "use a positive number")
    if not 0 < deviations < float("inf"):
        raise InputError("groups.deviations", f"{deviations} is not positive and finite", "use 2 or 3")
