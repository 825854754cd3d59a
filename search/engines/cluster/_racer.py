"""Scores candidate models on the nodes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import cloudpickle
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed
from torch import Tensor

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.objectives.judge.model_objective import ModelScore
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.engines.cluster._actors import RaceActor
from alphasmith.search.engines.types import ModelWork

#: A share is given to an actor so often, counting the first time.
_ATTEMPTS = 3
#: How long a new actor may take to answer [s]; it waits for resources and imports torch meanwhile.
_START = 300.0


class RayRacer:
    """One long-lived actor per search that the cluster takes at once; see :class:`alphasmith.search.study.fault_isolation.Racer`.

    Args:
        work: Makes what is shipped; called at the first race.
        prepare: Called before every race; returns how many actors the cluster takes.
        cpus: CPUs of each actor.
        gpus: GPUs of each actor.
    """

    def __init__(self, work: Callable[[], ModelWork], prepare: Callable[[], int], *, cpus: int, gpus: float) -> None:
        self._work = work
        self._prepare = prepare
        self._actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1)(RaceActor)
        self._cpus = cpus
        self._reference: Any = None
        self._actors: list[Any] = []

    def race(
        self,
        candidates: Sequence[Mapping[str, Smoothing]],
        *,
        incumbent: Tensor | None = None,
        protected: int = 0,
    ) -> list[ModelScore]:
        """See :meth:`ModelObjective.race`. Candidates are dealt out to the actors; each share is raced on its own.

        Raises:
            AlphasmithError: A share was lost with its actor three times.
        """
        if not candidates:
            return []
        actors = self._ready(min(self._prepare(), len(candidates)))
        plain = [{site: smoothing.to("cpu") for site, smoothing in one.items()} for one in candidates]
        known = None if incumbent is None else incumbent.cpu()
        scores: dict[int, ModelScore] = {}
        shares = {number: range(number, len(candidates), len(actors)) for number in range(len(actors))}
        for attempt in range(_ATTEMPTS):
            calls = {
                number: actors[number].race.remote([plain[i] for i in share], known, sum(i < protected for i in share))
                for number, share in shares.items()
            }
            for number, call in calls.items():
                try:
                    scores.update(zip(shares[number], ray.get(call), strict=True))
                except RayActorError as error:
                    if attempt == _ATTEMPTS - 1:
                        raise AlphasmithError(
                            f"candidate models: a Ray worker died {_ATTEMPTS} times: {error}"
                        ) from error
                else:
                    del shares[number]
            if not shares:
                break
            self._await(actors[number] for number in shares)
        home = None if incumbent is None else incumbent.device
        return [_at(scores[i], home) for i in range(len(candidates))]

    def close(self) -> None:
        """End the actors, so that their resources are free; the next race starts new ones."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _ready(self, count: int) -> list[Any]:
        """``count`` actors that are up and know the model."""
        if self._reference is None:
            self._reference = ray.put(cloudpickle.dumps(self._work()))
        while len(self._actors) < max(1, count):
            self._actors.append(self._actor.remote([self._reference], self._cpus))
        actors = self._actors[: max(1, count)]
        self._await(actors)
        return actors

    def _await(self, actors: Iterable[Any]) -> None:
        """A call during an actor's restart fails, so wait for an answer before the next one."""
        for actor in actors:
            try:
                _answer(actor)
            except (RayActorError, GetTimeoutError) as error:
                raise AlphasmithError(
                    f"candidate models: a Ray worker did not start within {_START:.0f} s; are its CPUs or GPUs in use?"
                ) from error


@retry(retry=retry_if_exception_type(RayActorError), stop=stop_after_delay(_START), wait=wait_fixed(0.2), reraise=True)
def _answer(actor: Any) -> None:
    ray.get(actor.ping.remote(), timeout=_START)


def _at(score: ModelScore, device: torch.device | None) -> ModelScore:
    """The score with its errors where the incumbent's are, to be compared with them."""
    return score if device is None else replace(score, errors=score.errors.to(device))
