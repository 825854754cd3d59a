"""A first answer before the first request: a model that is no classifier is refused early, and classes without names counted."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import soundfile
from PIL import Image

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import MediaKind
from alphasmith.objectives.media import NamedBytes
from alphasmith.search.processing.service._types import Model

M = TypeVar("M", bound=Model)


def warmed(model: M) -> M:
    """The same model, when it has answered once, where an item of its kind can be made.

    Args:
        model: The model.

    Raises:
        InputError: Field ``RUN``: it is no classifier.
    """
    make = _MADE.get(model.description.kind)
    if make is None:
        return model
    try:
        model.classify([model.decode(make(), "warm-up")])
    except InputError as error:
        # What a model thinks of a grey square is its own business; what it is in general is not.
        if error.field == "RUN":
            raise
    return model


def _image() -> NamedBytes:
    written = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(written, "PNG")
    return NamedBytes("warm-up.png", written.getvalue())


def _sound() -> NamedBytes:
    written = io.BytesIO()
    soundfile.write(written, np.zeros(16_000, dtype=np.float32), 16_000, format="WAV", subtype="PCM_16")
    return NamedBytes("warm-up.wav", written.getvalue())


#: Kind of media -> an item of it.
_MADE: Mapping[MediaKind, Callable[[], NamedBytes | str]] = {
    "text": lambda: "warm-up",
    "image": _image,
    "audio": _sound,
}
