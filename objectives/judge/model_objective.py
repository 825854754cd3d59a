"""Exact loss of a whole candidate model: its output against the float model's on identical data (claims A-2, A-4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge._prefix import PrefixCache
from alphasmith.objectives.judge.candidate_batch import CONFIDENCE, is_behind
from alphasmith.objectives.judge.losses import divergences, relative_loss
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.smoothing import Smoothing

TaskMetric: TypeAlias = Callable[[nn.Module, Sequence[Batch]], float]
ModelLoss: TypeAlias = Literal["mse", "kl"] | TaskMetric

#: Samples between two looks at whether a candidate may be stopped: counted in samples, so that batches have no part in it.
STEP = 8
#: Steps of the first round of a race: nothing is stopped before.
FEWEST_STEPS = 3
#: One part in this many of what may be remembered is for quantized weights, the rest for outputs of modules.
_WEIGHTS_PART = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelScore:
    """One candidate of a race.

    Attributes:
        loss: Loss on all batches; None where the candidate was stopped or broke down.
        samples: Samples it was scored on.
        errors: (samples,) float64, see :meth:`ModelObjective.sample_errors`; empty for a task metric.
        stopped: Whether it was given up before the last batch.
        failure: Why it has no loss, where it broke down; else empty.
        losses: Loss on the samples seen so far, after each step of :data:`STEP` samples.
    """

    loss: float | None
    samples: int
    errors: Tensor
    stopped: bool
    failure: str
    losses: tuple[float, ...] = ()

    @classmethod
    def failed(cls, reason: str) -> ModelScore:
        """The score of a candidate that broke down before anything was known of it."""
        return cls(loss=None, samples=0, errors=torch.zeros(0, dtype=torch.float64), stopped=False, failure=reason)


class ModelObjective:
    """Loss of a candidate set of smoothings at the model's output. Source: claims A-2 and A-4, formula fA5.

    ``mse`` is the relative squared error ``sum (Yhat - Y)^2 / sum Y^2`` over all batches; ``kl`` the mean divergence of
    the output distributions per row [nats]; a callable is a task metric of the candidate model, lower is better. Padded
    positions count for neither. The float outputs are computed once and kept: memory is that of the outputs of
    ``batches`` (:attr:`reference_bytes`).

    Args:
        candidate: The model that becomes each candidate; it is reset to the float model to compute the references.
        batches: The data to be processed, the same for every candidate.
        loss: ``mse``, ``kl`` or a task metric ``(model, batches) -> float``.
        remembered: Most bytes that :meth:`remember` keeps; 0 keeps nothing.

    Raises:
        InputError: No batches, an unknown loss, or a mask without a real position.
        NonFiniteError: The float model's own output is NaN or infinite.
    """

    def __init__(
        self, candidate: CandidateModel, batches: Sequence[Batch], *, loss: ModelLoss = "mse", remembered: int = 0
    ) -> None:
        if not batches:
            raise InputError("batches", "is empty", "give at least one batch of data to process")
        if not callable(loss) and loss not in ("mse", "kl"):
            raise InputError("loss", f"{loss!r} is unknown", "use 'mse', 'kl' or a callable (model, batches) -> float")
        self._candidate = candidate
        self._batches = tuple(batches)
        self._loss: ModelLoss = loss
        self._references: tuple[Tensor, ...] = ()
        self._weights = torch.ones(0, dtype=torch.float64)
        self._remembered = remembered
        self._prefix = PrefixCache([batch.size for batch in self._batches], remembered - remembered // _WEIGHTS_PART)
        self.evaluations = 0
        if not callable(loss):
            model = candidate.reset()
            made = [_reference(model, index, batch, loss) for index, batch in enumerate(self._batches)]
            self._references = tuple(reference for reference, _ in made)
            self._weights = torch.cat([weights for _, weights in made])

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The data every candidate is scored on."""
        return self._batches

    @property
    def kind(self) -> Literal["mse", "kl"]:
        """Which loss it is.

        Raises:
            InputError: It is a task metric.
        """
        if callable(self._loss):
            raise InputError("loss", "is a task metric", "use 'mse' or 'kl'")
        return self._loss

    @property
    def remembered_bytes(self) -> int:
        """What :meth:`remember` keeps at present [bytes]."""
        return self._prefix.nbytes + self._candidate.favoured_bytes

    @property
    def weight(self) -> float:
        """What the sum of all sample errors is divided by: energy of the float outputs (``mse``) or rows (``kl``)."""
        return math.fsum(self._weights.tolist()) if self._weights.numel() else 1.0

    @property
    def candidate(self) -> CandidateModel:
        """The model that becomes each candidate, and stays the last one scored."""
        return self._candidate

    def loss(self, smoothings: Mapping[str, Smoothing]) -> float:
        """Loss of one candidate on all batches.

        Args:
            smoothings: Site name -> smoothing; missing sites keep s = 1 and no shift.

        Raises:
            InputError: A smoothing does not fit its site.
            NonFiniteError: A scale, a weight, an output or the loss is NaN or infinite.
        """
        return list(self.losses(smoothings))[-1]

    def losses(self, smoothings: Mapping[str, Smoothing]) -> Iterator[float]:
        """Loss on the samples seen so far, after each step of :data:`STEP` samples; the last value is :meth:`loss`.

        Stop iterating to prune; nothing needs to be cleaned up. A task metric is not a sum over batches and yields once.

        Args:
            smoothings: As for :meth:`loss`.

        Raises:
            InputError: As :meth:`loss`.
            NonFiniteError: As :meth:`loss`.
        """
        self.evaluations += 1
        if callable(self._loss):
            self._candidate.apply(smoothings)
            yield _task_loss(self._loss, self._candidate.model, self._batches)
            return
        run = _Run(self, smoothings)
        for end in _steps(self._weights.numel()):
            run.advance(end)
            yield run.losses[-1]

    def sample_errors(self, smoothings: Mapping[str, Smoothing]) -> Tensor:
        """Contribution of every sample to the loss of one candidate, for paired comparisons of candidates.

        Args:
            smoothings: As for :meth:`loss`.

        Returns:
            (N,) float64 squared errors (``mse``) or divergences [nats] (``kl``), whose sum divided by :attr:`weight` is
            the loss. N counts the samples of all batches; a batch whose output has another first dimension (experts,
            flattened positions) counts as one sample.

        Raises:
            InputError: As :meth:`loss`, or the loss is a task metric, which is no sum over samples.
            NonFiniteError: As :meth:`loss`.
        """
        if callable(self._loss):
            raise InputError("loss", "a task metric is no sum over samples", "use 'mse' or 'kl'")
        self.evaluations += 1
        return torch.cat([self.batch_errors(smoothings, index) for index in range(len(self._batches))])

    def remember(self, smoothings: Mapping[str, Smoothing]) -> ModelScore:
        """Score a candidate on all batches, and keep what its modules make of them for those that are scored after it.

        A candidate that differs from it at some sites then costs what comes after the first of them in the order of
        execution, and the weights of these sites; every score is the same to the bit as without. One candidate is remembered
        at a time: give the incumbent of a coordinate search. Memory is at most ``remembered``.

        Args:
            smoothings: As for :meth:`loss`.

        Returns:
            Its score, as :meth:`race` gives it for a protected candidate.

        Raises:
            InputError: As :meth:`sample_errors`.
        """
        if callable(self._loss):
            raise InputError("loss", "a task metric is no sum over samples", "use 'mse' or 'kl'")
        self.evaluations += 1
        self._candidate.favour(smoothings, self._remembered // _WEIGHTS_PART)
        run = _Run(self, smoothings, remembered=True)
        try:
            for end in _steps(self._weights.numel()):
                run.advance(end)
        except NonFiniteError as error:
            run.failure = str(error)
            self._prefix.forget()
        return run.score()

    def forget(self) -> None:
        """Keep nothing of what :meth:`remember` was given any more."""
        self._prefix.forget()
        self._candidate.favour({}, 0)

    def race(
        self,
        candidates: Sequence[Mapping[str, Smoothing]],
        *,
        incumbent: Tensor | None = None,
        protected: int = 0,
        fewest: int = FEWEST_STEPS,
        confidence: float = CONFIDENCE,
    ) -> list[ModelScore]:
        """Score several candidates on the same samples and give up those that are clearly behind.

        Samples are worked through in rounds that double, and all candidates take part in a round before the next one, so
        that each is built anew once per round only. A candidate stops as soon as its loss is above that of another by more
        than ``confidence`` standard errors of the paired differences, on the samples of ``fewest`` steps or more that both have
        seen. Who is stopped, and when, does not depend on the batches. A task metric cannot be raced: then every
        candidate is scored in full.

        Args:
            candidates: As for :meth:`loss`, each.
            incumbent: What :meth:`sample_errors` returned for the candidate to beat, or None.
            protected: The first so many candidates are never stopped.
            fewest: Steps of the first round, in which nothing is stopped.
            confidence: Paired standard errors.

        Returns:
            One score per candidate, in order.

        Raises:
            InputError: As :meth:`loss`.
        """
        if callable(self._loss):
            return [self._task_score(candidate) for candidate in candidates]
        runs = [_Run(self, candidate) for candidate in candidates]
        self.evaluations += len(runs)
        ends = _steps(self._weights.numel())
        for first, last in _rounds(len(ends), fewest):
            for number, run in enumerate(runs):
                rivals = [r for r in runs if r is not run]
                for index in range(first, last):
                    if index >= fewest and number >= protected:
                        others = [r.errors for r in rivals if not r.failure]
                        others += [] if incumbent is None else [incumbent]
                        run.stopped = run.stopped or any(
                            run.is_behind(other, fewest * STEP, confidence) for other in others
                        )
                    if run.stopped or run.failure:
                        break
                    try:
                        run.advance(ends[index])
                    except NonFiniteError as error:
                        run.failure = str(error)
        return [run.score() for run in runs]

    def weight_of(self, count: int) -> float:
        """:attr:`weight` of the first ``count`` samples."""
        return math.fsum(self._weights[:count].tolist())

    def batch_errors(self, smoothings: Mapping[str, Smoothing], index: int, *, remembered: bool = False) -> Tensor:
        """:meth:`sample_errors` of one batch alone; ``remembered``: see :meth:`remember`."""
        # An unchanged candidate costs nothing here; another one may have been scored since the last batch.
        self._candidate.apply(smoothings)
        batch = self._batches[index]
        run = self._prefix.learn if remembered else self._prefix.run
        raw = run(index, self._candidate, lambda: _forward(self._candidate.model, batch))
        return self.errors_of(raw, index)

    def errors_of(self, raw: Tensor, index: int) -> Tensor:
        """:meth:`sample_errors` of one batch, of what a candidate made of it elsewhere.

        Args:
            raw: Its main output on that batch, padded positions included.
            index: Number of the batch.

        Raises:
            NonFiniteError: It is NaN or infinite.
        """
        batch, reference = self._batches[index], self._references[index]
        output = real_rows(raw, batch)
        if self._loss == "mse":
            if not bool(torch.isfinite(output).all()):
                raise NonFiniteError(f"the candidate's output on batch {index} is NaN or infinite")
            rows = _squares(output.to(torch.float32) - reference.to(torch.float32))
        else:
            # Rounding can leave a divergence of equal distributions a few 1e-17 below zero.
            rows = _by_row(divergences(output, reference)).sum(1).clamp_min(0)
        return _by_sample(rows, raw, batch)

    def _task_score(self, smoothings: Mapping[str, Smoothing]) -> ModelScore:
        loss, failure = None, ""
        try:
            loss = self.loss(smoothings)
        except NonFiniteError as error:
            failure = str(error)
        nothing = torch.zeros(0, dtype=torch.float64)
        losses = () if loss is None else (loss,)
        return ModelScore(loss=loss, samples=0, errors=nothing, stopped=False, failure=failure, losses=losses)


class _Run:
    """A candidate that is scored on more and more samples."""

    def __init__(
        self, objective: ModelObjective, smoothings: Mapping[str, Smoothing], *, remembered: bool = False
    ) -> None:
        self._objective = objective
        self._remembered = remembered
        self._smoothings = smoothings
        self._batches: list[Tensor] = []
        self._losses: list[float] = []
        self._samples = 0
        self.stopped = False
        self.failure = ""

    @property
    def errors(self) -> Tensor:
        """Errors of the samples it has been advanced to; its last batch may have given more."""
        known = torch.cat(self._batches) if self._batches else torch.zeros(0, dtype=torch.float64)
        return known[: self._samples]

    @property
    def losses(self) -> tuple[float, ...]:
        """Loss after each step."""
        return tuple(self._losses)

    def advance(self, samples: int) -> float:
        """Score it on the first so many samples; the loss on them."""
        while sum(errors.numel() for errors in self._batches) < samples:
            index = len(self._batches)
            self._batches.append(self._objective.batch_errors(self._smoothings, index, remembered=self._remembered))
        self._samples = samples
        self._losses.append(relative_loss(math.fsum(self.errors.tolist()), self._objective.weight_of(samples)))
        return self._losses[-1]

    def is_behind(self, other: Tensor, fewest: int, confidence: float) -> bool:
        """Whether the errors lie above another candidate's on ``fewest`` common samples or more, beyond the paired standard error."""
        common = min(self.errors.numel(), other.numel())
        return common >= fewest and is_behind(self.errors, other, confidence)

    def score(self) -> ModelScore:
        """How it ended."""
        complete = not self.stopped and not self.failure
        return ModelScore(
            loss=self._losses[-1] if complete else None,
            samples=self.errors.numel(),
            errors=self.errors,
            stopped=self.stopped,
            failure=self.failure,
            losses=self.losses,
        )


def real_rows(output: Tensor, batch: Batch) -> Tensor:
    """The output without padded positions: (N, ...) when it is (B, L, ...) and the mask (B, L), else ``output`` itself.

    A (B, L) output is taken whole: it may as well be B rows of L classes.

    Args:
        output: The model's main output.
        batch: The batch it was computed from.

    Raises:
        InputError: The mask leaves nothing.
    """
    mask = _position_mask(output, batch)
    if mask is None:
        return output
    rows = output[mask]
    if rows.shape[0] == 0:
        raise InputError("batch.mask", "marks every position as padding", "give batches with real positions")
    return rows


def _position_mask(output: Tensor, batch: Batch) -> Tensor | None:
    """The mask (B, L) on the output's device where the output has positions, else None."""
    mask = batch.mask
    if mask is None or output.dim() < 3 or output.shape[:2] != mask.shape:
        return None
    return mask.to(device=output.device, dtype=torch.bool)


def _by_row(values: Tensor) -> Tensor:
    """(R, ...) -> (R, numbers of one row)."""
    return values.reshape(values.shape[0], -1) if values.dim() else values.reshape(1, 1)


def _by_sample(rows: Tensor, output: Tensor, batch: Batch) -> Tensor:
    """Errors of rows (R,), summed over each sample, on the CPU: (B,), or (1,) where rows cannot be told apart."""
    mask = _position_mask(output, batch)
    if mask is not None:
        owner = mask.nonzero()[:, 0]
        return torch.zeros(mask.shape[0], dtype=rows.dtype, device=rows.device).index_add_(0, owner, rows).cpu()
    return rows.cpu() if rows.shape[0] == batch.size else rows.sum().reshape(1).cpu()


def _steps(samples: int) -> tuple[int, ...]:
    """Numbers of samples after which a candidate is looked at."""
    return (*range(STEP, samples, STEP), samples)


def _rounds(steps: int, fewest: int) -> Iterator[tuple[int, int]]:
    """First and last step (exclusive) of every round of a race whose first one has ``fewest`` steps."""
    first, last = 0, min(fewest, steps)
    while first < steps:
        yield first, last
        first, last = last, min(2 * last, steps)


def _task_loss(metric: TaskMetric, model: nn.Module, batches: Sequence[Batch]) -> float:
    with torch.no_grad():
        value = float(metric(model, batches))
    if not math.isfinite(value):
        raise NonFiniteError(f"the task metric is {value}")
    return value


def _squares(values: Tensor) -> Tensor:
    """(R, ...) -> (R,) sums of squares, accumulated in float64 without a float64 copy."""
    norms: Tensor = torch.linalg.vector_norm(_by_row(values), dim=1, dtype=torch.float64)
    return norms.square()


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return main_output(call(model, batch))


def _reference(model: nn.Module, index: int, batch: Batch, loss: Literal["mse", "kl"]) -> tuple[Tensor, Tensor]:
    """The float output on real positions, and what each sample adds to :attr:`ModelObjective.weight`."""
    raw = _forward(model, batch)
    # The last forward may return a view of a larger buffer; a copy keeps only what is compared.
    reference = real_rows(raw, batch).detach().clone()
    if bool(torch.isnan(reference).any()) or not bool((reference != math.inf).all()):
        raise NonFiniteError(f"the float model's output on batch {index} is NaN or infinite")
    if loss == "mse":
        return reference, _by_sample(_squares(reference), raw, batch)
    distributions = _by_row(reference).shape[1] / reference.shape[-1] if reference.dim() else 1.0
    rows = torch.full(_by_row(reference).shape[:1], distributions, dtype=torch.float64, device=reference.device)
    return reference, _by_sample(rows, raw, batch)
