"""Video: files decoded by PyAV, or folders of frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media._bounds import MOST_STREAM_BYTES, Content, check_file, check_pixels, video_format
from alphasmith.objectives.media._images import load_pixel_processor, pixel_batch, read_image
from alphasmith.objectives.media._source import SUFFIXES, MediaSource, setting
from alphasmith.objectives.media._targets import file_targets
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.batches import MediaBatches
from alphasmith.objectives.reading import refusing

_DEFAULT_FRAMES = 16
#: Frames looked at per file: a clip near the end of a long film would cost decoding all of it.
_MAX_FRAMES = 3000
#: Packets read for them: a film may hold any number of packets that are no frames.
_MAX_PACKETS = 4 * _MAX_FRAMES


@dataclass(frozen=True)
class _Video:
    """One video: a file, or frames that lie in one folder. ``count`` is the number of usable frames."""

    name: Path
    frames: tuple[Path, ...]
    count: int

    @property
    def source(self) -> Path:
        """Its file, or the first of its frames."""
        return self.frames[0] if self.frames else self.name

    def read(self, start: int, length: int) -> list[Image.Image]:
        if self.frames:
            return [read_image(file) for file in self.frames[start : start + length]]
        frames = islice(decode_frames(self.name, held=length), start, start + length)
        return [frame for frame in frames if frame is not None]


def load_video(
    source: MediaSource, files: list[Path], *, model_folder: Path | None, model_config: Any, seed: int
) -> MediaBatches:
    """Clips of consecutive frames as batches of ``pixel_values`` (B, frames, channels, H, W).

    Args:
        source: What to read.
        files: Video files, or frames; the frames in one folder, in the order of their names, are one video.
        model_folder: Folder with an image or video processor; frames pass through it one by one.
        model_config: The model's configuration, for ``num_frames`` and the image size.
        seed: Draws the clips and their order. Clips do not overlap.

    Raises:
        InputError: PyAV is needed and missing, a file is no readable video, or no video is long enough.
    """
    pixels = load_pixel_processor(source, model_folder, model_config)
    length = clip_frames(source, model_config)
    videos = _frame_folders(files) if files[0].suffix.lower() in SUFFIXES["image"] else _video_files(files)
    clips = [(video, start) for video in videos for start in range(0, video.count - length + 1, length)]
    if not clips:
        longest = max(video.count for video in videos)
        raise InputError(
            "data.frames", f"no video under {source.path} has {length} frames (the longest has {longest})", "lower it"
        )
    chosen = [clips[i] for i in source.drawn(len(clips), np.random.default_rng(seed))]

    def load(numbers: tuple[int, ...]) -> Batch:
        read = [pixels(video.read(start, length))["pixel_values"] for video, start in (chosen[i] for i in numbers)]
        return pixel_batch({"pixel_values": torch.stack(read)}, model_config)

    targets = file_targets(source, [video.source for video, _ in chosen])
    return MediaBatches.of(len(chosen), source.batch_size, load, targets=targets, notes=pixels.notes)


def clip_frames(source: MediaSource, config: Any) -> int:
    """Frames of a clip as the model takes it.

    Args:
        source: What the user asked for.
        config: The model's configuration.

    Raises:
        InputError: The model's own number is none.
    """
    length = source.frames or setting(config, "num_frames", _DEFAULT_FRAMES)
    if not isinstance(length, int) or not 1 <= length <= _MAX_FRAMES:
        raise InputError(
            "model.path", f"takes {length!r} frames", "repair num_frames of config.json, or set data.frames"
        )
    return length


def _frame_folders(files: list[Path]) -> list[_Video]:
    folders = ((folder, tuple(frames)) for folder, frames in groupby(sorted(files), key=lambda file: file.parent))
    return [_Video(folder, frames, len(frames)) for folder, frames in folders]


def _video_files(files: list[Path]) -> list[_Video]:
    return [
        _Video(file, (), sum(1 for _ in islice(decode_frames(file, as_images=False), _MAX_FRAMES))) for file in files
    ]


def decode_frames(
    file: Content, as_images: bool = True, held: int = 1, most: int | None = None
) -> Iterator[Image.Image | None]:
    """Frames of a film from its beginning.

    Args:
        file: A video file, or its content.
        as_images: Whether frames are made pictures of; else None stands for each.
        held: How many of them are kept at a time.
        most: Largest frame, and all that are kept together [pixels]; None: as ``check_pixels``.

    Raises:
        InputError: PyAV is missing, or it is no readable video.
    """
    try:
        import av
    except ImportError as error:
        raise InputError(
            "data.path", f"reading {file} needs PyAV", "install it: pip install 'alphasmith[video]', or give frames"
        ) from error
    check_file(file, MOST_STREAM_BYTES)
    # Not by its name: FFmpeg would take it for an address, and what it holds for a list of further addresses.
    with (
        refusing("data.path", f"{file} is not a readable video", "repair or remove it"),
        file.open("rb") as stream,
        av.open(stream, format=video_format(file, stream)) as container,
    ):
        if not container.streams.video:
            raise InputError("data.path", f"{file} has no picture track", "remove it, or use data.kind = 'audio'")
        track = container.streams.video[0]
        if track.codec_context is None:
            raise InputError("data.path", f"{file} has pictures that nothing here decodes", "convert or remove it")
        check_pixels(file, track.codec_context.width, track.codec_context.height, frames=held, most=most)
        for packet in islice(container.demux(track), _MAX_PACKETS):
            for frame in packet.decode():
                check_pixels(
                    file, frame.width, frame.height, frames=held, most=most
                )  # it may change from frame to frame
                yield frame.to_image() if as_images else None
