"""Media to probabilities and classes, one item or many, through the integer model. Source: claim A-14."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import MediaKind
from alphasmith.objectives.media import Content
from alphasmith.objectives.media.batch import call, data_errors, main_output
from alphasmith.objectives.media.batches import as_media
from alphasmith.objectives.media.items import ItemLimits, ItemReader, MediaItem
from alphasmith.search.processing.answers import Output, check_classifier, class_names, probabilities_of, settled
from alphasmith.search.processing.description import ModelDescription, described
from alphasmith.search.processing.opening import IntegerModel, ModelPlace, open_model

#: How many classes are named for an item; None: as many as usual.
Top = int | Literal["all"] | None
_TOP = 5
#: Items that are looked at together for each one of a batch: texts of equal lengths are looked for among more of them.
_AHEAD: Mapping[MediaKind, int] = {"text": 16}


@dataclass(frozen=True, kw_only=True)
class ClassProbability:
    """A class and how probable it is.

    Attributes:
        index: Its number.
        name: Its name, by the model's configuration or as it was told.
        probability: In [0, 1].
    """

    index: int
    name: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Classified:
    """What the model says of one item.

    Attributes:
        name: The item's file, or what it was called.
        probabilities: (C,) of all classes, by number; they sum to 1.
        top: The most probable classes, as many as were asked for; of equal ones that of the lowest number first.
        notes: What was done to the item that one might not expect, e.g. that its sound was resampled.
    """

    name: str
    probabilities: tuple[float, ...]
    top: tuple[ClassProbability, ...]
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> ClassProbability:
        """The target class: the most probable one."""
        return self.top[0]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """An item that could not be classified.

    Attributes:
        name: The item's file, or what it was called.
        error: Why, with a remedy.
    """

    name: str
    error: InputError


@dataclass(frozen=True, kw_only=True)
class NamedItem:
    """An item under a name of its own, e.g. a line of a file.

    Attributes:
        name: What results call it.
        item: As for :meth:`Classifier.decode`.
    """

    name: str
    item: Content | str


class Classifier:
    """The integer model of a run as a classifier. May be used from several threads, which take turns at the model.

    Items whose tensors have equal shapes share a forward call; nothing is padded, so that what an item is classified with
    changes none of its probabilities.

    Attributes:
        description: What the model is: classes, kind of media, metrics, digests.
        limits: What an item may ask for.

    Args:
        opened: The model, with what its inputs are read with.
        reader: Reads its items.
        names: Its classes; None: not known before its first answer.
        output: What it answers with.
        batch: Items that share a forward call at most.
        limits: As the reader has them.
    """

    def __init__(
        self,
        opened: IntegerModel,
        reader: ItemReader,
        *,
        names: tuple[str, ...] | None,
        output: Output,
        batch: int,
        limits: ItemLimits,
    ) -> None:
        self._opened = opened
        self._reader = reader
        self._names = names
        self._output: Output = output
        self._batch = batch
        self._turn = threading.Lock()
        self.limits = limits
        self.description: ModelDescription = described(opened, kind=reader.kind, classes=names, notes=reader.notes)

    @classmethod
    def opened(
        cls,
        source: Path | str,
        *,
        labels: Path | Sequence[str] | None = None,
        kind: MediaKind | None = None,
        output: Output = "auto",
        batch: int = 32,
        limits: ItemLimits | None = None,
        **place: Any,
    ) -> Self:
        """The classifier that a run made.

        Args:
            source: The id of a run or training, or the beginning of one, or an output folder; its digests are checked.
            labels: Names of the classes in order, or a file with one a line or with ``id2label`` as JSON; None: the model's own.
            kind: What the model takes; None: as the model or its run say.
            output: What the model answers with: ``logits``, of which probabilities are made (softmax), or ``probabilities``;
                ``auto``: logits, unless the model says or the answers show that they are probabilities.
            batch: Items that share a forward call at most.
            limits: What one item may ask for: bytes, pixels, seconds, tokens.
            **place: ``storage``, ``device``, and how to build a model that the folder does not describe: ``model``, or
                ``path``, ``factory``, ``factory_path`` and ``allow_code``, see ``ModelPlace``.

        Raises:
            InputError: No such run or folder, a run that is not finished, a file that is not as it was written, a model that is no classifier, labels that are not
                as many as its classes, or an option that cannot be used.
        """
        if batch < 1:
            raise InputError("batch", f"{batch} is not positive", "give a number above 0")
        limits = limits or ItemLimits()
        model = open_model(ModelPlace(source=source, **place), keep_dense=True)
        check_classifier(model)
        names, chosen = class_names(model, labels), settled(model, output)
        return cls(model, model.reader(kind, limits), names=names, output=chosen, batch=batch, limits=limits)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes by number; None: not known before the first answer."""
        return self._names

    def decode(self, item: Content | str, name: str = "") -> MediaItem:
        """One item as the model takes it; nothing is written to a disk.

        Args:
            item: A file (``Path``), the content of one (``NamedBytes``), or a text. A string is always a text, never a file's name.
            name: What to call a text.

        Raises:
            InputError: It is of another kind than the model takes, larger than the limits, damaged or empty.
        """
        return self._reader.read(item, name)

    def check_top(self, top: Top) -> None:
        """Refuse to name more classes than there are.

        Args:
            top: As for :meth:`classify`.

        Raises:
            InputError: There are fewer, or none is asked for.
        """
        if isinstance(top, int) and top < 1:
            raise InputError("--top", f"{top} is not positive", "give a number above 0")
        if isinstance(top, int) and self._names is not None and top > len(self._names):
            told = f"{top} classes are asked for, and the model has {len(self._names)}"
            raise InputError("--top", told, f"give at most {len(self._names)}")

    def classify(self, items: Sequence[MediaItem | Content | str], *, top: Top = None) -> tuple[Classified, ...]:
        """Probabilities and classes of items, in their order.

        Args:
            items: What :meth:`decode` returned or takes.
            top: Classes that are named; None: five, or all where there are fewer; ``all``.

        Raises:
            InputError: As :meth:`check_top` and :meth:`decode`; or the model cannot be run on an item, is no classifier, or
                its answer is not finite.
        """
        self.check_top(top)
        read = [item if isinstance(item, MediaItem) else self.decode(item) for item in items]
        found: list[Classified] = []
        for answer in self._answers(read, top):
            if isinstance(answer, Refused):
                raise answer.error
            found.append(answer)
        return tuple(found)

    def stream(self, items: Iterable[NamedItem | Refused], *, top: Top = None) -> Iterator[Classified | Refused]:
        """The same of any number of items, read when they are needed; those that cannot be used do not end it.

        Args:
            items: Items with names; what was refused before is passed on in its place.
            top: As for :meth:`classify`.

        Raises:
            InputError: As :meth:`check_top`; or the model is no classifier.
        """
        self.check_top(top)
        waiting = iter(items)
        together = self._batch * _AHEAD.get(self._reader.kind, 1) if self._batch > 1 else 1
        while window := list(islice(waiting, together)):
            yield from self._answers([self._tried(item) for item in window], top)

    def _tried(self, item: NamedItem | Refused) -> MediaItem | Refused:
        if isinstance(item, Refused):
            return item
        try:
            read = self.decode(item.item, item.name)
        except InputError as error:
            return Refused(name=item.name, error=error)
        return MediaItem(name=item.name, batch=read.batch, notes=read.notes)

    def _answers(self, items: Sequence[MediaItem | Refused], top: Top) -> list[Classified | Refused]:
        """One answer for each item, in their order."""
        answers: dict[int, Classified | Refused] = {i: x for i, x in enumerate(items) if isinstance(x, Refused)}
        given = [(i, item) for i, item in enumerate(items) if isinstance(item, MediaItem)]
        if given:
            media = as_media([item.batch for _, item in given])
            for numbers in media.regrouped(range(len(given)), self._batch).plan:
                chosen = [given[number] for number in numbers]
                for (place, _), answer in zip(chosen, self._group([item for _, item in chosen], top), strict=True):
                    answers[place] = answer
        return [answers[place] for place in range(len(items))]

    def _group(self, items: Sequence[MediaItem], top: Top) -> list[Classified | Refused]:
        """Answers of items with tensors of equal shapes."""
        try:
            rows = self._probabilities(items)
        except InputError as error:
            if error.field == "RUN":
                raise
            if len(items) > 1:  # the others shall not suffer from one of them
                return [answer for item in items for answer in self._group([item], top)]
            return [Refused(name=items[0].name, error=error)]
        return [self._named(item, row, top) for item, row in zip(items, rows, strict=True)]

    def _probabilities(self, items: Sequence[MediaItem]) -> Tensor:
        """(B, C) float64."""
        batch = as_media([item.batch for item in items]).regrouped(range(len(items)), len(items))[0]
        with self._turn, torch.no_grad(), data_errors():
            output = main_output(call(self._opened.model, batch.to(self._opened.device)))
        rows = probabilities_of(output, self._output, self._names)
        if self._names is None:
            self._names = tuple(str(number) for number in range(rows.shape[1]))
        return rows

    def _named(self, item: MediaItem, row: Tensor, top: Top) -> Classified:
        self.check_top(top)
        names = self._names or ()
        count = len(names) if top == "all" else _TOP if top is None else top
        ranked = torch.sort(row, descending=True, stable=True).indices[:count].tolist()
        values = row.tolist()
        return Classified(
            name=item.name,
            probabilities=tuple(values),
            top=tuple(ClassProbability(index=i, name=names[i], probability=values[i]) for i in ranked),
            notes=item.notes,
        )
