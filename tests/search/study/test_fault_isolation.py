"""A candidate that raises, or for which there is no memory, fails alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.model_objective import ModelScore
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.study.candidates import Candidate
from alphasmith.search.study.fault_isolation import race_all, survive
from alphasmith.search.study.trial import Outcome, Pruning

CANDIDATES = [Candidate("sampler", (float(number),)) for number in range(7)]


def number(candidate: Candidate) -> int:
    assert candidate.alphas is not None
    return int(candidate.alphas[0])


def score(some: Sequence[Candidate], protected: int, pruning: Pruning | None) -> list[Outcome]:
    """Candidate 4 raises; the loss of another one is its number, its reason whether it is protected or pruned."""
    if any(number(c) == 4 for c in some):
        raise ValueError("this one fails")
    return [
        Outcome(
            state="COMPLETE",
            loss=float(number(c)),
            seconds=0.0,
            reason="protected" if i < protected else str(pruning is not None and pruning(i, 1, 0.0)),
        )
        for i, c in enumerate(some)
    ]


def test_one_that_raises_costs_no_other_its_loss() -> None:
    found = survive(score, CANDIDATES, protected=2, pruning=lambda index, step, loss: index == 5)
    assert [o.loss for o in found] == [0, 1, 2, 3, None, 5, 6]
    assert found[4].state == "FAIL"
    assert found[4].reason == "ValueError: this one fails"
    # Who is protected, and which candidate a pruner is asked about, stay the same among the halves.
    assert [o.reason for o in found if o.loss is not None] == ["protected"] * 2 + ["False", "False", "True", "False"]


def test_what_is_refused_is_no_candidates_failure() -> None:
    def refuse(*_: object) -> list[Outcome]:
        raise InputError("x", "is wrong", "mend it")

    with pytest.raises(InputError):
        survive(refuse, CANDIDATES, protected=0, pruning=None)


class Racer:
    """Runs out of memory a number of times, then scores."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures = failures
        self.error = error

    def race(
        self,
        candidates: Sequence[Mapping[str, Smoothing]],
        *,
        incumbent: torch.Tensor | None = None,
        protected: int = 0,
    ) -> list[ModelScore]:
        if self.failures:
            self.failures -= 1
            raise self.error
        return [ModelScore(loss=1.0, samples=0, errors=torch.zeros(0), stopped=False, failure="") for _ in candidates]


def test_memory_that_is_free_again_is_used() -> None:
    assert [s.loss for s in race_all(Racer(1, MemoryError()), [{}])] == [1.0]
    [failed] = race_all(Racer(2, MemoryError("no room")), [{}])
    assert failed.loss is None
    assert "out of memory" in failed.failure
    assert "no room" in failed.failure
    [failed] = race_all(Racer(1, NonFiniteError("the loss is nan")), [{}])
    assert failed.failure == "the loss is nan"
