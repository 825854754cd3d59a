"""Isolation of failing candidates: one that raises or runs out of memory is a failed trial with its reason."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from alphasmith.objectives.errors import AlphasmithError, NonFiniteError
from alphasmith.objectives.judge.model_objective import ModelObjective, ModelScore
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.objectives.text import error_line
from alphasmith.search.study.trial import C, Outcome, Pruning

T = TypeVar("T")
R = TypeVar("R")

#: What allocators say when there is no memory left, where they raise nothing more telling than RuntimeError.
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "cannot allocate memory")


class Racer(Protocol):
    """Scores candidate models against each other; ``ModelObjective`` is one."""

    def race(
        self,
        candidates: Sequence[Mapping[str, Smoothing]],
        *,
        incumbent: torch.Tensor | None = None,
        protected: int = 0,
    ) -> list[ModelScore]:
        """See ``ModelObjective.race``."""
        ...


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def survive(
    score: Callable[[Sequence[C], int, Pruning | None], list[Outcome]],
    candidates: Sequence[C],
    *,
    protected: int,
    pruning: Pruning | None,
) -> list[Outcome]:
    """Outcomes of all candidates, whatever ``score`` does.

    Where scoring several together fails, halves are scored on their own, so that one candidate costs no other its loss.
    Alone, a candidate for which there is no memory is tried once more after memory has been freed.

    Args:
        score: Scores (candidates, how many of them are protected, pruning) together.
        candidates: What to score.
        protected: As for :class:`alphasmith.search.study.types.Scorer`.
        pruning: Likewise.

    Raises:
        AlphasmithError: What ``score`` refuses for a reason that is no candidate's, an input error say.
    """

    def part(first: int, some: Sequence[C], protected: int) -> list[Outcome]:
        return score(some, protected, None if pruning is None else _offset(pruning, first))

    return _isolated(part, candidates, protected, lambda r: Outcome(state="FAIL", loss=None, seconds=0.0, reason=r))


def race_all(
    racer: Racer,
    candidates: Sequence[Mapping[str, Smoothing]],
    *,
    incumbent: torch.Tensor | None = None,
    protected: int = 0,
) -> list[ModelScore]:
    """Scores of all candidate models, whatever the model or its metric does; see :func:`survive`.

    Args:
        racer: Scores them against each other.
        candidates: Site name -> smoothing, each.
        incumbent: See ``ModelObjective.race``.
        protected: Likewise.

    Raises:
        AlphasmithError: What is refused for a reason that is no candidate's.
    """

    def part(_: int, some: Sequence[Mapping[str, Smoothing]], protected: int) -> list[ModelScore]:
        return racer.race(some, incumbent=incumbent, protected=protected)

    return _isolated(part, candidates, protected, ModelScore.failed)


def remembered(judge: ModelObjective, smoothings: Mapping[str, Smoothing]) -> ModelScore:
    """Score of the incumbent, whatever the model does; see :meth:`ModelObjective.remember`.

    Args:
        judge: Scores it, and those that are like it faster afterwards.
        smoothings: Site name -> smoothing.

    Raises:
        AlphasmithError: What is refused for a reason that is not the candidate's.
    """
    return _isolated(lambda _, some, __: [judge.remember(one) for one in some], [smoothings], 1, ModelScore.failed)[0]


def _isolated(
    score: Callable[[int, Sequence[T], int], list[R]],
    candidates: Sequence[T],
    protected: int,
    failed: Callable[[str], R],
    first: int = 0,
) -> list[R]:
    """Results of ``score`` (place of the first one, candidates, protected), or what ``failed`` makes of the reason."""
    if not candidates:
        return []
    try:
        return score(first, candidates, protected)
    except NonFiniteError as error:
        failure: BaseException = error
    except AlphasmithError:
        raise
    except Exception as error:  # noqa: BLE001  a metric, a model or a kernel may raise anything, and the study must go on
        failure = error
    if is_out_of_memory(failure):
        free_memory()
    if half := len(candidates) // 2:
        before = _isolated(score, candidates[:half], min(protected, half), failed, first)
        return before + _isolated(score, candidates[half:], max(0, protected - half), failed, first + half)
    if is_out_of_memory(failure):
        try:
            return score(first, candidates, protected)
        except Exception as error:  # noqa: BLE001  as above; this time it is final
            return [failed(f"out of memory, alone and after freeing memory ({error_line(error, 500)})")]
    return [failed(error_line(failure, 500))]


def _offset(pruning: Pruning, by: int) -> Pruning:
    return lambda index, step, loss: pruning(index + by, step, loss)
