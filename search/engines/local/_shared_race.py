"""A race of candidate models whose candidates are shared out among workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cloudpickle
from torch import Tensor

from alphasmith.objectives.judge.model_objective import ModelScore
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.engines.local.worker_loop import Failure, Race, Scores, dump
from alphasmith.search.engines.types import ModelWork


@dataclass(eq=False)
class Share:
    """The part of a race that one worker runs.

    Attributes:
        key: The racer it is part of.
        model: Pickle of the racer's model work.
        order: Pickle of the race.
        size: Candidates.
        deaths: Workers that died of it.
        scores: What it found, one score per candidate.
    """

    key: int
    model: bytes
    order: bytes
    size: int
    deaths: int = 0
    scores: tuple[ModelScore, ...] | None = None

    def answer(self, answer: Scores | Failure) -> None:
        """Take the answer of a worker."""
        if isinstance(answer, Scores):
            self.scores = answer.scores
        else:
            self.scores = (ModelScore.failed(answer.reason),) * self.size


class SharedRace:
    """Shares candidates out among workers; see :class:`alphasmith.search.study.fault_isolation.Racer`.

    A candidate is raced against those of its share and the incumbent. Shares depend on the number of workers alone, not on
    which of them is faster or dies, so that a race can be repeated.

    Attributes:
        key: Names the model in the workers.

    Args:
        race: Fills in the scores of all shares.
        key: See above.
        workers: Shares at most.
        work: Makes what is shipped; called at the first race.
    """

    def __init__(
        self, race: Callable[[Sequence[Share]], None], *, key: int, workers: int, work: Callable[[], ModelWork]
    ) -> None:
        self.key = key
        self._race = race
        self._workers = workers
        self._work = work
        self._model = b""

    def race(
        self,
        candidates: Sequence[Mapping[str, Smoothing]],
        *,
        incumbent: Tensor | None = None,
        protected: int = 0,
    ) -> list[ModelScore]:
        """See :meth:`alphasmith.objectives.judge.model_objective.ModelObjective.race`.

        Raises:
            AlphasmithError: Workers do not start, or die again and again.
        """
        if not self._model:
            # By value where a class or a metric stands in the launch script, which workers cannot import.
            self._model = cloudpickle.dumps(self._work())
        plain = [{site: smoothing.to("cpu") for site, smoothing in c.items()} for c in candidates]
        shares = [
            Share(
                key=self.key,
                model=self._model,
                order=dump(
                    Race(
                        key=self.key,
                        smoothings=tuple(plain[first :: self._workers]),
                        incumbent=None if incumbent is None else incumbent.cpu(),
                        protected=len(range(first, protected, self._workers)),
                    )
                ),
                size=len(range(first, len(plain), self._workers)),
            )
            for first in range(min(self._workers, len(plain)))
        ]
        self._race(shares)
        dealt = [iter(share.scores or ()) for share in shares]
        return [next(dealt[position % self._workers]) for position in range(len(plain))]
