"""Actors on the nodes of a Ray cluster: the trainable that searches a site, the actor that scores candidate models."""

from __future__ import annotations

import os
import pkgutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import cloudpickle
import ray
import torch
from ray import tune
from torch import Tensor

from alphasmith.objectives.judge.model_objective import ModelObjective, ModelScore
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.objectives.text import error_line
from alphasmith.search.engines.local.worker_loop import Perform
from alphasmith.search.engines.types import ModelWork, SearchEnd
from alphasmith.search.study.study_record import SentLog, StudyMessage, StudyPast, StudyTrials

#: Namespace of the mailboxes.
NAMESPACE = "alphasmith"
#: A search asks at most this often whether to leave [s].
_ASK_EVERY = 0.2


class SiteTrainable(tune.Trainable):  # type: ignore[misc]  # Ray's class is untyped
    """A Tune trial: one piece of work, such as the search of one site, in one step. Its actor is reused for the next one."""

    def setup(self, config: dict[str, Any]) -> None:
        """Get ready once per process."""
        self._mailbox = ray.get_actor(config["mailbox"], namespace=NAMESPACE)
        self._perform: Perform = pkgutil.resolve_name(config["perform"])
        self._device = own_device()
        torch.set_num_threads(max(1, int(config["cpus"])))
        self._key: str = config["key"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self._key = new_config["key"]
        return True

    def step(self) -> dict[str, Any]:
        """Search the site of this trial; messages of earlier attempts count as recorded."""
        attempt, references, told, stopping = ray.get(self._mailbox.begin.remote(self._key))
        if not references:
            return {"done": True}
        work = cloudpickle.loads(ray.get(references[0]))
        ended = SearchEnd(site=work.site, stopped=True) if stopping else self._search(work, attempt, told)
        ray.get(self._mailbox.end.remote(self._key, attempt, cloudpickle.dumps(ended)))
        if ended.result is None:
            return {"done": True, "site": work.site}
        return {"done": True, "site": work.site, "loss": ended.result.loss, "trials": len(ended.result.results)}

    def _search(self, work: Any, attempt: int, told: Sequence[bytes]) -> SearchEnd:
        messages = [cloudpickle.loads(message) for message in told]
        line = _MailboxClient(self._mailbox, self._key, attempt, messages)
        past = work.past
        for message in messages:
            past = past.after(message)
        work = replace(work, past=past)
        return self._perform(work, SentLog(past, line.send), device=self._device, stop=line.leave)

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """CPUs and the share of a GPU of one search."""
        bundle = {"CPU": config["cpus"], "GPU": config["gpus"]}
        return tune.PlacementGroupFactory([{name: amount for name, amount in bundle.items() if amount}])


class _MailboxClient:
    """One attempt's line to the mailbox."""

    def __init__(self, mailbox: Any, key: str, attempt: int, told: Iterable[StudyMessage]) -> None:
        self.past = StudyPast()
        for message in told:
            self.past = self.past.after(message)
        self._mailbox = mailbox
        self._key = key
        self._attempt = attempt
        self._leaving = False
        self._asked = 0.0

    def send(self, message: StudyMessage) -> None:
        """Returns once the mailbox has it: from then on it outlives this process."""
        before, self.past = self.past, self.past.after(message)
        if before.notes == self.past.notes and not isinstance(message, StudyTrials):
            return  # an earlier attempt said so
        told = self._mailbox.tell.remote(self._key, self._attempt, cloudpickle.dumps(message))
        self._leaving = ray.get(told) or self._leaving

    def leave(self) -> bool:
        now = time.monotonic()
        if not self._leaving and now - self._asked >= _ASK_EVERY:
            self._asked = now
            self._leaving = ray.get(self._mailbox.leave.remote(self._key, self._attempt))
        return self._leaving


class RaceActor:
    """Scores candidate models on one node; keeps the model for all races.

    Args:
        work: A list of one reference to the pickled :class:`ModelWork`.
        cpus: CPU threads.
    """

    def __init__(self, work: list[Any], cpus: int) -> None:
        torch.set_num_threads(max(1, cpus))
        self._reference = work[0]
        self._device = own_device()
        self._judge: ModelObjective | None = None

    def ping(self) -> int:
        """Answers once the actor is up: its process id."""
        return os.getpid()

    def race(
        self, smoothings: Sequence[Mapping[str, Smoothing]], incumbent: Tensor | None, protected: int
    ) -> list[ModelScore]:
        """See :meth:`ModelObjective.race`; a judge that raises is the failure of all these candidates. On the CPU."""
        try:
            if self._judge is None:
                work: ModelWork = cloudpickle.loads(ray.get(self._reference))
                self._judge = work.judge(self._device)
            known = None if incumbent is None else incumbent.to(self._device)
            scores = self._judge.race(smoothings, incumbent=known, protected=protected)
        except Exception as error:  # noqa: BLE001  a user's metric or model may raise anything; the study records it
            return [ModelScore.failed(error_line(error))] * len(smoothings)
        return [replace(score, errors=score.errors.cpu()) for score in scores]


def own_device() -> str:
    """Where this Ray process computes: on the GPU it was given, else on the CPU."""
    return "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
