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

from alphasmith.objectives.batch import Batch
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batches import MediaBatches, plan_batches
from alphasmith.objectives.media.images import load_pixel_processor, pixel_batch, read_image
from alphasmith.objectives.media.source import SUFFIXES, MediaSource, setting

_DEFAULT_FRAMES = 16
#: Frames looked at per file: a clip near the end of a long film would cost decoding all of it.
_MAX_FRAMES = 3000


@dataclass(frozen=True)
class _Video:
    """One video: a file, or frames that lie in one folder. ``count`` is the number of usable frames."""

    name: Path
    frames: tuple[Path, ...]
    count: int

    def read(self, start: int, length: int) -> list[Image.Image]:
        if self.frames:
            return [read_image(file) for file in self.frames[start : start + length]]
        return list(islice(_decode(self.name), start, start + length))


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
    length = source.frames or int(setting(model_config, "num_frames", _DEFAULT_FRAMES))
    videos = _frame_folders(files) if files[0].suffix.lower() in SUFFIXES["image"] else _video_files(files)
    clips = [(video, start) for video in videos for start in range(0, video.count - length + 1, length)]
    if not clips:
        longest = max(video.count for video in videos)
        raise InputError(
            "data.frames", f"no video under {source.path} has {length} frames (the longest has {longest})", "lower it"
        )
    order = np.random.default_rng(seed).permutation(len(clips))[: source.samples]
    chosen = [clips[i] for i in order]
    plan = plan_batches(len(chosen), source.batch_size)

    def load(number: int) -> Batch:
        read = [pixels(video.read(start, length))["pixel_values"] for video, start in (chosen[i] for i in plan[number])]
        return pixel_batch({"pixel_values": torch.stack(read)}, model_config)

    return MediaBatches(sizes=tuple(map(len, plan)), load=load, notes=pixels.notes)


def _frame_folders(files: list[Path]) -> list[_Video]:
    folders = ((folder, tuple(frames)) for folder, frames in groupby(sorted(files), key=lambda file: file.parent))
    return [_Video(folder, frames, len(frames)) for folder, frames in folders]


def _video_files(files: list[Path]) -> list[_Video]:
    return [_Video(file, (), sum(1 for _ in islice(_decode(file, as_images=False), _MAX_FRAMES))) for file in files]


def _decode(file: Path, as_images: bool = True) -> Iterator[Any]:
    try:
        import av
    except ImportError as error:
        raise InputError(
            "data.path", f"reading {file} needs PyAV", "install it: pip install 'alphasmith[video]', or give frames"
        ) from error
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise InputError("data.path", f"{file} has no picture track", "remove it, or use data.kind = 'audio'")
            for frame in container.decode(video=0):
                yield frame.to_image() if as_images else None
    except (OSError, av.FFmpegError) as error:
        raise InputError("data.path", f"{file} is not a readable video ({error})", "repair or remove it") from error
