"""Tables of codebooks trained on the task while every weight keeps its entry. Source: claim B-7; gradients of an entry's weights are summed.

A table that is nearest to the weights is not the one that serves the task best. Indices stay as they are, so that a model takes as many
bytes afterwards as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.codebook.tensors import indices_of, with_table
from alphasmith.objectives.joint.packed.packing import PackedModel, PackedStructure
from alphasmith.objectives.joint.packed.restoring import load_packed
from alphasmith.objectives.joint.ports import JointTask
from alphasmith.objectives.model.private_copy import private_copy
from alphasmith.objectives.training.sampler import EndlessOrder, place_seed

#: Scalar loss of one update: (model, number of the update from 0), differentiable in the model's parameters.
LossStep = Callable[[nn.Module, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How tables are trained.

    Attributes:
        steps: Updates.
        learning_rate: Of AdamW, in the unit of the weights.
        weight_decay: Of AdamW.
        clip: Largest norm of the gradient of all tables; 0: as it is.
        floats: Train what stays float, too.
        hold_zero: Entries that are exactly 0 stay so.
        seed: Of what the loss draws.
    """

    steps: int = 100
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    floats: bool = False
    hold_zero: bool = True
    seed: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class TunedTables:
    """What the training of tables came to.

    Attributes:
        packed: The model with the tables that are kept.
        kept: Whether these are the trained ones.
        before: What the judge says of the model as it was.
        after: What it says of the trained one; None where its judgement is not finite.
        losses: Loss before every update.
        trouble: What was not finite, and where training stopped; empty where nothing was.
    """

    packed: PackedModel
    kept: bool
    before: float
    after: float | None
    losses: tuple[float, ...]
    trouble: str = ""


def task_steps(task: JointTask, *, batch_size: int, seed: int) -> LossStep:
    """The loss of a task on its training samples, pass after pass.

    Args:
        task: Loss and samples.
        batch_size: Samples of an update.
        seed: Of their order.

    Raises:
        InputError: There is no sample, or a batch is empty.
    """
    samples = len(task.train)
    if samples < 1 or batch_size < 1:
        raise InputError("data", f"{samples} samples make no batches of {batch_size}", "give more data")
    size = min(batch_size, samples)

    def loss(model: nn.Module, step: int) -> Tensor:
        order = EndlessOrder(samples, seed)
        order.drawn = step * size
        device = next(model.parameters()).device
        return task.loss(model, task.train.batch(order.draw(size)).to(device))

    return loss


def finetune_tables(
    model: nn.Module,
    packed: PackedModel,
    loss: LossStep,
    settings: TuningSettings,
    *,
    judge: Callable[[nn.Module], float],
    stop: Callable[[], bool] = lambda: False,
) -> TunedTables:
    """Train the entries of all tables; they are kept only if the judge says that the model is better. Source: claim B-7.

    The model stays in evaluation mode: statistics of normalizations do not move and nothing is dropped.

    Args:
        model: What was packed, or what :func:`~alphasmith.objectives.joint.packed.restoring.restore` made of it; not modified.
        packed: What is stored of it.
        loss: Of one update.
        settings: How.
        judge: Larger is better; looks at data that the loss does not see.
        stop: Polled before every update; what was reached until then is judged.

    Raises:
        InputError: A setting is out of range, the model has no codebook, or the loss is no scalar that depends on the parameters.
        NonFiniteError: The judge finds the model not finite before any update.
    """
    _check(settings, packed)
    work = _frozen(model)
    load_packed(work, packed)
    before = float(judge(work))
    if not math.isfinite(before):
        raise NonFiniteError(f"the judge says {before} of the model before any update")
    run = _Tuning(work, packed, settings)
    trouble = run.all(loss, stop)
    made = run.packed()
    load_packed(work, made)
    after = float(judge(work))
    kept = math.isfinite(after) and after > before
    return TunedTables(
        packed=made if kept else packed,
        kept=kept,
        before=before,
        after=after if math.isfinite(after) else None,
        losses=tuple(run.losses),
        trouble=trouble,
    )


def with_trained(packed: PackedModel, structure: PackedStructure, tensors: Mapping[str, Tensor]) -> PackedModel:
    """A packed model with tables that were trained, which its report says.

    Args:
        packed: Before the training.
        structure: After it.
        tensors: After it.
    """
    report = tuple(
        replace(one, sqnr=None, notes=(*one.notes, "its table was trained")) if one.name in structure.codebooks else one
        for one in packed.report
    )
    return replace(packed, structure=structure, tensors=tensors, report=report)


