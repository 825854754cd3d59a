"""Finished stages as files under the digest of what they were made from. Anybody may delete them: what is missing is made anew."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.packed.packing import ClassClusters, PackedModel, PackedSettings, read_packed
from alphasmith.storage.files.durable import canonical_json

#: Of what is stored, and of the stages' meaning: another number, and nothing that is there is used.
_VERSION = 1
#: Nothing clustered: how the models of stages are kept.
AS_IT_IS = PackedSettings(clusters=ClassClusters(conv=None, recurrent=None, linear=None, embedding=None, other=None))
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
    """Models of finished stages, with what is known of them.

    Args:
        folder: Made when something is put into it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

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
