"""How the learning rate goes over the updates of a training."""

from __future__ import annotations

import torch
from transformers import get_scheduler

from alphasmith.objectives.training.settings import ScheduleName


def scheduled(
    optimizer: torch.optim.Optimizer, *, schedule: ScheduleName, warm_up: float, updates: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler of transformers: a linear rise from 0, then the named course; stepped once an update.

    Args:
        optimizer: Whose learning rates are the largest ones.
        schedule: How the rate goes after the rise.
        warm_up: Share of the updates during which it rises, in [0, 1].
        updates: All updates.
    """
    made: torch.optim.lr_scheduler.LambdaLR = get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule,
        optimizer,
        num_warmup_steps=round(warm_up * updates),
        num_training_steps=updates,
    )
    return made
