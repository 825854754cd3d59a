"""Bounds of what media files and the settings of processors may ask for: a small file must not fill the memory.

A decoder is told the formats it may take, by what the first bytes say and not by the name of the file: a PostScript file named
``.jpg`` starts no interpreter, and a playlist named ``.mp4`` opens no address.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.reading import is_regular

#: Largest picture, and all frames of a clip together [pixels]; longest side over the shorter one.
MOST_PIXELS = 2**27
MOST_CLIP_PIXELS = 2**30
MOST_ASPECT = 100
#: Largest file [bytes]: of a picture, which is read whole, and of sound and films, of which the beginning is.
MOST_IMAGE_BYTES = 2**30
MOST_STREAM_BYTES = 2**37
#: Sampling rates of sound [Hz].
RATES = (1000, 768_000)
#: Largest piece of sound that is read at once, all channels together [samples].
MOST_SAMPLES = 2**28
#: Largest height and width that pictures are brought to [pixels].
MOST_EDGE = 2**13
#: Pillow's names of the formats of pictures.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
#: libsndfile's names of the formats of sound.
AUDIO_FORMATS = ("WAV", "WAVEX", "RF64", "AIFF", "FLAC", "OGG")
#: libsndfile's and FFmpeg's names of the formats of sound and films by their first bytes: (offset, bytes) -> name.
_AUDIO_MARKS = {
    (0, b"RIFF"): "WAV",
    (0, b"RIFX"): "WAV",
    (0, b"RF64"): "RF64",
    (0, b"FORM"): "AIFF",
    (0, b"fLaC"): "FLAC",
    (0, b"OggS"): "OGG",
}
_VIDEO_MARKS = {
    (4, b"ftyp"): "mov",
    (4, b"moov"): "mov",
    (4, b"mdat"): "mov",
    (4, b"free"): "mov",
    (4, b"wide"): "mov",
    (4, b"skip"): "mov",
    (0, b"\x1a\x45\xdf\xa3"): "matroska",
    (0, b"RIFF"): "avi",
}
#: Settings of processors that decide how much they make: name -> most.
_SETTINGS = {
    "height": MOST_EDGE,
    "width": MOST_EDGE,
    "shortest_edge": MOST_EDGE,
    "longest_edge": MOST_EDGE**2,  # of some processors these are pixels of the whole picture
    "max_height": MOST_EDGE,
    "max_width": MOST_EDGE,
    "size": MOST_EDGE,
    "crop_size": MOST_EDGE,
    "min_pixels": MOST_EDGE**2,
    "max_pixels": MOST_EDGE**2,
    "patch_size": MOST_EDGE,
    "num_frames": 3000,
    "chunk_length": 3600,
    "n_samples": MOST_SAMPLES,
    "max_length": MOST_SAMPLES,
    "feature_size": 2**16,
    "num_mel_bins": 2**16,
    "n_fft": 2**20,
    "sampling_rate": RATES[1],
}


@dataclass(frozen=True)
class NamedBytes:
    """What would be in a file.

    Attributes:
        name: What to call it in errors, e.g. the name under which it was sent.
        data: Its bytes.
    """

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name

    def open(self, mode: str = "rb") -> BinaryIO:
        """Its bytes as an open file.

        Args:
            mode: As of ``Path.open``; only ``rb`` is there.
        """
        if mode != "rb":
            raise ValueError(f"mode {mode!r} is not 'rb'")
        return io.BytesIO(self.data)


#: A file, or what would be in one.
Content = Path | NamedBytes


def check_file(file: Content, most: int) -> None:
    """Refuse what is no plain file or too large.

    Args:
        file: A media file.
        most: Largest one [bytes].

    Raises:
        InputError: It is a folder, FIFO or device, or larger.
    """
    if isinstance(file, NamedBytes):
        size = len(file.data)
    elif is_regular(file):
        size = file.stat().st_size
    else:
        raise InputError("data.path", f"{file} is not a plain file", "remove it")
    if size > most:
        raise InputError("data.path", f"{file} has {size} bytes, more than {most}", "give smaller files")


def check_pixels(file: Content, width: int, height: int, *, frames: int = 1, most: int | None = None) -> None:
    """Refuse a picture or a clip that would fill the memory.

    Args:
        file: Where it is.
        width: Of a frame [pixels].
        height: Likewise.
        frames: Frames held together.
        most: Largest picture, and all frames together [pixels]; None: ``MOST_PIXELS`` and ``MOST_CLIP_PIXELS``.

    Raises:
        InputError: It is empty, too large, or too long and thin: processors bring the short side to their size.
    """
    if width < 1 or height < 1:
        raise InputError("data.path", f"{file} has no pixels ({width}x{height})", "remove it")
    picture, clip = (MOST_PIXELS, MOST_CLIP_PIXELS) if most is None else (most, most)
    if width * height > picture or width * height * frames > clip:
        told = f"{file} has {width}x{height} pixels" + (f" in {frames} frames" if frames > 1 else "")
        raise InputError("data.path", f"{told}, too many", "give smaller ones")
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise InputError("data.path", f"{file} is {width}x{height} pixels, a stripe", "cut it")


def audio_format(file: Content, stream: BinaryIO) -> str:
    """libsndfile's name of a file's format, by its first bytes.

    Args:
        file: For errors.
        stream: At its beginning; there again afterwards.

    Raises:
        InputError: None of those that are taken.
    """
    return _format(file, stream, _AUDIO_MARKS, "audio", "wav, flac, ogg or aiff")


def video_format(file: Content, stream: BinaryIO) -> str:
    """FFmpeg's name of a file's format, by its first bytes.

    Args:
        file: For errors.
        stream: At its beginning; there again afterwards.

    Raises:
        InputError: None of those that are taken.
    """
    return _format(file, stream, _VIDEO_MARKS, "a readable video", "mp4, mov, mkv, webm or avi")


def check_settings(file: Path, content: Mapping[str, Any]) -> None:
    """Refuse settings of a processor that would make it fill the memory.

    Args:
        file: Where they stand.
        content: Nested settings.

    Raises:
        InputError: A number is not finite or beyond what it may be; names it.
    """
    for name, value in content.items():
        if isinstance(value, Mapping):
            check_settings(file, value)
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, (int, float)) and not abs(number) <= _SETTINGS.get(name, math.inf):
                raise InputError("model.path", f"{file}: {name} is {number}, too large", "repair it")


def _format(file: Content, stream: BinaryIO, marks: Mapping[tuple[int, bytes], str], what: str, known: str) -> str:
    start = stream.read(12)
    stream.seek(0)
    for (offset, mark), name in marks.items():
        if start[offset : offset + len(mark)] == mark:
            return name
    raise InputError("data.path", f"{file} is not {what}: it does not begin like {known}", "convert or remove it")
