"""Candidates of one site scored together on growing subsets of its rows, and how two of them compare row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge._site_kernel import PreparedStack, SiteKernel
from alphasmith.objectives.judge.losses import relative_loss
from alphasmith.objectives.smoothing import Smoothing

#: Paired standard errors by which a loss must exceed the best one's for its candidate to be stopped.
CONFIDENCE = 3.0


class CandidateBatch:
    """Several candidates scored together on growing subsets of the rows; made by ``SiteObjective.batch``.

    Each call of :meth:`advance` reads the rows once for all candidates and every row is scored once per candidate, so a caller
    who stops advancing a candidate saves the rest of its cost. A candidate that is not finite is marked as failed and scored
    no further. Batches of one objective share its buffers: advance them from one thread at a time.

    Args:
        scorer: The site.
        smoothings: The candidates, of the right shapes.
        device: Where the site is.

    Raises:
        InputError: A scale is not positive.
    """

    def __init__(self, scorer: SiteKernel, smoothings: Sequence[Smoothing], device: torch.device) -> None:
        self._scorer = scorer
        self._smoothings = tuple(_on(device, smoothing) for smoothing in smoothings)
        self._failures = _failures(self._smoothings)
        self._rows = [0] * len(self._smoothings)
        self._errors = [0.0] * len(self._smoothings)
        self._row_errors: list[list[Tensor]] = [[] for _ in self._smoothings]
        self._losses: list[float | None] = [None] * len(self._smoothings)
        self._prepared: dict[tuple[int, ...], PreparedStack] = {}
        self._device = device

    def __len__(self) -> int:
        return len(self._smoothings)

    @property
    def rows_scored(self) -> tuple[int, ...]:
        """Rows of the largest part that every candidate has been scored on."""
        return tuple(self._rows)

    def smoothing(self, index: int) -> Smoothing:
        """A candidate, on the site's device."""
        return self._smoothings[index]

    def advance(self, rows: int, which: Sequence[int] | None = None) -> None:
        """Score candidates up to the first ``rows`` rows of the largest part, and the same fraction of every other part.

        Candidates that are there already are left alone. The device is waited for once, or once per set of candidates where
        they do not all fit the budget or have been scored on different numbers of rows.

        Args:
            rows: Size of the subset, 1..T.
            which: Candidates to score. None: all that have not failed.

        Raises:
            InputError: ``rows`` or an index is out of range.
        """
        if not 1 <= rows <= self._scorer.rows:
            raise InputError("rows", f"{rows} is not in 1..{self._scorer.rows}", "give the size of a subset")
        indices = range(len(self)) if which is None else sorted(set(which))
        if indices and (indices[0] < 0 or indices[-1] >= len(self)):
            raise InputError("which", f"{tuple(indices)} is not in 0..{len(self) - 1}", "give indices of candidates")
        waiting: dict[int, list[int]] = {}
        for index in indices:
            if not self._failures[index] and self._rows[index] < rows:
                waiting.setdefault(self._rows[index], []).append(index)
        for start, together in waiting.items():
            for first in range(0, len(together), self._scorer.capacity):
                self._score(together[first : first + self._scorer.capacity], start, rows)

    def loss(self, index: int) -> float | None:
        """Relative squared error on the rows scored so far, formula fA5; None if the candidate failed or has no rows yet."""
        return self._losses[index]

    def failure(self, index: int) -> str:
        """Why a candidate failed; empty if it did not."""
        return self._failures[index]

    def row_errors(self, index: int) -> Tensor:
        """Squared error of every row scored so far, (rows of all parts,) float64.

        Rows come in the order in which growing subsets take them: the same for all candidates of a site, and that of a smaller
        subset is the beginning of that of a larger one.
        """
        pieces = self._row_errors[index]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.float64, device=self._device)

    def paired(self, a: int, b: int) -> tuple[float, float]:
        """Mean and standard error of ``loss(a) - loss(b)`` on the rows both have been scored on; see :func:`paired_difference`.

        Raises:
            InputError: One of them has not been scored.
            NonFiniteError: One of them failed, or the float output is all zero on those rows.
        """
        for index in (a, b):
            if self._failures[index]:
                raise NonFiniteError(self._failures[index])
        rows = min(self._rows[a], self._rows[b])
        energy = self._scorer.energy(rows) if rows else 0.0
        return paired_difference(self.row_errors(a), self.row_errors(b), energy)

    def _score(self, together: list[int], start: int, stop: int) -> None:
        size = self._scorer.stack
        stacks = [tuple(together[first : first + size]) for first in range(0, len(together), size)]
        if start == 0:
            self._scorer.candidates_scored += len(together)
        errors = self._scorer.row_errors([self._prepare(stack) for stack in stacks], start, stop)
        totals = torch.cat([rows.sum(dim=1) for rows in errors]).tolist()
        energy = self._scorer.energy(stop)
        rows_of = (row for rows in errors for row in rows)
        for index, total, row in zip(together, totals, rows_of, strict=True):
            self._rows[index] = stop
            self._errors[index] += total
            self._row_errors[index].append(row)
            try:
                self._losses[index] = relative_loss(self._errors[index], energy)
            except NonFiniteError as error:
                self._losses[index], self._failures[index] = None, str(error)
        if len(self) > self._scorer.capacity:
            self._prepared.clear()
        self._prepared = {stack: found for stack, found in self._prepared.items() if self._unfinished(stack)}

    def _prepare(self, stack: tuple[int, ...]) -> PreparedStack:
        """Quantized weights of the candidates in ``stack``, kept for the next subset."""
        if stack not in self._prepared:
            others = {key: found for key, found in self._prepared.items() if not set(key) & set(stack)}
            self._prepared = others | {stack: self._scorer.prepare([self._smoothings[index] for index in stack])}
        return self._prepared[stack]

    def _unfinished(self, stack: tuple[int, ...]) -> bool:
        return any(not self._failures[index] and self._rows[index] < self._scorer.rows for index in stack)


