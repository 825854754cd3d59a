"""Updates of a float model's weights: order, learning rate, clipping, the last good state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.ports import JointTask
from alphasmith.objectives.joint.rounds.outcome import Trained, UpdatePoint, UpdatesEnding
from alphasmith.objectives.joint.rounds.settings import Updates
from alphasmith.objectives.joint.sparsity.terms import SparsityTerms
from alphasmith.objectives.media.batch import data_errors
from alphasmith.objectives.training.sampler import EndlessOrder, place_seed
from alphasmith.objectives.training.schedule import scheduled


class _DivergedError(Exception):
    """What was not finite."""


def update(
    model: nn.Module,
    task: JointTask,
    updates: Updates,
    *,
    terms: Callable[[nn.Module], SparsityTerms] | None = None,
    seed: int | None = None,
    progress: Callable[[UpdatePoint], None] = lambda point: None,
    stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train a model in place, and leave it in evaluation mode with finite weights.

    Args:
        model: All its floating parameters are trained.
        task: Loss and samples.
        updates: How.
        terms: What is added to the loss; None: nothing.
        seed: In place of that of ``updates``.
        progress: Receives every point of the curve.
        stop: Polled before every update.

    Raises:
        InputError: There is no sample, or the loss is no scalar that depends on the parameters.
    """
    if len(task.train) < 1:
        raise InputError("data", "there is no sample to train on", "give more data")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    made = _Run(model, task, updates, terms, updates.seed if seed is None else seed)
    ending: UpdatesEnding = "finished"
    trouble = ""
    try:
        while made.step < updates.steps:
            if stop():
                ending = "interrupted"
                break
            point = made.one()
            if point is not None:
                progress(point)
        made.check()
    except _DivergedError as error:
        ending = "diverged"
        trouble = f"{error}; the model is that of step {made.back()}"
    finally:
        model.eval()
        model.requires_grad_(False)
    return Trained(steps=made.step, points=tuple(made.points), ending=ending, trouble=trouble)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        task: JointTask,
        updates: Updates,
        terms: Callable[[nn.Module], SparsityTerms] | None,
        seed: int,
    ) -> None:
        self._model, self._task, self._updates, self._terms, self._seed = model, task, updates, terms, seed
        parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        if not parameters:
            raise InputError("model", "has no parameters to train", "give a model that has")
        self._device = parameters[0].device
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": updates.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        used = [group for group in groups if group["params"]]
        self._optimizer = torch.optim.AdamW(used, lr=updates.learning_rate)
        self._scheduler = scheduled(
            self._optimizer, schedule=updates.schedule, warm_up=updates.warm_up, updates=updates.steps
        )
        self._order = EndlessOrder(len(task.train), seed)
        self._size = min(updates.batch_size, len(task.train))
        self.step = 0
        self.points: list[UpdatePoint] = []
        self._seen: list[tuple[float, float, float]] = []
        #: Weights that gave a finite loss, and how many updates they have.
        self._good = (_copied(model), 0)

    def one(self) -> UpdatePoint | None:
        """One update; a point of the curve where one is due."""
        model, updates = self._model, self._updates
        model.train()
        self._optimizer.zero_grad(set_to_none=True)
        drawn = self._order.drawn
        batch = self._task.train.batch(self._order.draw(self._size)).to(self._device)
        devices = [self._device] if self._device.type == "cuda" else []
        before = _copied(model) if self.step % updates.check_every == 0 else None
        # Dropout depends on the seed and on the samples drawn before; the generator of the process stays as it was.
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(place_seed(self._seed, drawn, "dropout"))
            with data_errors():
                loss = self._task.loss(model, batch)
            if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
                raise InputError("loss", "is no scalar that depends on the parameters", "return a tensor of shape ()")
            terms = None if self._terms is None else self._terms(model)
            total = loss if terms is None else loss + terms.total
        values = (float(loss.detach()), *((0.0, 0.0) if terms is None else _floats(terms)))
        number = self.step + 1
        if not math.isfinite(sum(values)):
            raise _DivergedError(f"the loss was {sum(values)} at step {number}")
        if before is not None:
            self._good = (before, self.step)
        torch.autograd.backward(total)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), updates.clip or math.inf))
        if not math.isfinite(norm):
            raise _DivergedError(f"the gradient was {norm} at step {number}")
        rate = float(self._scheduler.get_last_lr()[0])
        self._optimizer.step()
        self._scheduler.step()
        self.step = number
        self._seen.append(values)
        if number % updates.check_every and number != updates.steps:
            return None
        task, first, second = (sum(column) / len(self._seen) for column in zip(*self._seen, strict=True))
        self._seen.clear()
        point = UpdatePoint(step=number, steps=updates.steps, task=task, first=first, second=second, learning_rate=rate)
        self.points.append(point)
        return point

    def check(self) -> None:
        """Refuse weights of which the last update made NaN or infinity."""
        for name, tensor in self._model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise _DivergedError(f"{name} was not finite after step {self.step}")

    def back(self) -> int:
        """Go back to the last good weights; returns how many updates they have."""
        tensors, self.step = self._good
        self._model.load_state_dict(tensors)
        return self.step


def _copied(model: nn.Module) -> Mapping[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _floats(terms: SparsityTerms) -> tuple[float, float]:
    return float(terms.first.detach()), float(terms.second.detach())
