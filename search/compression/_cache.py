"""Finished stages as files under the digest of what they were made from. Anybody may delete them: what is missing is made anew."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.packed.packing import ClassClusters, PackedModel, PackedSettings, read_packed
from alphasmith.search.interruption import leave
from alphasmith.storage.files.durable import canonical_json
from alphasmith.storage.output.reservation import Reservation, ReservedError
from alphasmith.storage.queue.leases import LEASE

#: Of what is stored, and of the stages' meaning: another number, and nothing that is there is used.
_VERSION = 1
#: Nothing clustered: how the models of stages are kept.
AS_IT_IS = PackedSettings(
    clusters=ClassClusters(conv=None, recurrent=None, linear=None, embedding=None, other=None), squeeze=False
)
#: Seconds between two looks at a stage that another process makes.
_LOOK = 0.2
_TENSORS, _STRUCTURE, _FACTS = "model.safetensors", "structure.json", "facts.json"


def stage_key(stage: str, parent: str, settings: Mapping[str, Any]) -> str:
    """sha256 that stands for a stage's result: of its name, what it starts from and its settings.

    Args:
        stage: Its name.
        parent: Key or digest of what it starts from.
        settings: JSON-able.
    """
    told = {"version": _VERSION, "stage": stage, "parent": parent, "settings": dict(settings)}
    return hashlib.sha256(canonical_json(told, indent=None).encode()).hexdigest()


class StageCache:
    """Models of finished stages, with what is known of them; shared by all processes that see the folder.

    Args:
        folder: Made when something is put into it.
        lease: Seconds after which a process that makes a stage counts as dead where it cannot be seen.
        sleep: Waits a number of seconds.
    """

    def __init__(self, folder: Path, *, lease: float = LEASE, sleep: Callable[[float], None] = time.sleep) -> None:
        self._folder = folder
        self._lease, self._sleep = lease, sleep

    def made(
        self, key: str, make: Callable[[], tuple[PackedModel, dict[str, Any]]], stop: Callable[[], bool]
    ) -> tuple[PackedModel, dict[str, Any]]:
        """A stage's model and facts from the folder, or made and put there; no two processes that live make it at once.

        Args:
            key: See :func:`stage_key`.
            make: Makes them.
            stop: Polled while another process makes it.

        Raises:
            InputError: As :meth:`put`.
            Interrupted: ``stop`` said so.
        """
        found = self.get(key)
        if found is not None:
            return found
        with Reservation(self._folder / key, storage="", lease=self._lease) as place:
            while not self._is_ours(place):
                leave(stop)
                self._sleep(_LOOK)
            found = self.get(key)  # from whoever was at it before
            if found is None:
                found = make()
                self.put(key, *found)
            return found

    def get(self, key: str) -> tuple[PackedModel, dict[str, Any]] | None:
        """A stage's model and facts; None where they are not there, or not whole.

        Args:
            key: See :func:`stage_key`.
        """
        place = self._folder / key
        if not place.is_dir():
            return None
        with suppress(OSError, ValueError, InputError, SafetensorError):
            facts = json.loads((place / _FACTS).read_text())
            return read_packed((place / _STRUCTURE).read_text(), load_file(place / _TENSORS)), facts
        shutil.rmtree(place, ignore_errors=True)  # else it would be in the way of a whole one
        return None

    def _is_ours(self, place: Reservation) -> bool:
        try:
            place.take()
        except ReservedError:
            return False
        except InputError as error:
            raise InputError("study.cache", error.problem, "name another folder, or free space") from error
        return True

    def put(self, key: str, model: PackedModel, facts: Mapping[str, Any]) -> None:
        """Keep a stage's model; appears whole or not at all, and the first of two stays.

        Args:
            key: See :func:`stage_key`.
            model: With all its tensors.
            facts: JSON-able.

        Raises:
            InputError: Field ``study.cache``: the folder cannot be written.
        """
        part = self._folder / f".{key}.{secrets.token_hex(4)}"
        try:
            part.mkdir(parents=True)
            save_file({name: tensor.contiguous() for name, tensor in model.tensors.items()}, part / _TENSORS)
            (part / _STRUCTURE).write_text(model.structure.to_json())
            (part / _FACTS).write_text(canonical_json(dict(facts), indent=None))
            with suppress(OSError):  # another process was faster
                part.rename(self._folder / key)
        except OSError as error:
            problem = f"{self._folder} cannot be written ({error.strerror})"
            raise InputError("study.cache", problem, "name another folder, or free space") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
