"""Training of the demo models, and the cache of their weights."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

#: Called with (steps done, steps in all).
Progress = Callable[[int, int], None]
_log = logging.getLogger(__name__)


def make_seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a module whose initial weights depend on ``seed`` only; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):  # transformers initializes from the global generator and takes no other
        torch.manual_seed(seed)
        return build()


def train(
    model: nn.Module,
    loss: Callable[[torch.Generator], torch.Tensor],
    *,
    steps: int,
    rate: float,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """AdamW with a linear warm-up over a tenth of the steps and a cosine descent to zero, gradients clipped at norm 1.

    Args:
        model: Trained in place, left in evaluation mode.
        loss: Loss of one batch, drawn with the generator it is given.
        steps: Number of updates.
        rate: Highest learning rate.
        seed: Draws the batches.
        progress: Called after every update.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.95))
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 10 * (step + 1) / steps) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(step + 1, steps)
    model.eval()
    model.requires_grad_(False)


def cache_folder() -> Path:
    """Where the platform keeps what can be made again: the folder ``alphasmith`` in the user's cache folder."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "alphasmith"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "alphasmith"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "alphasmith"
    return Path.home() / ".cache" / "alphasmith"


def cache_key(name: str, seed: int, settings: Mapping[str, Any], data: bytes) -> str:
    """File name of trained weights: a change of settings, data or seed gives another one."""
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
    digest.update(data)
    return f"{name}-seed{seed}-{digest.hexdigest()[:16]}.safetensors"


def restore_or_train(model: nn.Module, file: Path, training: Callable[[], None]) -> None:
    """Fill ``model`` from ``file``, or train it and leave the weights there.

    A cache that cannot be read or written costs time, never the run: it is trained again, and a line is logged.
    """
    try:
        model.load_state_dict(load_file(file))
        model.eval()
        model.requires_grad_(False)
        return
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, SafetensorError) as error:
        _log.warning("cached demo weights %s are unusable and are trained again: %s", file, error)
    training()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: two runs that start together both train, and the later one replaces equal bytes.
        with NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            temporary = Path(part.name)
        try:
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("demo weights are not cached: %s", error)
