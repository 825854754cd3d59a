"""A small image classifier as a folder, media of every kind, and ways to spoil them."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from alphasmith.search.config import RunConfig
from alphasmith.search.inputs.preparation import survey
from alphasmith.search.inputs.task import Task, load_task

#: Deeper than any parser of JSON goes.
DEEP = "[" * 200_000

Change = Callable[[Path], object]


def saved_classifier(folder: Path) -> Path:
    """A vision transformer with random weights and its image processor, as a model folder."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def pictures(folder: Path, count: int = 8) -> Path:
    """Small pictures in one folder."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i}.png")
    return folder


def saved_sound(file: Path, *, rate: int = 16_000, seconds: float = 0.2, channels: int = 1) -> Path:
    """A tone as 16-bit PCM."""
    times = np.arange(int(seconds * rate)) / rate
    samples = (3000 * np.sin(2 * np.pi * 440 * times)).astype("<i2").repeat(channels)
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(channels)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes(samples.tobytes())
    return file


def saved_film(file: Path, frames: int = 4) -> Path:
    """A few grey frames as MPEG-4."""
    import av

    with av.open(str(file), "w") as container:
        track: Any = container.add_stream("mpeg4", rate=4)
        track.width, track.height, track.pix_fmt = 32, 32, "yuv420p"
        for i in range(frames):
            picture = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (40 * i, 0, 0)))
            container.mux(track.encode(picture))
        container.mux(track.encode(None))
    return file


def task_of(model: Path, data: Path, *, traced: bool = False) -> Task:
    """What a run would work on, with every batch read; ``traced``: and its sites found."""
    values = {
        "model": {"path": model},
        "data": {"path": data, "samples": 4, "held_out": 2, "proof": 1, "batch_size": 2},
    }
    config = RunConfig.build(values)
    task = load_task(config)
    list(task.calibration)
    if traced:
        survey(config, task)
    return task


def settings(name: str, **values: object) -> Change:
    """Set fields of a JSON file of a model folder."""

    def change(model: Path) -> None:
        file = model / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def content(name: str, text: str | bytes) -> Change:
    """Put a text in the place of a file."""
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
