"""Inputs that a model of transformers is traced with: their axes count, not their numbers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch

#: Samples and tokens of an example. Axes of any size must be larger than 1, and differ, to be told apart.
SAMPLES, TOKENS = 2, 7
#: Length of an example of a waveform [samples].
_WAVE = 16_000


def example(model: nn.Module, processor: Mapping[str, Any]) -> Batch:
    """A batch for a model by its main input.

    Args:
        model: Of transformers.
        processor: Content of its ``preprocessor_config.json``; empty: it has none.

    Raises:
        InputError: Field ``--format``: nothing is known of its input.
    """
    config: Any = model.config
    name = str(getattr(model, "main_input_name", "input_ids"))
    taken = inspect.signature(model.forward).parameters
    if name == "input_ids":
        return Batch(kwargs=_tokens(config, taken))
    shape = _shape(name, config, processor)
    if shape is None or name not in taken:
        raise InputError(
            "--format",
            f"{type(model).__name__} reads {name}, of which no example can be made",
            "export from Python, with a batch",
        )
    given: dict[str, Tensor] = {name: torch.linspace(-1, 1, shape.numel()).reshape(shape)}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        given["decoder_input_ids"] = torch.ones(SAMPLES, TOKENS, dtype=torch.int64)
    return Batch(kwargs=given)


def _tokens(config: Any, taken: Mapping[str, object]) -> dict[str, Tensor]:
    ids = torch.ones(SAMPLES, TOKENS, dtype=torch.int64)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in taken and getattr(config, "type_vocab_size", 0) > 1:
        given["token_type_ids"] = torch.zeros_like(ids)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        given["decoder_input_ids"] = torch.ones(SAMPLES, TOKENS - 2, dtype=torch.int64)
    return {name: value for name, value in given.items() if name in taken}


def _shape(name: str, config: Any, processor: Mapping[str, Any]) -> torch.Size | None:
    """Of an input that is no text; None: unknown."""
    if name == "pixel_values":
        height, width = _picture(config, processor)
        channels = int(getattr(config, "num_channels", 3))
        frames = getattr(config, "num_frames", None)
        return torch.Size((SAMPLES, *([] if frames is None else [int(frames)]), channels, height, width))
    if name == "input_features":
        bins = int(getattr(config, "num_mel_bins", 0) or getattr(config, "feature_size", 0))
        positions = getattr(config, "max_source_positions", None)
        if bins and positions:
            return torch.Size((SAMPLES, bins, 2 * int(positions)))
    if name == "input_values":
        if getattr(config, "num_mel_bins", None) and getattr(config, "max_length", None):
            return torch.Size((SAMPLES, int(config.max_length), int(config.num_mel_bins)))
        return torch.Size((SAMPLES, _WAVE))
    return None


def _picture(config: Any, processor: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width as the processor makes them, else as the configuration has them."""
    wanted = [processor.get("crop_size") if processor.get("do_center_crop", True) else None, processor.get("size")]
    for size in wanted:
        if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
            return int(size["height"]), int(size["width"])
        if isinstance(size, Mapping) and "shortest_edge" in size and "crop_size" not in processor:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
        if isinstance(size, int):
            return size, size
    edges: Any = getattr(config, "image_size", 224)
    return (int(edges), int(edges)) if isinstance(edges, int) else (int(edges[0]), int(edges[1]))
