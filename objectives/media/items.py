"""Single items of media as a model takes them, read as the data of a run are: from files, from bytes that were sent, from texts."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import MediaKind
from alphasmith.objectives.media._audio import load_extractor, model_rate, read_wave, sound_of, waves_batch
from alphasmith.objectives.media._bounds import MOST_IMAGE_BYTES, MOST_PIXELS, Content, NamedBytes, check_file
from alphasmith.objectives.media._images import load_pixel_processor, pixel_batch, read_image
from alphasmith.objectives.media._records import TABLES, read_records
from alphasmith.objectives.media._source import SUFFIXES, MediaSource
from alphasmith.objectives.media._video import clip_frames, decode_frames
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.text import check_vocabulary, load_tokenizer, token_batch, token_limit
from alphasmith.objectives.reading import is_regular, read_text, refusing

#: Longest text where neither the model nor the user says [tokens]: attention takes the square of it.
_MOST_TOKENS = 4096
_ARTICLES: Mapping[MediaKind, str] = {"image": "an image", "audio": "sound", "video": "a video", "text": "a text"}
#: First bytes of files that are told apart from texts, and from each other, where no name says what they are.
_MARKS: tuple[tuple[int, bytes, MediaKind], ...] = (
    (0, b"\x89PNG", "image"),
    (0, b"\xff\xd8\xff", "image"),
    (0, b"GIF8", "image"),
    (0, b"BM", "image"),
    (8, b"WEBP", "image"),
    (0, b"II*\x00", "image"),
    (0, b"MM\x00*", "image"),
    (8, b"WAVE", "audio"),
    (8, b"AIF", "audio"),
    (0, b"fLaC", "audio"),
    (0, b"OggS", "audio"),
    (4, b"ftyp", "video"),
    (0, b"\x1a\x45\xdf\xa3", "video"),
    (8, b"AVI ", "video"),
)


@dataclass(frozen=True, kw_only=True)
class ItemLimits:
    """What one item may ask for: a small file must not fill the memory.

    Attributes:
        bytes: Largest file [bytes].
        pixels: Largest picture, and all frames of a clip together [pixels].
        seconds: Longest piece of a file of sound that is used, from its start [s].
        tokens: Longest text [tokens]; None: what tokenizer and model take, at most 4096.
    """

    bytes: int = MOST_IMAGE_BYTES
    pixels: int = MOST_PIXELS
    seconds: float = 30.0
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("bytes", "pixels", "seconds", "tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"limits.{name}", f"{value} is not a number above 0", "give another one")


@dataclass(frozen=True, kw_only=True, eq=False)
class MediaItem:
    """One item, ready for a forward call.

    Attributes:
        name: Its file, or what it was called.
        batch: The model's arguments, of one sample.
        notes: What was done to it that one might not expect, e.g. that its sound was resampled.
    """

    name: str
    batch: Batch
    notes: tuple[str, ...] = ()


class ItemReader:
    """Reads items of one kind for one model; nothing is written to a disk. May be used from several threads.

    Attributes:
        kind: What it reads.
        notes: What was assumed because the model does not say.

    Args:
        kind: What the model takes.
        model_folder: Folder with its tokenizer, image processor or feature extractor; read now, not later.
        model_config: The model's configuration (``LoadedModel.config``).
        limits: What an item may ask for.
        source: Settings of the run's data that bear on how an item is read: its sampling rate, frames and image size.

    Raises:
        InputError: The kind is unknown, or what the model reads it with is missing or cannot be used.
    """

    def __init__(
        self,
        kind: MediaKind,
        *,
        model_folder: Path | None,
        model_config: Any,
        limits: ItemLimits,
        source: MediaSource,
    ) -> None:
        if kind not in SUFFIXES:
            raise InputError("kind", f"{kind!r} is unknown", f"use {', '.join(SUFFIXES)}")
        self.kind = kind
        self._limits = limits
        self._source = replace(source, seconds=limits.seconds, max_length=limits.tokens or _MOST_TOKENS)
        self._config = model_config
        made = {"text": self._texts, "image": self._images, "audio": self._sounds, "video": self._videos}
        self._read, self.notes = made[kind](model_folder)

    def read(self, item: Content | str, name: str = "") -> MediaItem:
        """One item as the model takes it.

        Args:
            item: A file, the content of one, or a text. A string is always a text, never the name of a file.
            name: What to call a text.

        Raises:
            InputError: It is of another kind, larger than the limits, damaged or empty.
        """
        if isinstance(item, str) and self.kind != "text":
            problem = f"is a text, and the model takes {articled(self.kind)}"
            raise InputError("item", f"{name or repr(item[:40])} {problem}", "give a file, as a path or as its bytes")
        name = str(item) if not isinstance(item, str) else name or repr(item[:40])
        try:
            if not isinstance(item, str):
                self._check_kind(item)
                check_file(item, self._limits.bytes)
            batch, notes = self._read(item)
        except InputError as error:
            if not error.field.startswith("data."):
                raise
            raise InputError("item", error.problem, error.remedy) from error
        return MediaItem(name=name, batch=batch, notes=notes)

    def _check_kind(self, item: Content) -> None:
        """Refuse, in words of its own, what is plainly of another kind."""
        other = kind_of(item)
        if other is not None and other != self.kind:
            endings = ", ".join(sorted(SUFFIXES[self.kind]))
            problem = f"{item} is {articled(other)}, and the model takes {articled(self.kind)}"
            raise InputError("item", problem, f"give {articled(self.kind)}: {endings}")

    def _texts(self, folder: Path | None) -> tuple[_Read, tuple[str, ...]]:
        tokenizer = load_tokenizer(folder)
        limit = token_limit(self._source, tokenizer, self._config)
        borrowed = threading.Lock()  # tokenizers of several threads refuse each other's settings

        def read(item: Content | str) -> tuple[Batch, tuple[str, ...]]:
            text = item if isinstance(item, str) else self._text_of(item)
            with borrowed, refusing("model.path", "its tokenizer fails on a text", "repair the tokenizer"):
                tokens = list(tokenizer(text, truncation=True, max_length=limit)["input_ids"])
                whole = len(tokens) < limit or len(tokenizer(text)["input_ids"]) <= limit
            if not text.strip() or not tokens:
                raise InputError("item", "the text is empty", "give one with words")
            check_vocabulary([tokens], self._config)
            notes = () if whole else (f"only its first {limit} tokens are read",)
            return token_batch([tokens], 0, self._config), notes

        return read, ()

    def _text_of(self, item: Content) -> str:
        if isinstance(item, Path):
            return read_text(item, field="item", remedy="give a UTF-8 file", most=self._limits.bytes)
        try:
            return item.data.decode()
        except UnicodeDecodeError as error:
            raise InputError("item", f"{item} is not UTF-8 text", "convert it to UTF-8") from error

    def _images(self, folder: Path | None) -> tuple[_Read, tuple[str, ...]]:
        pixels = load_pixel_processor(self._source, folder, self._config)

        def read(item: Content | str) -> tuple[Batch, tuple[str, ...]]:
            picture = read_image(_content(item), self._limits.pixels)
            return pixel_batch(pixels([picture]), self._config), ()

        return read, pixels.notes

    def _sounds(self, folder: Path | None) -> tuple[_Read, tuple[str, ...]]:
        extractor = load_extractor(folder)
        rate, notes = model_rate(self._source, extractor, self._config)

        def read(item: Content | str) -> tuple[Batch, tuple[str, ...]]:
            file, seconds = _content(item), self._limits.seconds
            sound = sound_of(file)
            wave = read_wave(file, rate, seconds, sound.samples(seconds, rate))
            told = [] if sound.rate == rate else [f"resampled from {sound.rate} to {rate} Hz"]
            if sound.frames > max(int(seconds * sound.rate), 1):
                told.append(f"only its first {seconds:g} s are heard")
            return waves_batch([wave], rate, extractor, self._config), tuple(told)

        return read, notes

    def _videos(self, folder: Path | None) -> tuple[_Read, tuple[str, ...]]:
        pixels = load_pixel_processor(self._source, folder, self._config)
        length = clip_frames(self._source, self._config)

        def read(item: Content | str) -> tuple[Batch, tuple[str, ...]]:
            decoded = decode_frames(_content(item), held=length, most=self._limits.pixels)
            frames = [frame for frame in islice(decoded, length + 1) if frame is not None]
            if len(frames) < length:
                raise InputError(
                    "item", f"{item} has {len(frames)} frames, the model takes {length}", "give a longer one"
                )
            told = (f"only its first {length} frames are seen",) if len(frames) > length else ()
            clip = torch.stack([pixels(frames[:length])["pixel_values"]])
            return pixel_batch({"pixel_values": clip}, self._config), told

        return read, pixels.notes


def files_of(folder: Path, kind: MediaKind) -> Iterator[Path]:
    """Files of a kind in a folder and below it, in the order of their names; hidden ones are left out.

    One folder is listed at a time, so that any number of them needs little memory.

    Args:
        folder: The folder.
        kind: Which files.

    Raises:
        InputError: It cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            entries = sorted(((e.name, e.is_dir()) for e in found if not e.name.startswith(".")), key=lambda e: e[0])
    except OSError as error:
        raise InputError("item", f"{folder} cannot be read ({error.strerror})", "give a readable folder") from error
    for name, is_folder in entries:
        if is_folder and not (folder / name).is_symlink():  # a link may lead round in a circle
            yield from files_of(folder / name, kind)
        elif Path(name).suffix.lower() in SUFFIXES[kind] and is_regular(folder / name):
            yield folder / name


