from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

import pytest
import soundfile
from PIL import Image

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import MediaKind
from alphasmith.objectives.media import Content, NamedBytes
from alphasmith.objectives.media.items import MediaItem
from alphasmith.search.processing.classifier import Classified
from alphasmith.search.processing.service._warming import warmed
from tests.support.services import Spelling


class Late(Spelling):
    """Knows its classes when it has answered, and keeps what it was given."""

    def __init__(self, kind: MediaKind, error: InputError | None = None) -> None:
        super().__init__(kind)
        self._names, self.classes = self.classes, None
        self._error = error
        self.given: list[Content | str] = []

    def decode(self, item: Content | str, name: str = "") -> MediaItem:
        self.given.append(item)
        return super().decode(item, name)

    def classify(self, items: Sequence[MediaItem], *, top: int | None = None) -> Sequence[Classified]:
        if self._error is not None:
            raise self._error
        self.classes = self._names
        return super().classify(items, top=top)


def opened(item: Content | str) -> BinaryIO:
    assert isinstance(item, NamedBytes)
    return item.open()


@pytest.mark.parametrize("kind", ["text", "image", "audio"])
def test_a_first_answer_tells_the_classes(kind: MediaKind) -> None:
    model = Late(kind)
    assert warmed(model) is model
    assert model.classes is not None
    (item,) = model.given
    if kind == "image":
        assert Image.open(opened(item)).size == (64, 64)
    elif kind == "audio":
        assert soundfile.info(opened(item)).duration == 1.0
    else:
        assert item == "warm-up"


def test_of_a_video_no_first_item_is_made() -> None:
    model = Late("video")
    assert (warmed(model).classes, model.given) == (None, [])


def test_what_is_no_classifier_is_refused_early() -> None:
    with pytest.raises(InputError, match=r"^RUN: gives no classes"):
        warmed(Late("text", InputError("RUN", "gives no classes", "give another one")))


def test_what_a_model_thinks_of_the_first_item_is_no_matter() -> None:
    model = Late("image", InputError("item", "is too grey", "give a colourful one"))
    assert warmed(model) is model
