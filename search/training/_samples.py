"""Labelled samples of a training: read from media as the model wants them, or taken from a script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import MediaKind
from alphasmith.objectives.media import MediaBatches, MediaSource, data_digest, load_media, media_kind
from alphasmith.objectives.media.batch import Batch, call, data_errors, main_output
from alphasmith.objectives.media.batches import as_media
from alphasmith.objectives.media.in_memory import labelled
from alphasmith.objectives.model.decoding import reads_its_own_text, with_decoder_inputs
from alphasmith.objectives.model.labels import Classes, is_classifier, required_classes
from alphasmith.objectives.training.losses import task_of
from alphasmith.search.inputs.labelled_samples import LabelledSamples
from alphasmith.search.processing.answers import check_classifier, class_names
from alphasmith.search.processing.opening import IntegerModel
from alphasmith.search.sections import MANY
from alphasmith.search.training._draw import Draw, draw
from alphasmith.search.training._kept import KeptSamples
from alphasmith.search.training.config import FinetuneConfig, LabelledDataConfig

#: Decoded samples that are kept in memory for the next pass [bytes].
_MOST_KEPT = 2**29
_GIVE_DATA = "give labelled media, e.g. --data DIR with a folder for each class"


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledData:
    """A data set, and what of it is used.

    Attributes:
        media: All samples, numbered as the data have them.
        classes: Class of every sample; None: a language model's, or values.
        names: Names of the classes, by number; empty where nobody says.
        draw: Which samples are trained on and which are held out.
        digest: sha256 over the samples that are used and their classes.
        notes: What people should know.
    """

    media: MediaBatches
    classes: tuple[int, ...] | None
    names: tuple[str, ...]
    draw: Draw
    digest: str
    notes: tuple[str, ...]

    def samples(self, numbers: tuple[int, ...]) -> LabelledSamples:
        """Some of the samples.

        Args:
            numbers: Their numbers in the data.
        """
        return LabelledSamples(media=self.media, numbers=numbers, classes=self.classes)


def read_samples(config: FinetuneConfig, opened: IntegerModel, batches: Iterable[Any] | None) -> LabelledData:
    """Find the samples of a training and draw those that are used.

    Args:
        config: What is asked for.
        opened: The compressed model.
        batches: (inputs, labels) from a script in place of ``config.data.path``; None: there are none.

    Raises:
        InputError: No data or of another kind than the model takes, labels that do not fit the model, too few samples, or data that the
            model cannot be called with.
    """
    data, seed = config.data, config.training.seed
    if batches is not None:
        taken, targets = labelled(batches, limit=MANY)
        media = as_media(taken)
        labelled_with = any(batch.labels is not None for batch in taken)
    else:
        media, targets = _read(data, opened, seed), ()
        targets, labelled_with = media.targets, False
        if reads_its_own_text(opened.model):
            media, labelled_with = _written(media, data, opened), True
        media = replace(media, load=KeptSamples(media.load, _MOST_KEPT))
    output, task = _asked(opened, media)
    classes: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    taught = bool(targets) or config.training.distill < 1  # else the float model's answers are all that is learned from
    needs_classes = taught and (task == "classes" or is_classifier(opened.model))
    if not labelled_with and needs_classes:
        check_classifier(opened)
        names = class_names(opened, data.labels) or ()
        count = output.shape[-1]
        if names and len(names) != count:
            raise InputError("--labels", f"names {len(names)} classes, the model answers with {count}", "name them all")
        known = Classes.named(names, count)
        classes = required_classes(targets, known, partial=data.partial_classes)
    elif not labelled_with and targets and any(target is not None for target in targets) and task != "tokens":
        raise InputError("data.label", "the model answers with no classes", "give (inputs, values) from Python")
    numbers = sorted(number for batch in media.plan for number in batch)
    if numbers != list(range(len(numbers))):
        raise InputError("data.path", "its samples are not numbered from 0", "give the data whole")
    drawn = draw(classes, len(numbers), fraction=data.fraction, held_out=data.held_out, seed=seed)
    used = LabelledSamples(media=media, numbers=(*drawn.trained, *drawn.held_out), classes=classes)
    # One by one: the digest does not depend on the size of a batch.
    digest = data_digest(used.batch([place]) for place in range(len(used)))
    return LabelledData(media=media, classes=classes, names=names, draw=drawn, digest=digest, notes=media.notes)


def _read(data: LabelledDataConfig, opened: IntegerModel, seed: int) -> MediaBatches:
    if data.path is None:
        raise InputError("--data", "is missing", _GIVE_DATA)
    source = MediaSource(
        path=data.path,
        kind=data.kind,
        column=data.column,
        files=data.files,
        targets="text" if reads_its_own_text(opened.model) else None if _is_causal(opened) else "class",
        label="auto" if data.label == "auto" else data.label,
        whole=True,
        batch_size=1,
        max_length=data.max_length,
        sampling_rate=data.sampling_rate,
        frames=data.frames,
        image_size=data.image_size,
    )
    _check_kind(opened, media_kind(source), source)
    with opened.processors() as folder:
        # Extractors and tokenizers are in memory from here on; the folder may go.
        return load_media(source, model_folder=folder, model_config=opened.config, seed=seed)


def _check_kind(opened: IntegerModel, found: MediaKind, source: MediaSource) -> None:
    """Refuse media that the model does not take, as far as it or its run say what it takes."""
    wanted = opened.takes()
    if wanted is None or found == wanted or {found, wanted} == {"image", "video"}:
        return
    told = f"{source.path} holds {found}, and the model takes {wanted}"
    raise InputError("data.path", told, f"give {wanted} files")


def _is_causal(opened: IntegerModel) -> bool:
    """Whether a model says of itself that it predicts the next token."""
    return type(opened.model).__name__.endswith("ForCausalLM")


def _written(media: MediaBatches, data: LabelledDataConfig, opened: IntegerModel) -> MediaBatches:
    """Samples with the text that a decoder is to write."""
    if not media.targets or any(target is None for target in media.targets):
        remedy = "name the column that holds it with --label, or lay a text beside each file"
        raise InputError("data.label", "the samples have no text that the decoder should write", remedy)
    with opened.processors() as folder:
        return with_decoder_inputs(
            opened.model, media, folder=folder, longest=data.max_length, device=opened.device, on_sample=lambda _: None
        )


def _asked(opened: IntegerModel, media: MediaBatches) -> tuple[Tensor, str]:
    """The model's answer to one sample, and what it makes of labels: classes, tokens or values."""
    first = media.load((min(media.plan[0]),)).narrow(0, 1)
    batch = first.to(opened.device)
    with torch.no_grad(), data_errors():
        output = main_output(call(opened.model.eval(), batch))
    if batch.labels is None and task_of(output, batch) == "values":
        return output, "classes" if output.dim() == 2 and output.shape[-1] > 1 else "values"
    return output, task_of(output, batch)


def batches_of(samples: LabelledSamples, size: int) -> Iterator[Batch]:
    """All of some samples, in order, in batches.

    Args:
        samples: Any.
        size: Samples in a batch at most.
    """
    for start in range(0, len(samples), size):
        yield samples.batch(range(start, min(start + size, len(samples))))
