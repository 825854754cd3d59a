"""Where calibration media lie and how much of them is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import MediaKind
from alphasmith.objectives.reading import is_regular, usable_path

#: What samples can stand for: a class, or a text that a decoder writes.
TargetKind = Literal["class", "text"]

#: File name endings of every kind. Anything else in a folder is passed over.
SUFFIXES: Mapping[MediaKind, frozenset[str]] = {
    "text": frozenset({".txt", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv"}),
    "image": frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}),
    "audio": frozenset({".wav", ".flac", ".ogg", ".aiff", ".aif"}),
    "video": frozenset({".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v"}),
}


@dataclass(frozen=True, kw_only=True)
class MediaSource:
    """Media to calibrate on. Source: claim A-1 (text, image, audio, video).

    Attributes:
        path: A file, or a folder that is searched with its sub-folders; with ``files`` a table.
        kind: What the files are; ``auto`` decides by their endings. A folder of frames is ``image`` unless said to be
            ``video``.
        column: Field of a jsonl record or column of a csv or parquet file that holds the text, or a conversation.
        targets: What samples stand for, where the model can be asked for it; None: nothing is looked for.
        label: Field that holds it; ``auto``: by the usual names, by folders, or by texts beside the files; ``none``: not looked
            for.
        files: Column of a jsonl, csv or parquet table that names media files, relative to the table; None: ``path`` is no such
            table.
        whole: Whether all of the data is read, numbered as the data have it: files by their paths, records in order, a plain text cut
            into pieces of the longest length. Then ``samples`` says nothing.
        samples: At most this many samples are read, chosen by seed [samples].
        batch_size: Samples per batch; the last batch may be smaller [samples].
        max_length: Longest text; shortened to what the tokenizer and the model can take [tokens].
        sampling_rate: Rate the audio is resampled to; None: the model's own, else 16000 [Hz].
        seconds: Longest piece of an audio file that is used, from its start [s].
        frames: Frames per video clip; None: the model's own, else 16 [frames].
        image_size: Height and width of images and frames where the model has no image processor; None: the model
            configuration's, else 224 [pixels].
    """

    path: Path
    kind: Literal["auto", MediaKind] = "auto"
    column: str = "text"
    targets: TargetKind | None = None
    label: str = "auto"
    files: str | None = None
    whole: bool = False
    samples: int = 128
    batch_size: int = 8
    max_length: int = 512
    sampling_rate: int | None = None
    seconds: float = 30.0
    frames: int | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "max_length", "sampling_rate", "frames", "image_size", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"data.{name}", f"{value} is not positive", "give a number above 0")
        if self.kind not in ("auto", *SUFFIXES):
            raise InputError("data.kind", f"{self.kind!r} is unknown", f"use auto, {', '.join(SUFFIXES)}")
        if not self.column:
            raise InputError("data.column", "is empty", "name the field that holds the text")
        if not self.label:
            raise InputError("data.label", "is empty", "name the field that holds the label, or 'auto' or 'none'")
        if self.files == "":
            raise InputError("data.files", "is empty", "name the column that holds the paths of media files")

    def drawn(self, count: int, generator: np.random.Generator) -> list[int]:
        """Which of ``count`` samples are read, in the order in which they are numbered."""
        if self.whole:
            return list(range(count))
        return [int(i) for i in generator.permutation(count)[: self.samples]]


#: Endings of tables that lie beside other files more often than that they hold texts.
LISTS = frozenset({".csv", ".tsv"})
#: Name of a table beside media files, as the data sets library of Hugging Face has it.
METADATA = "metadata"


def is_companion(file: Path, stems: frozenset[Path]) -> bool:
    """Whether a text file belongs to media files: a text or table about them, and no text of its own.

    Args:
        file: The text file.
        stems: Media files without their endings.
    """
    ending = file.suffix.lower()
    return file.with_suffix("") in stems or ending in LISTS or (file.stem == METADATA and ending != ".txt")


def find_files(path: Path, suffixes: frozenset[str]) -> list[Path]:
    """Files under ``path`` (or ``path`` itself) with one of the endings, sorted by their path; hidden ones left out."""
    if path.is_file():
        return [path] if path.suffix.lower() in suffixes else []
    found = (p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))


def resolve_kind(source: MediaSource) -> tuple[MediaKind, list[Path]]:
    """Decide what kind of media a source is and list its files.

    Args:
        source: What the user asked for.

    Returns:
        The kind and its files, sorted. For ``video`` the files may be frames.

    Raises:
        InputError: The path is missing, holds no file of the kind, or holds several kinds under ``auto``.
    """
    path = source.path
    usable_path("data.path", path)
    if path.exists() and not path.is_dir() and not is_regular(path):
        raise InputError("data.path", f"{path} is not a plain file", "give a file or a folder")
    if not path.exists():
        raise InputError("data.path", f"{path} does not exist", "give an existing file or folder")
    if source.kind != "auto":
        files = find_files(path, SUFFIXES[source.kind])
        if source.kind == "video" and not files:
            files = find_files(path, SUFFIXES["image"])
        if not files:
            endings = ", ".join(sorted(SUFFIXES[source.kind]))
            raise InputError(
                "data.path",
                f"{path} {_emptiness(path)} {source.kind} file",
                f"give one of: {endings}; or set data.kind to what it is",
            )
        return source.kind, files
    present = {kind: files for kind, endings in SUFFIXES.items() if (files := find_files(path, endings))}
    if not present:
        endings = ", ".join(sorted(set().union(*SUFFIXES.values())))
        raise InputError("data.path", f"{path} {_emptiness(path)} media file", f"give files ending in {endings}")
    media = [kind for kind in present if kind != "text"]
    if len(media) == 1 and "text" in present:
        stems = frozenset(file.with_suffix("") for file in present[media[0]])
        if all(is_companion(file, stems) for file in present["text"]):
            del present["text"]
    if len(present) > 1:
        kinds = ", ".join(f"{len(files)} {kind}" for kind, files in present.items())
        raise InputError("data.kind", f"{path} holds several kinds ({kinds})", "set data.kind to the one to use")
    return next(iter(present.items()))


def setting(config: Any, name: str, default: Any = None) -> Any:
    """Value ``name`` of a model configuration: a mapping, a transformers configuration or None."""
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value


def is_transformers_config(config: Any) -> bool:
    """True where the model takes its inputs by the names transformers gives them."""
    return bool(setting(config, "model_type"))


def _emptiness(path: Path) -> str:
    if path.is_file():
        return "is no"
    return "holds no" if any(path.iterdir()) else "is an empty folder with no"
