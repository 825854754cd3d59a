"""What an embedded demo is: a model, its data in three splits, and a metric."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from alphasmith.objectives.demo.outliers import OutlierEdit
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.batches import Splits


@dataclass(frozen=True, kw_only=True)
class DemoTask:
    """A model to smooth and everything needed to judge the result, without network or files of others.

    Attributes:
        name: ``image`` or ``text``.
        description: What it is, for the user; says that the outliers are synthetic.
        model: Trained, in evaluation mode, with outliers.
        splits: Calibration, tuning, held-out and proof batches; none of them is in the metric's test data.
        metric: Task metric of a model that is called as ``model`` is, on test data nothing else uses.
        metric_name: ``accuracy`` (share) or ``perplexity`` (per token).
        higher_is_better: Direction of the metric.
        outliers: What was changed to give the model outliers.
        files: Tokenizer or processor files that belong beside the checkpoint, by name.
    """

    name: str
    description: str
    model: nn.Module
    splits: Splits
    metric: Callable[[nn.Module], float]
    metric_name: str
    higher_is_better: bool
    outliers: tuple[OutlierEdit, ...]
    files: Mapping[str, str]

    @property
    def calibration(self) -> tuple[Batch, ...]:
        """Batches for statistics and trials."""
        return tuple(self.splits.calibration)

    @property
    def tuning(self) -> tuple[Batch, ...]:
        """Batches for choices at the model's output."""
        return tuple(self.splits.tuning)

    @property
    def held_out(self) -> tuple[Batch, ...]:
        """Batches for the guard."""
        return tuple(self.splits.held_out)

    @property
    def proof(self) -> tuple[Batch, ...]:
        """Batches for the equivalence proof."""
        return tuple(self.splits.proof)


def describe_outliers(outliers: tuple[OutlierEdit, ...]) -> str:
    """One sentence on the synthetic outliers of a demo."""
    gains = [gain for edit in outliers for gain in edit.gains]
    return (
        f"Its outliers are synthetic: small models have none, so {len(gains)} channels of {len(outliers)} norms were "
        f"multiplied by {min(gains):.0f} to {max(gains):.0f} and the weights that read them divided, which leaves the "
        "function as trained."
    )


def write_hf_folder(task: DemoTask, folder: Path) -> Path:
    """Save a demo as a Hugging Face folder: ``config.json``, ``model.safetensors``, tokenizer or processor files.

    Args:
        task: The demo.
        folder: Made if missing; must be empty.

    Returns:
        ``folder``.

    Raises:
        InputError: The folder holds something, or cannot be written.
    """
    _make_folder(folder)
    model: Any = task.model
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    try:
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in task.files.items():
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(
            "folder", f"{folder} cannot be written ({error.strerror})", "give a writable folder"
        ) from error
    return folder


def write_media(task: DemoTask, folder: Path) -> Path:
    """Write the calibration, tuning, held-out and proof samples of a demo as files, as a user would have them.

    Images become PNG files that give exactly the same tensors again; text becomes ``text.jsonl``.

    Args:
        task: The demo.
        folder: Made if missing; must be empty.

    Returns:
        ``folder``, to be given as ``MediaSource.path``.

    Raises:
        InputError: The folder holds something, or cannot be written.
    """
    _make_folder(folder)
    batches = (*task.calibration, *task.tuning, *task.held_out, *task.proof)
    try:
        if task.name == "image":
            pixels = torch.cat([batch.kwargs["pixel_values"] for batch in batches])
            levels = ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            for number, image in enumerate(levels):
                Image.fromarray(image.numpy()).save(folder / f"{number:04d}.png")
        else:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_str(task.files["tokenizer.json"])
            rows = [row for batch in batches for row in batch.kwargs["input_ids"].tolist()]
            lines = (json.dumps({"text": tokenizer.decode(row)}) + "\n" for row in rows)
            (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise InputError(
            "folder", f"{folder} cannot be written ({error.strerror})", "give a writable folder"
        ) from error
    return folder


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("folder", f"{folder} cannot be made ({error.strerror})", "give a writable path") from error
    if any(folder.iterdir()):
        raise InputError("folder", f"{folder} is not empty", "give a new folder")