def is_behind(errors: Tensor, others: Tensor, confidence: float = CONFIDENCE) -> bool:
    """Whether a candidate's loss is above another's by more than ``confidence`` paired standard errors: it may stop.

    Args:
        errors: Its errors, one per row or sample.
        others: The other's on the same ones; where the lengths differ, those both have are compared.
        confidence: Paired standard errors.

    Raises:
        InputError: There is nothing to compare.
        NonFiniteError: An error is not finite.
    """
    difference, deviation = paired_difference(errors, others.to(errors), 1.0)
    return difference > 0 and difference > confidence * deviation


def paired_difference(errors_a: Tensor, errors_b: Tensor, energy: float) -> tuple[float, float]:
    """Mean and standard error of the difference of two losses on the same rows.

    The rows are taken for a random sample: the standard error is that of the sum of the differences over another sample of as
    many rows, with the energy held fixed. It says nothing (infinite) about a single row.

    Args:
        errors_a: Squared error of every row under one candidate, in the order of ``CandidateBatch.row_errors``.
        errors_b: The same under another; where the lengths differ, the rows both have are compared.
        energy: Squared norm of the float output on these rows (``SiteObjective.energy``). That of other rows scales both
            results alike, so it changes no decision that compares the two.

    Returns:
        ``loss(a) - loss(b)`` and its standard error.

    Raises:
        InputError: There are no rows to compare.
        NonFiniteError: ``energy`` is zero or not finite although the errors differ, or an error is not finite.
    """
    rows = min(errors_a.shape[0], errors_b.shape[0])
    if rows == 0:
        raise InputError("errors", "share no rows", "score both candidates on at least one row")
    difference = errors_a[:rows] - errors_b[:rows]
    # One transfer for both numbers.
    mean, deviation = torch.stack([difference.mean(), difference.std(correction=min(1, rows - 1))]).tolist()
    if not math.isfinite(mean) or not math.isfinite(energy):
        raise NonFiniteError("the row errors or their energy hold NaN or infinity")
    if mean == 0.0 and deviation == 0.0:
        return 0.0, (0.0 if rows > 1 else math.inf)
    if energy == 0.0:
        raise NonFiniteError("the reference output is all zero, so a relative error against it is infinite")
    return mean * rows / energy, (deviation * math.sqrt(rows) / energy if rows > 1 else math.inf)


def _on(device: torch.device, smoothing: Smoothing) -> Smoothing:
    shift = None if smoothing.shift is None else smoothing.shift.detach().to(device, torch.float32)
    scales = smoothing.scales.detach().to(device, torch.float32)
    return Smoothing(scales=scales, shift=shift, range_factor=smoothing.range_factor)


def _failures(smoothings: Sequence[Smoothing]) -> list[str]:
    """The reason why a candidate cannot be scored, empty for the others; waits for the device once."""
    if not smoothings:
        return []
    facts = torch.stack(
        [
            torch.stack(
                [
                    torch.isfinite(s.scales).all(),
                    (s.scales > 0).all(),
                    torch.isfinite(s.scales.sum() if s.shift is None else s.shift).all(),
                ]
            )
            for s in smoothings
        ]
    ).tolist()
    reasons = []
    for finite, positive, finite_shift in facts:
        if finite and not positive:
            raise InputError("scales", "holds values that are not positive", "use smoothing_scales, which clamps them")
        reason = "" if finite else "the scales hold NaN or infinity"
        reasons.append(reason if finite_shift or not finite else "the shift holds NaN or infinity")
    return reasons
