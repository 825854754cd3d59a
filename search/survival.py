"""A study survives its candidates: one that raises, or for which there is no memory, is a failed trial with its reason."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from alphasmith.objectives.errors import AlphasmithError, NonFiniteError
from alphasmith.objectives.model_objective import ModelScore
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.candidates import Candidate
from alphasmith.search.studies import Outcome, Pruning

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
    score: Callable[[Sequence[Candidate], int, Pruning | None], list[Outcome]],
    candidates: Sequence[Candidate],
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
        protected: As for :class:`alphasmith.search.studies.Scorer`.
        pruning: Likewise.

    Raises:
        AlphasmithError: What ``score`` refuses for a reason that is no candidate's, an input error say.
    """
    try:
        return score(candidates, protected, pruning)
    except NonFiniteError as error:
        failure: BaseException = error
    except AlphasmithError:
        raise
    except Exception as error:  # noqa: BLE001  a metric, a model or a kernel may raise anything, and the study must go on
        failure = error
    if len(candidates) > 1:
        half = len(candidates) // 2
        later = None if pruning is None else _offset(pruning, half)
        first = survive(score, candidates[:half], protected=min(protected, half), pruning=pruning)
        rest = survive(score, candidates[half:], protected=max(0, protected - half), pruning=later)
        return first + rest
    if is_out_of_memory(failure):
        free_memory()
        try:
            return score(candidates, protected, pruning)
        except Exception as error:  # noqa: BLE001  as above; this time it is final
            failure = error
        reason = f"out of memory, alone and after freeing memory ({_line(failure)})"
    else:
        reason = str(failure) if isinstance(failure, NonFiniteError) else _line(failure)
    return [Outcome(state="FAIL", loss=None, seconds=0.0, reason=reason)]


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
    if not candidates:
        return []
    try:
        return racer.race(candidates, incumbent=incumbent, protected=protected)
    except NonFiniteError as error:
        failure: BaseException = error
    except AlphasmithError:
        raise
    except Exception as error:  # noqa: BLE001  as above
        failure = error
    if is_out_of_memory(failure):
        free_memory()
    if len(candidates) > 1:
        half = len(candidates) // 2
        first = race_all(racer, candidates[:half], incumbent=incumbent, protected=min(protected, half))
        rest = race_all(racer, candidates[half:], incumbent=incumbent, protected=max(0, protected - half))
        return first + rest
    reason = str(failure) if isinstance(failure, NonFiniteError) else _line(failure)
    nothing = torch.zeros(0, dtype=torch.float64)
    return [ModelScore(loss=None, samples=0, errors=nothing, stopped=False, failure=reason)]


def _offset(pruning: Pruning, by: int) -> Pruning:
    return lambda index, step, loss: pruning(index + by, step, loss)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
