"""Loading of media from disk by kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alphasmith.objectives.literals import MediaKind
from alphasmith.objectives.media._audio import load_audio
from alphasmith.objectives.media._images import load_images
from alphasmith.objectives.media._source import MediaSource, resolve_kind
from alphasmith.objectives.media._targets import listed_files
from alphasmith.objectives.media._video import load_video
from alphasmith.objectives.media.batches import MediaBatches
from alphasmith.objectives.media.text import load_text

_LOADERS = {"text": load_text, "image": load_images, "audio": load_audio, "video": load_video}


def load_media(
    source: MediaSource, *, model_folder: Path | None = None, model_config: Any = None, seed: int = 0
) -> MediaBatches:
    """Read media the way the model wants them. Source: claim A-1.

    Batches are read when asked for, so that memory holds one at a time; asking again gives the same tensors. Models of
    transformers get keyword arguments (``input_ids``, ``pixel_values``, ``input_values``, ``input_features``), others
    one positional argument. Nothing is ever fetched from a network.

    Args:
        source: Where the media lie and how much of them is wanted.
        model_folder: The model's folder, whose tokenizer, image processor or feature extractor is used.
        model_config: The model's configuration (``LoadedModel.config``): a transformers configuration, a mapping or None.
        seed: Draws which samples are used, and their order.

    Returns:
        At most ``source.samples`` samples in batches of ``source.batch_size``, with notes on what was assumed.

    Raises:
        InputError: The path is missing or empty, holds no file of the kind, a file is unreadable (named), a column is
            missing, there is no text at all, the model has no tokenizer for text, or a table lists no media files.
    """
    kind, files = _found(source)
    return _LOADERS[kind](source, files, model_folder=model_folder, model_config=model_config, seed=seed)


def media_kind(source: MediaSource) -> MediaKind:
    """What kind of media a source holds, by its files; none of them is read.

    Args:
        source: Where they lie.

    Raises:
        InputError: The path is missing or empty, holds no file of the kind or several kinds, or a table lists no media files.
    """
    return _found(source)[0]


def _found(source: MediaSource) -> tuple[MediaKind, list[Path]]:
    return resolve_kind(source) if source.files is None else listed_files(source)
