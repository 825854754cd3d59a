"""Demo (a): a vision transformer trained on scikit-learn's handwritten digits."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from alphasmith.objectives.demo._task import DemoTask, describe_outliers
from alphasmith.objectives.demo.outliers import find_pairs, with_outliers
from alphasmith.objectives.demo.training import Progress, cache_key, make_seeded, restore_or_train, train
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.media.batches import MediaBatches, Splits

_VERSION = 1
_MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 3,
    "initializer_range": 0.1,  # with transformers' 0.02 so narrow a model learns ten times slower
}
_STEPS, _RATE, _BATCH = 400, 1e-3, 64
_NOISE = 0.3  # added to training pixels; one to three points of accuracy on so few images
_TEST, _CALIBRATION, _TUNING, _HELD_OUT, _PROOF = 500, 128, 64, 96, 32
_GAINS = (40.0, 60.0)
_EVALUATION_BATCH = 100
_PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def image_demo(seed: int, cache_dir: Path, progress: Progress | None = None) -> DemoTask:
    """The digits demo: 8x8 images, 17 tokens, 4 layers of width 64, ten classes.

    500 images are test data. The model is trained on the rest but for 96 held-out and 32 proof images; calibration uses
    128 of the training images, tuning 64 others.
    """
    pixels, labels = _digits()
    # The division into splits does not depend on the seed: metrics of different seeds are on the same test data.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, held_out, proof, training = torch.split(
        order, [_TEST, _HELD_OUT, _PROOF, len(order) - _TEST - _HELD_OUT - _PROOF]
    )
    settings = {"version": _VERSION, "model": _MODEL, "steps": _STEPS, "rate": _RATE, "batch": _BATCH, "noise": _NOISE}
    key = cache_key("image", seed, settings, pixels.numpy().tobytes() + labels.numpy().tobytes())
    model = make_seeded(_build, seed)

    def loss(generator: torch.Generator) -> torch.Tensor:
        rows = training[torch.randint(len(training), (_BATCH,), generator=generator)]
        noisy = pixels[rows] + _NOISE * torch.randn(pixels[rows].shape, generator=generator)
        return nn.functional.cross_entropy(main_output(model(pixel_values=noisy)), labels[rows])

    restore_or_train(
        model, cache_dir / key, lambda: train(model, loss, steps=_STEPS, rate=_RATE, seed=seed, progress=progress)
    )
    norms = [name for name, _ in model.named_modules() if name.endswith(("layernorm_before", "layernorm_after"))]
    pairs = find_pairs(model, norms, Batch(kwargs={"pixel_values": pixels[training[:_CALIBRATION]]}))
    spiked, outliers = with_outliers(model, pairs, gains=_GAINS, seed=seed)

    def metric(candidate: nn.Module) -> float:
        correct = 0
        with torch.no_grad():
            for rows in torch.split(test, _EVALUATION_BATCH):
                answer = main_output(call(candidate, Batch(kwargs={"pixel_values": pixels[rows]})))
                correct += int((answer.argmax(-1) == labels[rows]).sum())
        return correct / _TEST

    return DemoTask(
        name="image",
        description="Handwritten digits (scikit-learn, 8x8) read by a vision transformer of 4 layers, width 64. "
        + describe_outliers(outliers),
        model=spiked,
        splits=Splits(
            calibration=_batches(pixels, labels, training[:_CALIBRATION]),
            tuning=_batches(pixels, labels, training[_CALIBRATION : _CALIBRATION + _TUNING]),
            held_out=_batches(pixels, labels, held_out),
            proof=_batches(pixels, labels, proof),
        ),
        metric=metric,
        metric_name="accuracy",
        higher_is_better=True,
        outliers=outliers,
        files={"preprocessor_config.json": json.dumps(_PROCESSOR, indent=2) + "\n"},
    )


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 3, 8, 8) float32 in [-1, 1] on 8-bit levels, so that PNG files hold them exactly; labels (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = (torch.from_numpy(digits.images) * (255 / 16)).round().float() / 255
    pixels = ((levels - 0.5) / 0.5)[:, None].repeat(1, 3, 1, 1)
    return pixels, torch.from_numpy(digits.target).long()


def _build() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        **_MODEL, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager"
    )
    model: nn.Module = ViTForImageClassification(config)
    return model


def _batches(pixels: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> MediaBatches:
    def load(numbers: tuple[int, ...]) -> Batch:
        chosen = rows[list(numbers)]
        return Batch(kwargs={"pixel_values": pixels[chosen]}, labels=labels[chosen])

    return MediaBatches.of(len(rows), 32, load)
