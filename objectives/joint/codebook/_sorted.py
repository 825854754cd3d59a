"""Weights in ascending order with running sums: means and squared errors of any interval without touching the weights again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alphasmith.objectives.partition import Floats, Ints

#: Cells of equal width in which values are counted.
_CELLS = 1 << 16


@dataclass(frozen=True, eq=False)
class Bins:
    """Neighbouring weights taken together.

    Attributes:
        means: (B,) ascending.
        counts: (B,) weights in each, at least 1.
        exact: Whether every bin holds one value only.
    """

    means: Floats
    counts: Ints
    exact: bool


class SortedValues:
    """Finite values in ascending order.

    The running sums start at zero and go outwards on both sides: the sums up to a small weight then hold nothing larger than
    itself, and one huge weight costs the others no digits.

    Args:
        values: (n,) float32, any order, n at least 1.
    """

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values = np.sort(values, axis=None)
        #: Number of different values.
        self.distinct = int(np.count_nonzero(self.values[1:] != self.values[:-1])) + 1
        wide = self.values.astype(np.float64)
        zero = int(np.searchsorted(self.values, 0.0))
        self._first = _outwards(wide, zero)
        self._second = _outwards(np.square(wide, out=wide), zero)

    def __len__(self) -> int:
        """Number of values."""
        return int(self.values.size)

    def cuts(self, table: Floats) -> Ints:
        """(K + 1,) where the intervals of an ascending table's entries begin and end; a value midway belongs to the lower entry."""
        inner = np.searchsorted(self.values, midpoints(table), side="right")
        return np.concatenate(([0], inner, [len(self)])).astype(np.int64)

    def sums(self, cuts: Ints) -> Floats:
        """(K,) sum of the values of every interval."""
        return np.asarray(np.diff(self._first[cuts]))

    def spreads(self, cuts: Ints) -> Floats:
        """(K,) sum of squares about the mean of every interval; 0 exactly where it is empty or its values are equal."""
        found = np.diff(self._second[cuts]) - self.sums(cuts) ** 2 / np.maximum(np.diff(cuts), 1)
        low, high = self._ends(cuts)
        # The two ends alone make width^2 / 2, which rounding of the sums must not hide.
        return np.asarray(np.where(high > low, np.maximum(found, (high - low) ** 2 / 2), 0.0))

    def error(self, table: Floats) -> float:
        """Sum of squared distances to the nearest entry of an ascending table."""
        cuts = self.cuts(table)
        counts = np.diff(cuts)
        low, high = self._ends(cuts)
        means = np.where(high > low, self.sums(cuts) / np.maximum(counts, 1), low)
        return float((self.spreads(cuts) + counts * (means - table) ** 2).sum())

    def _ends(self, cuts: Ints) -> tuple[Floats, Floats]:
        """(K,) smallest and largest value of every interval; equal where it is empty."""
        low = self.values[np.minimum(cuts[:-1], len(self) - 1)].astype(np.float64)
        high = self.values[np.maximum(cuts[1:] - 1, 0)].astype(np.float64)
        return low, np.where(np.diff(cuts) > 0, high, low)

    def side(self, *, negative: bool) -> SortedValues | None:
        """The values below zero, or those above; None where there are none."""
        zero = self.values < 0 if negative else self.values > 0
        return SortedValues(self.values[zero]) if bool(zero.any()) else None

    def bins(self, most: int) -> Bins:
        """At most ``most`` bins: the distinct values where there are no more, else a quarter of equal width, a quarter of equal count, and
        half whose density is the cube root of that of the values.

        Equal width keeps the tails apart, equal count the middle. Entries of least squared error stand as dense as the cube root
        (Panter and Dite 1951); without those, a tensor of mostly dead channels would have its bins where they do not matter.
        """
        exact = self.distinct <= most
        if exact:
            starts = np.concatenate(([0], np.flatnonzero(self.values[1:] != self.values[:-1]) + 1))
        else:
            quarter = most // 4
            edges = np.linspace(float(self.values[0]), float(self.values[-1]), quarter + 1)[:-1]
            wide = np.concatenate((np.searchsorted(self.values, edges), self._by_density(most - 2 * quarter)))
            many = np.linspace(0, len(self), quarter + 1, dtype=np.int64)[:-1]
            # Equal values stay together: every cut moves to the first of them.
            firsts = np.searchsorted(self.values, self.values[np.minimum(np.concatenate((wide, many)), len(self) - 1)])
            starts = np.unique(firsts)
        cuts = np.concatenate((starts, [len(self)])).astype(np.int64)
        counts = np.diff(cuts)
        return Bins(means=self.sums(cuts) / counts, counts=counts, exact=exact)

    def _by_density(self, count: int) -> Ints:
        """(count,) positions of values, equally far apart in the sum of the cube roots of how many values lie in cells of equal width."""
        edges = np.linspace(float(self.values[0]), float(self.values[-1]), _CELLS + 1)[:-1]
        starts = np.searchsorted(self.values, edges)
        roots = np.cumsum(np.cbrt(np.diff(np.append(starts, len(self)))))
        return np.asarray(starts[np.searchsorted(roots, np.linspace(0, roots[-1], count + 1)[:-1], side="right")])


def midpoints(table: Floats) -> NDArray[np.float32]:
    """(K - 1,) largest float32 that is not above the middle of two neighbours: compares with float32 as the middle itself would."""
    middle = table[:-1] + (table[1:] - table[:-1]) / 2
    rounded = middle.astype(np.float32)
    return np.asarray(np.where(rounded > middle, np.nextafter(rounded, np.float32(-np.inf)), rounded))


def _outwards(values: Floats, zero: int) -> Floats:
    """(n + 1,) running sum from position ``zero`` to both sides; differences are sums of intervals."""
    sums = np.zeros(values.size + 1)
    np.cumsum(-values[:zero][::-1], out=sums[:zero][::-1])
    np.cumsum(values[zero:], out=sums[zero + 1 :])
    return sums
