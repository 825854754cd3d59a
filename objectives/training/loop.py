"""Training of a compressed model through its quantizers: updates, looks at held-out samples, checkpoints, the verdict."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.media.batch import Batch, call, data_errors, main_output, unfused_attention
from alphasmith.objectives.text import number
from alphasmith.objectives.training._teacher import TeacherOutputs
from alphasmith.objectives.training._verdict import paired
from alphasmith.objectives.training.fake_quantized import FakeQuantized
from alphasmith.objectives.training.losses import Objective, SampleLosses, answers, default_metric, task_of
from alphasmith.objectives.training.outcome import Ending, TrainingOutcome, TrainingPoint
from alphasmith.objectives.training.ports import Checkpoint, Checkpoints, Forgetful, SampleMetric, Samples
from alphasmith.objectives.training.sampler import EndlessOrder, place_seed
from alphasmith.objectives.training.schedule import scheduled
from alphasmith.objectives.training.settings import TrainingSettings

#: A held-out loss above this many times those of the untrained model and of a guess together means that training diverged.
_DIVERGED = 3.0
#: Parts of a checkpoint's tensors: the model now, at its best, the optimizer's memory, held-out values of single samples.
_NOW, _BEST, _OPTIMIZER, _VALUES = "now.", "best.", "optimizer.", "values."


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingData:
    """What a training reads.

    Attributes:
        samples: What it is trained on.
        held_out: What decides when to stop and what is kept; at least two samples, none of them trained on.
        metric: Of single samples; None: accuracy for classes, else none.
        teacher: The float model, in evaluation mode, where ``settings.distill`` is above 0.
        probabilities: The model ends in probabilities, not in scores before a softmax.
        cache: Folder for the float model's outputs where they are large; None: that of the system for such files.
    """

    samples: Samples
    held_out: Samples
    metric: SampleMetric | None = None
    teacher: nn.Module | None = None
    probabilities: bool = False
    cache: Path | None = None


def train(
    model: FakeQuantized,
    data: TrainingData,
    settings: TrainingSettings,
    *,
    checkpoints: Checkpoints | None = None,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[TrainingPoint], None] = lambda point: None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainingOutcome:
    """Train a compressed model through its quantizers. Source: claim A-13.

    Samples, order, dropout and arithmetic depend on the settings only: a training that was killed and goes on from its last
    checkpoint ends with the bits of one that was not, on one worker and the same number of threads.

    Args:
        model: What to train; afterwards it holds the trained weights where they are kept, else those it came with.
        data: What is read.
        settings: Everything else.
        checkpoints: Where they are kept; one there goes on. None: in memory.
        clock: Seconds, of any origin.
        progress: Receives every point of the curve, those of earlier attempts first.
        stop: Polled between updates; True saves a checkpoint and ends the training as interrupted.

    Raises:
        InputError: No or too few samples, labels that do not fit the model, a loss that does not fit the task, no float model
            to distil from, or a checkpoint of another training.
        NonFiniteError: The untrained model's loss is NaN or infinite.
    """
    if len(data.samples) < 1:
        raise InputError("data", "there is no sample to train on", "raise the fraction, or give more data")
    if len(data.held_out) < 2:
        raise InputError("data", f"{len(data.held_out)} samples are held out", "give at least two")
    if settings.distill > 0 and data.teacher is None:
        raise InputError("training.distill", "there is no float model", "give teacher, or distill = 0")
    return _Training(model, data, settings, checkpoints or Forgetful(), clock).run(progress, stop)


class _DivergedError(Exception):
    """What went wrong, and at which update."""


@dataclass(eq=False)
class _Place:
    """Where a training is, as every checkpoint has it.

    Attributes:
        step: Updates done.
        points: The curve.
        losses: Training losses since the last point.
        best_step: Where the held-out samples were answered best.
        seconds: Time of all attempts [s].
    """

    step: int = 0
    points: list[TrainingPoint] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best_step: int = 0
    seconds: float = 0.0


class _Training:
    def __init__(
        self,
        model: FakeQuantized,
        data: TrainingData,
        settings: TrainingSettings,
        checkpoints: Checkpoints,
        clock: Callable[[], float],
    ) -> None:
        self._model, self._data, self._settings = model, data, settings
        self._checkpoints, self._clock = checkpoints, clock
        self._device = next(model.parameters()).device
        self._size = min(settings.batch_size, len(data.samples))
        self._updates = settings.updates(len(data.samples))
        first = data.samples.batch([0]).to(self._device)
        with torch.no_grad(), unfused_attention(), data_errors():
            output = main_output(call(model.eval(), first))
        task = task_of(output, first)
        self._objective = Objective(settings=settings, task=task, probabilities=data.probabilities)
        self._worst = self._objective.guess(output.shape[-1])
        self._metric = default_metric(task) if data.metric is None else data.metric
        if settings.watched == "metric" and self._metric is None:
            raise InputError("training.watched", "there is no metric of single samples", "watch the loss, or give one")
        self._teachers: dict[str, TeacherOutputs] = {}
        if settings.distill > 0 and data.teacher is not None:
            for name, part in (("train", data.samples), ("held out", data.held_out)):
                self._teachers[name] = TeacherOutputs(
                    data.teacher, part, task=task, size=settings.batch_size, device=self._device, folder=data.cache
                )
        weights, vectors, steps = model.groups()
        rate = settings.learning_rate
        self._optimizer = torch.optim.AdamW(
            [
                {"params": weights, "lr": rate, "weight_decay": settings.weight_decay},
                {"params": vectors, "lr": rate, "weight_decay": 0.0},
                {"params": steps, "lr": rate * settings.step_rate, "weight_decay": 0.0},
            ]
        )
        self._scheduler = scheduled(
            self._optimizer, schedule=settings.schedule, warm_up=settings.warm_up, updates=self._updates
        )
        self._order = EndlessOrder(len(data.samples), settings.seed)
        self._place = _Place()
        self._untrained = _copied(model.state())
        self._best: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}

    def run(self, progress: Callable[[TrainingPoint], None], stop: Callable[[], bool]) -> TrainingOutcome:
        started = self._clock()
        last = self._checkpoints.load()
        if last is None:
            self._look()
            self._checkpoints.save(self._checkpoint())
        else:
            self._take(last)
        before = self._place.seconds
        for point in self._place.points:
            progress(point)
        settings, place = self._settings, self._place
        ending: Ending = "finished"
        trouble = ""
        try:
            while place.step < self._updates:
                if settings.patience and self._looks_since_best() >= settings.patience:
                    ending = "patience"
                    break
                if stop():
                    ending = "interrupted"
                    break
                self._update()
                if place.step % settings.evaluate_every == 0 or place.step == self._updates:
                    progress(self._look())
                place.seconds = before + self._clock() - started
                if place.step % settings.checkpoint_every == 0 or place.step == self._updates:
                    self._checkpoints.save(self._checkpoint())
        except _DivergedError as error:
            ending = "diverged"
            good = self._checkpoints.load()
            if good is not None:
                self._take(good)
            trouble = f"{error}; training stopped at the checkpoint of step {self._place.step}"
        self._place.seconds = before + self._clock() - started
        if ending in ("patience", "interrupted"):
            self._checkpoints.save(self._checkpoint())
        return self._outcome(ending, trouble)

    def _update(self) -> None:
        settings, place = self._settings, self._place
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(settings.accumulation):
            drawn = self._order.drawn
            numbers = self._order.draw(self._size)
            with self._seeded(drawn):
                loss = self._losses("train", self._data.samples, numbers)[0].mean
            (loss / settings.accumulation).backward()
            total += float(loss.detach()) / settings.accumulation
        step = place.step + 1
        if not math.isfinite(total):
            raise _DivergedError(f"the loss was {total} at step {step}")
        norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), settings.clip or math.inf))
        if not math.isfinite(norm):
            raise _DivergedError(f"the gradient was {norm} at step {step}")
        self._optimizer.step()
        self._scheduler.step()
        place.step = step
        place.losses.append(total)

    def _look(self) -> TrainingPoint:
        """Score the held-out samples, and remember the model where it is the best so far."""
        losses, metric = self._scored()
        place = self._place
        loss = float(losses.mean)
        if not place.points and not math.isfinite(loss):
            raise NonFiniteError(f"the untrained model's loss on held-out samples is {loss}")
        if place.points:
            limit = _DIVERGED * (self._worst + place.points[0].held_out_loss)
            if not math.isfinite(loss) or loss > limit:
                raise _DivergedError(f"the held-out loss was {number(loss)} at step {place.step}")
        point = TrainingPoint(
            step=place.step,
            train_loss=sum(place.losses) / len(place.losses) if place.losses else None,
            held_out_loss=loss,
            metric=None if metric is None else float(metric.mean()),
            learning_rate=float(self._scheduler.get_last_lr()[0]),
        )
        place.points.append(point)
        place.losses.clear()
        totals, weights = losses.totals.double().cpu(), losses.weights.double().cpu()
        if self._settings.watched == "metric" and metric is not None and self._metric is not None:
            totals = (-metric if self._metric.goal == "max" else metric).double().cpu()
            weights = torch.ones_like(totals)
        if place.step == 0:
            self._values = {"untrained": totals, "best": totals, "weights": weights}
        elif float(totals.sum()) < float(self._values["best"].sum()):
            place.best_step, self._best = place.step, _copied(self._model.state())
            self._values = {**self._values, "best": totals}
        return point

    def _scored(self) -> tuple[SampleLosses, Tensor | None]:
        """Losses and metric of every held-out sample."""
        self._model.eval()
        held_out, size = self._data.held_out, self._settings.batch_size
        losses, metrics = [], []
        for start in range(0, len(held_out), size):
            numbers = range(start, min(start + size, len(held_out)))
            with torch.no_grad(), unfused_attention():
                found, batch, output = self._losses("held out", held_out, numbers)
            losses.append(found)
            if self._metric is not None:
                metrics.append(self._metric.values(output, batch))
        return SampleLosses.joined(losses), torch.cat(metrics) if metrics else None

    def _losses(self, part: str, samples: Samples, numbers: Sequence[int]) -> tuple[SampleLosses, Batch, Tensor]:
        """Losses of some samples, the batch that they make and the model's output for it."""
        batch = samples.batch(numbers).to(self._device)
        with self._precision(), data_errors():
            output = main_output(call(self._model, batch))
        found = answers(output, batch, self._objective.task)
        rows = self._teachers[part].rows(numbers, self._device) if self._teachers else None
        return self._objective.losses(found, rows), batch, output

    def _precision(self) -> AbstractContextManager[Any]:
        """Products in bfloat16 where the device has it; quantizers, norms and losses stay in float32."""
        cuda = self._device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.autocast("cuda", torch.bfloat16) if cuda and self._settings.mixed_precision else nullcontext()

    @contextmanager
    def _seeded(self, drawn: int) -> Iterator[None]:
        """Dropout that depends on the seed and the samples drawn before; the generator of the process stays as it was."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(place_seed(self._settings.seed, drawn, "dropout"))
            yield

    def _looks_since_best(self) -> int:
        return sum(point.step > self._place.best_step for point in self._place.points)

    def _fingerprint(self) -> dict[str, Any]:
        counts = {"samples": len(self._data.samples), "held_out": len(self._data.held_out)}
        told: dict[str, Any] = json.loads(json.dumps({"settings": asdict(self._settings), **counts}))
        return told

    def _checkpoint(self) -> Checkpoint:
        memory = self._optimizer.state_dict()
        tensors = {f"{_NOW}{name}": tensor for name, tensor in _copied(self._model.state()).items()}
        tensors |= {f"{_BEST}{name}": tensor for name, tensor in _copied(self._best).items()}
        tensors |= {f"{_VALUES}{name}": tensor for name, tensor in _copied(self._values).items()}
        for index, entry in memory["state"].items():
            tensors |= {f"{_OPTIMIZER}{index}.{n}": t for n, t in _copied(entry).items()}
        schedule = {n: v for n, v in self._scheduler.state_dict().items() if n != "lr_lambdas"}
        place = self._place
        state = {
            "training": self._fingerprint(),
            "step": place.step,
            "points": [asdict(point) for point in place.points],
            "losses": list(place.losses),
            "best_step": place.best_step,
            "seconds": place.seconds,
            "drawn": self._order.drawn,
            "groups": memory["param_groups"],
            "schedule": schedule,
        }
        return Checkpoint(tensors=tensors, state=json.loads(json.dumps(state)))

    def _take(self, checkpoint: Checkpoint) -> None:
        """Go back, or on, to a checkpoint."""
        state, tensors = checkpoint.state, checkpoint.tensors
        if state.get("training") != self._fingerprint():
            raise InputError(
                "checkpoint", "belongs to a training with other settings or data", "delete it to start anew"
            )
        self._model.take(_named(tensors, _NOW))
        self._best = _copied(_named(tensors, _BEST))
        self._values = _named(tensors, _VALUES)
        memory: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _named(tensors, _OPTIMIZER).items():
            index, _, leaf = name.partition(".")
            memory.setdefault(int(index), {})[leaf] = tensor.clone()
        self._optimizer.load_state_dict({"state": memory, "param_groups": state["groups"]})
        lambdas = self._scheduler.state_dict()["lr_lambdas"]
        self._scheduler.load_state_dict({**state["schedule"], "lr_lambdas": lambdas})
        self._order.drawn = state["drawn"]
        place = self._place
        place.step, place.best_step, place.seconds = state["step"], state["best_step"], state["seconds"]
        place.points = [TrainingPoint(**point) for point in state["points"]]
        place.losses = list(state["losses"])

    def _outcome(self, ending: Ending, trouble: str) -> TrainingOutcome:
        place, settings = self._place, self._settings
        verdict = paired(self._values["untrained"], self._values["best"], self._values["weights"])
        kept = verdict.better and place.best_step > 0 and ending != "interrupted"
        self._model.take(self._best if kept else self._untrained)
        self._model.eval()
        name = "loss" if settings.watched == "loss" or self._metric is None else self._metric.name
        told = f"{number(verdict.gain)} (standard error {number(verdict.standard_error)})"
        if ending == "interrupted":
            reason = f"training was interrupted at step {place.step}"
        elif place.best_step == 0:
            reason = f"the untrained model stays: no held-out {name} was better than its own"
        elif kept:
            reason = f"the held-out {name} at step {place.best_step} is better by {told}"
        else:
            reason = f"the untrained model stays: the held-out {name} is better by {told}, not beyond its noise"
        if ending == "patience":
            reason += f"; training stopped after {settings.patience} looks without a better one"
        return TrainingOutcome(
            points=tuple(place.points),
            kept=kept,
            reason=f"{reason}; {trouble}" if trouble else reason,
            ending=ending,
            steps=place.step,
            best_step=place.best_step,
            gain=verdict.gain,
            standard_error=verdict.standard_error,
            metric_name=None if self._metric is None else self._metric.name,
            train_samples=len(self._data.samples),
            held_out_samples=len(self._data.held_out),
            seconds=place.seconds,
        )


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
