"""A tiny image classifier with its run, and pictures that it learns to tell apart in a few updates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alphasmith.search import RunResult
from alphasmith.search import run as start
from tests.support.run_cases import seeded, settings

NAMES = ("red", "green", "blue")
EDGE = 8
#: Updates of :data:`QUICK`.
STEPS = 12
#: A training that learns the colours within a second.
QUICK: dict[str, Any] = {
    "data": {"fraction": 0.4, "held_out": 0.4},
    "training": {"learning_rate": 5e-3, "steps": STEPS, "batch_size": 8, "evaluate_every": 3, "checkpoint_every": 2},
}


def write_pictures(folder: Path, count: int = 60) -> Path:
    """``count`` pictures of one colour each under noise, in a folder for each class."""
    generator = np.random.default_rng(0)
    for number in range(count):
        kind = number % len(NAMES)
        pixels = generator.integers(0, 120, (EDGE, EDGE, 3))
        pixels[..., kind] += 100
        target = folder / NAMES[kind]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(target / f"{number:03d}.png")
    return folder


def save_classifier(folder: Path) -> Path:
    """A vision transformer of one layer with random weights as a Hugging Face folder."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=EDGE,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
        architectures=["ViTForImageClassification"],
    )
    model: Any = seeded(lambda: ViTForImageClassification(config))
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": EDGE, "width": EDGE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def finished_run(folder: Path) -> RunResult:
    """A run of :func:`save_classifier` on :func:`write_pictures`, both of them in ``folder``."""
    model, data = save_classifier(folder / "model"), write_pictures(folder / "pictures")
    config = settings(
        folder,
        {"scheme": "w4a8-channel-static", "model": {"path": model}, "data": {"path": data}, "search": {"trials": 4}},
    )
    return start(config)


def wanted(folder: Path, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """:data:`QUICK` on the pictures of :func:`finished_run`, with ``values`` on top, section by section."""
    plain: dict[str, Any] = {"storage": f"sqlite:///{folder / 'runs.db'}", **QUICK}
    plain["data"] = {**QUICK["data"], "path": folder / "pictures"}
    for key, value in (values or {}).items():
        plain[key] = {**plain.get(key, {}), **value} if isinstance(value, Mapping) else value
    return plain