class _Tuning:
    def __init__(self, work: nn.Module, packed: PackedModel, settings: TuningSettings) -> None:
        self._work, self._packed, self._settings = work, packed, settings
        self.losses: list[float] = []
        books = packed.structure.codebooks
        self._weights = {name: work.get_parameter(name) for name in books}
        parts = {name: _parts(packed.tensors, name) for name in books}
        self._indices: dict[str, Tensor] = {}
        self._tables: dict[str, nn.Parameter] = {}
        for name, entry in books.items():
            device = self._weights[name].device
            self._indices[name] = indices_of(name, entry, parts[name]).reshape(-1).to(device)
            self._tables[name] = nn.Parameter(parts[name]["table"].to(device, torch.float32, copy=True))
        self._held = {name: table.detach() == 0 for name, table in self._tables.items() if settings.hold_zero}
        self._floats = {
            name: parameter
            for name, parameter in work.named_parameters()
            if settings.floats and name not in books and parameter.is_floating_point()
        }
        for parameter in (*self._weights.values(), *self._floats.values()):
            parameter.requires_grad_(True)
        self._trained = [*self._tables.values(), *self._floats.values()]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._good = self._state()

    def all(self, loss: LossStep, stop: Callable[[], bool]) -> str:
        """Every update; returns what was not finite."""
        for step in range(self._settings.steps):
            if stop():
                break
            trouble = self._one(loss, step)
            if trouble:
                self._back()
                return f"{trouble} at update {step + 1}; the tables are the last that gave a finite loss"
        if not all(bool(torch.isfinite(one).all()) for one in self._trained):
            self._back()
            return "a table was not finite after the last update; the tables are those before it"
        return ""

    def packed(self) -> PackedModel:
        """The packed model with the tables as they are now."""
        structure, tensors = self._packed.structure, dict(self._packed.tensors)
        books = dict(structure.codebooks)
        for name, table in self._tables.items():
            entry, parts = with_table(books[name], _parts(tensors, name), table)
            books[name] = entry
            tensors |= {f"codebook/{name}/{part}": value for part, value in parts.items()}
        for name, parameter in self._floats.items():
            key = f"plain/{name}"
            tensors[key] = parameter.detach().to("cpu", tensors[key].dtype, copy=True)
        return with_trained(self._packed, structure.model_copy(update={"codebooks": books}), tensors)

    def _one(self, loss: LossStep, step: int) -> str:
        for parameter in (*self._weights.values(), *self._floats.values()):
            parameter.grad = None
        device = next(iter(self._weights.values())).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(place_seed(self._settings.seed, step, "tables"))
            found = loss(self._work, step)
        if not isinstance(found, Tensor) or found.dim() or not found.requires_grad:
            raise InputError("loss", "is no scalar that depends on the parameters", "return a tensor of shape ()")
        value = float(found.detach())
        if not math.isfinite(value):
            return f"the loss was {value}"
        self.losses.append(value)
        self._good = self._state()
        torch.autograd.backward(found)
        for name, table in self._tables.items():
            table.grad = torch.zeros_like(table)
            gradient = self._weights[name].grad
            if gradient is not None:
                table.grad.index_add_(0, self._indices[name], gradient.reshape(-1).float())
            if name in self._held:
                table.grad[self._held[name]] = 0.0
        norm = float(nn.utils.clip_grad_norm_(self._trained, self._settings.clip or math.inf))
        if not math.isfinite(norm):
            return f"the gradient was {norm}"
        self._optimizer.step()
        self._write()
        return ""

    def _state(self) -> list[Tensor]:
        return [one.detach().clone() for one in self._trained]

    def _back(self) -> None:
        with torch.no_grad():
            for one, good in zip(self._trained, self._good, strict=True):
                one.copy_(good)
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        """Every weight as its entry."""
        for name, table in self._tables.items():
            if name in self._held:
                table[self._held[name]] = 0.0
            weight = self._weights[name]
            weight.copy_(table[self._indices[name]].reshape(weight.shape))


def _frozen(model: nn.Module) -> nn.Module:
    """A private copy in evaluation mode whose tensors want no gradient."""
    work = private_copy(model).eval().requires_grad_(False)
    for module in work.modules():
        if isinstance(module, nn.RNNBase):  # the fused layers of CUDA have gradients in training mode only
            module.train()
            module.dropout = 0.0
    return work


def _parts(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    inside = f"codebook/{name}/"
    names = (key for key in tensors if key.startswith(inside) and "/" not in key[len(inside) :])
    return {key[len(inside) :]: tensors[key] for key in names}


def _check(settings: TuningSettings, packed: PackedModel) -> None:
    if not packed.structure.codebooks:
        raise InputError("model", "has no codebook", "pack it with clusters")
    for name in ("learning_rate", "weight_decay", "clip"):
        value = getattr(settings, name)
        if not math.isfinite(value) or value < 0:
            raise InputError(f"tuning.{name}", f"is {value}", "use a number of 0 or more")
    if settings.steps < 0:
        raise InputError("tuning.steps", f"is {settings.steps}", "use 0 or more")
