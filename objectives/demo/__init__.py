"""Small models trained on data that ships with Python packages, for the embedded demo.

- ``_images``: demo (a): a vision transformer trained on scikit-learn's handwritten digits
- ``_task``: what an embedded demo is: a model, its data in three splits, and a metric
- ``_text``: demo (b): a LLaMA-architecture language model trained on the English text of Python's own
- ``outliers``: outlier channels like those of large language models
- ``training``: training of the demo models, and the cache of their weights
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from alphasmith.objectives.demo._images import image_demo
from alphasmith.objectives.demo._task import DemoTask, write_hf_folder, write_media
from alphasmith.objectives.demo._text import text_demo
from alphasmith.objectives.demo.outliers import NormPair, OutlierEdit, find_pairs, with_outliers
from alphasmith.objectives.demo.training import Progress, cache_folder
from alphasmith.objectives.errors import InputError

__all__ = [
    "DemoTask",
    "NormPair",
    "OutlierEdit",
    "find_pairs",
    "load_demo",
    "with_outliers",
    "write_hf_folder",
    "write_media",
]

_DEMOS = {"image": image_demo, "text": text_demo}


def load_demo(
    name: Literal["image", "text"],
    seed: int = 0,
    cache_dir: Path | None = None,
    *,
    progress: Progress | None = None,
) -> DemoTask:
    """An embedded demo; trained the first time, read from the cache afterwards.

    Training is deterministic for one machine, thread count and version of torch; the cache makes it so across thread
    counts. The cached file is named by the seed, the settings and the training data.

    Args:
        name: ``image``: digits and a vision transformer; ``text``: a LLaMA-architecture language model.
        seed: Draws initial weights, training batches and outliers; not the splits.
        cache_dir: Where weights are kept; default: ``alphasmith`` in the user's cache folder.
        progress: Called with (steps done, steps in all) while training; not called when the cache is used.

    Raises:
        InputError: There is no such demo.
    """
    if name not in _DEMOS:
        raise InputError("demo", f"{name!r} is unknown", f"use {' or '.join(_DEMOS)}")
    return _DEMOS[name](seed, cache_folder() if cache_dir is None else cache_dir, progress)