def is_table(file: Path) -> bool:
    """Whether a file holds texts as records: jsonl, csv, tsv or parquet, by its ending."""
    return file.suffix.lower() in TABLES


def texts_of(file: Path, column: str) -> Iterator[tuple[str, str | None]]:
    """Texts of a table, a record at a time.

    Args:
        file: See :func:`is_table`.
        column: Field that holds the text.

    Yields:
        Where each is, and the text; None where it is null or no text.

    Raises:
        InputError: The file cannot be read on, or its first record has no such field.
    """
    for number, record in enumerate(read_records(file, [column])):
        if not number and column not in record.fields:
            problem = f"{record.where} has no text in {column!r} (it has {record.names})"
            raise InputError("--column", problem, "name the field that holds it")
        text = record.fields.get(column)
        yield record.where, text if isinstance(text, str) else None


_Read = Callable[[Content | str], tuple[Batch, tuple[str, ...]]]


def articled(kind: MediaKind) -> str:
    """A kind as one item of it, e.g. ``an image``."""
    return _ARTICLES[kind]


def kind_of(item: Content) -> MediaKind | None:
    """What an item is by the ending of its name, else by its first bytes; None where neither says.

    Args:
        item: A file, or the content of one.
    """
    ending = Path(str(item)).suffix.lower()
    named: Mapping[str, MediaKind] = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
    if ending in named:
        return named[ending]
    start = item.data[:12] if isinstance(item, NamedBytes) else b""
    return next((kind for offset, mark, kind in _MARKS if start[offset : offset + len(mark)] == mark), None)


def _content(item: Content | str) -> Content:
    if isinstance(item, str):
        raise TypeError("a text is read by the reader of texts only")
    return item
