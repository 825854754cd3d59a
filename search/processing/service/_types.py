"""What is served, as the service sees it, and what a request may ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media import Content
from alphasmith.objectives.media.items import MediaItem
from alphasmith.search.processing.classifier import Classified
from alphasmith.search.processing.description import ModelDescription


class Model(Protocol):
    """A classifier, see :class:`~alphasmith.search.processing.classifier.Classifier`."""

    @property
    def description(self) -> ModelDescription:
        """What it is."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of its classes; None: not known before the first answer."""

    def decode(self, item: Content | str, name: str = "") -> MediaItem:
        """One item as the model takes it; from several threads, and never written to a disk.

        Raises:
            InputError: It cannot be used.
        """

    def classify(self, items: Sequence[MediaItem], *, top: int | None = None) -> Sequence[Classified]:
        """An answer for each item, in their order; from one thread.

        Raises:
            InputError: One of them cannot be classified.
        """


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What requests may ask for.

    Attributes:
        bytes: Largest body of a request [bytes].
        held: All bodies that are being read or decoded, together [bytes].
        items: Items of a request.
        upload: Longest time of a body on its way [s].
        answer: Longest time from the end of a body to its answer [s].

    Raises:
        InputError: A number is out of range.
    """

    bytes: int = 32 * 2**20
    held: int = 512 * 2**20
    items: int = 64
    upload: float = 30.0
    answer: float = 60.0

    def __post_init__(self) -> None:
        for field in ("bytes", "held", "items", "upload", "answer"):
            if not 0 < getattr(self, field) < math.inf:
                raise InputError(field, f"{getattr(self, field)} is not positive", "give a number above 0")
        if self.bytes > self.held:
            raise InputError("bytes", f"{self.bytes} is more than all bodies together may have", "give a smaller one")
