"""Images, by the model's own image processor where it has one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media._bounds import (
    IMAGE_FORMATS,
    MOST_EDGE,
    MOST_IMAGE_BYTES,
    Content,
    check_file,
    check_pixels,
    check_settings,
)
from alphasmith.objectives.media._source import MediaSource, is_transformers_config, setting
from alphasmith.objectives.media._targets import file_targets
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.batches import MediaBatches
from alphasmith.objectives.reading import read_object, refusing

_SET_SIZE = "repair preprocessor_config.json, or set data.image_size"
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True, kw_only=True)
class PixelProcessor:
    """Turns pictures into the tensors a model takes.

    Attributes:
        processor: The model's transformers image processor, or None.
        mode: Pillow mode pictures are converted to, ``RGB`` or ``L``.
        size: (height, width) without a processor [pixels].
        mean: Subtracted per channel after scaling to [0, 1], without a processor.
        std: Divided by per channel, without a processor.
        notes: What was assumed.
    """

    processor: Any
    mode: str
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...]

    def __call__(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """Tensors by the names transformers gives them; ``pixel_values`` (B, channels, H, W) among them."""
        with refusing("data.path", "an image cannot be converted", "repair or remove it"):
            images = [image.convert(self.mode) for image in images]
        if self.processor is None:
            return {"pixel_values": torch.stack([self._plain(image) for image in images])}
        told = "the model's image processor refuses the images"
        with refusing("data.path", told, "give images of one size, or repair preprocessor_config.json"):
            out = self.processor(images=images, return_tensors="pt")
        tensors = {name: torch.as_tensor(value) for name, value in out.items() if isinstance(value, torch.Tensor)}
        if "pixel_values" not in tensors:
            problem = f"the model's image processor makes {', '.join(tensors) or 'no tensors'}, no pixel_values"
            raise InputError("model.path", problem, "repair or remove preprocessor_config.json")
        if tensors.get("pixel_values", torch.empty(0)).dim() == 5:  # video processors see one clip in a list of frames
            tensors["pixel_values"] = tensors["pixel_values"].flatten(0, 1)
        return tensors

    def is_fixed(self) -> bool:
        """Whether pictures of any size become tensors of one size."""
        if self.processor is None:
            return True
        made = [self([Image.new("RGB", size)]) for size in ((48, 64), (96, 64))]
        small, large = ({name: value.shape for name, value in tensors.items()} for tensors in made)
        return small == large

    def _plain(self, image: Image.Image) -> torch.Tensor:
        height, width = self.size
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255.0)
        pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        mean, std = torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)
        return ((pixels - mean) / std).contiguous()


def load_images(
    source: MediaSource, files: list[Path], *, model_folder: Path | None, model_config: Any, seed: int
) -> MediaBatches:
    """Images as batches of ``pixel_values`` (B, channels, H, W).

    Args:
        source: What to read.
        files: Image files; ``source.samples`` of them are drawn from ``seed``.
        model_folder: Folder with ``preprocessor_config.json``. Without one, images are resized to the model's size,
            scaled to [0, 1], and normalized with mean 0.5 and standard deviation 0.5.
        model_config: The model's configuration.
        seed: Draws the samples and their order.

    Raises:
        InputError: A file is no readable image.
    """
    pixels = load_pixel_processor(source, model_folder, model_config)
    chosen = [files[i] for i in source.drawn(len(files), np.random.default_rng(seed))]
    sizes: list[tuple[int, int]] = []
    for file in chosen:  # headers only: a text file named .png is found before the run has cost anything
        with open_image(file) as image:
            sizes.append(image.size)

    def load(numbers: tuple[int, ...]) -> Batch:
        return pixel_batch(pixels([read_image(chosen[i]) for i in numbers]), model_config)

    # Pictures that the processor leaves in several sizes would be padded to the largest of their batch.
    alike = [] if pixels.is_fixed() else sizes
    return MediaBatches.of(
        len(chosen), source.batch_size, load, alike=alike, targets=file_targets(source, chosen), notes=pixels.notes
    )


def pixel_batch(tensors: Mapping[str, torch.Tensor], config: Any) -> Batch:
    """A batch of pixels: keyword arguments for transformers models, one positional argument for others."""
    if not is_transformers_config(config):
        return Batch(args=(tensors["pixel_values"],))
    return Batch(kwargs=dict(tensors))


def open_image(file: Content, most: int | None = None) -> Image.Image:
    """Open an image without decoding it.

    Args:
        file: An image file, or its content.
        most: Largest one [pixels]; None: as many as ``_bounds`` allows.

    Raises:
        InputError: The file is no readable image, of another format than ``IMAGE_FORMATS``, or too large.
    """
    check_file(file, MOST_IMAGE_BYTES)
    problem, remedy = f"{file} is not a readable image", "repair or remove it"
    with warnings.catch_warnings(), refusing("data.path", problem, remedy):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is ours
        source = file if isinstance(file, Path) else file.open()
        try:
            image = Image.open(source, formats=IMAGE_FORMATS)
        except UnidentifiedImageError as error:  # its text shows the open file's address in memory
            raise InputError("data.path", f"{problem} (formats: {', '.join(IMAGE_FORMATS)})", remedy) from error
    check_pixels(file, *image.size, most=most)
    return image


def read_image(file: Content, most: int | None = None) -> Image.Image:
    """Read an image whole.

    Args:
        file: As for ``open_image``.
        most: As for ``open_image``.

    Raises:
        InputError: As ``open_image``; or the file is cut off or corrupt.
    """
    with open_image(file, most) as image, refusing("data.path", f"{file} is a damaged image", "repair or remove it"):
        image.load()
        return image.copy()


def load_pixel_processor(source: MediaSource, folder: Path | None, config: Any) -> PixelProcessor:
    """The model's image processor (Pillow backend, no torchvision needed), or a plain stand-in.

    Args:
        source: For ``image_size``, used where there is no processor.
        folder: Model folder, or None.
        config: Model configuration, for the image size and the number of channels.

    Raises:
        InputError: The processor's file is no JSON, or a 1- or 3-channel image is not what the model takes.
    """
    channels = setting(config, "num_channels", 3)
    if channels not in (1, 3):
        raise InputError("model.path", f"takes images of {channels} channels", "pass them as in-memory batches")
    mode = "L" if channels == 1 else "RGB"
    stored = _stored_settings(folder)
    processor = _load_processor(folder) if stored else None
    notes: tuple[str, ...] = ()
    size, mean, std = _plain_settings(source, config, stored, channels)
    if processor is None:
        origin = "values of the model's processor file" if stored else "the model has no image processor"
        notes = (f"images resized to {size[0]}x{size[1]}, mean {mean[0]:g}, standard deviation {std[0]:g}: {origin}",)
    return PixelProcessor(processor=processor, mode=mode, size=size, mean=mean, std=std, notes=notes)


def _load_processor(folder: Path | None) -> Any:
    from transformers import AutoImageProcessor

    with suppress(Exception):
        # Older models name no processor class, and some processors need torchvision; their numbers are used instead.
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False, backend="pil")
    return None


def _stored_settings(folder: Path | None) -> Mapping[str, Any]:
    if folder is None:
        return {}
    for name in _PROCESSOR_FILES:
        file = folder / name
        if not file.is_file():
            continue
        content = read_object(file, field="model.path")
        check_settings(file, content)
        for key in ("image_processor", "video_processor"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
        if "feature_extractor_type" not in content or "image_processor_type" in content or "image_mean" in content:
            return dict(content)
    return {}


def _plain_settings(
    source: MediaSource, config: Any, stored: Mapping[str, Any], channels: int
) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...]]:
    size: Any = source.image_size or stored.get("crop_size") or stored.get("size") or setting(config, "image_size", 224)
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge", 224)
        size = (size.get("height", edge), size.get("width", edge))
    edges = size if isinstance(size, (tuple, list)) else (size, size)
    if len(edges) != 2 or not all(isinstance(e, (int, float)) and 1 <= e <= MOST_EDGE for e in edges):
        raise InputError("model.path", f"its images have size {str(size)[:100]!r}, no two numbers of pixels", _SET_SIZE)
    mean, std = (_per_channel(stored, name, channels) for name in ("image_mean", "image_std"))
    if not all(std):
        raise InputError("model.path", "image_std of its processor is 0", "repair preprocessor_config.json")
    return (int(edges[0]), int(edges[1])), mean, std


def _per_channel(stored: Mapping[str, Any], name: str, channels: int) -> tuple[float, ...]:
    values = stored.get(name) or (0.5,) * channels
    values = values if isinstance(values, (tuple, list)) else (values,) * channels
    if len(values) not in (1, channels) or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        problem = f"{name} of its processor is {str(values)[:100]!r}, not {channels} numbers"
        raise InputError("model.path", problem, "repair preprocessor_config.json")
    return tuple(map(float, values))
