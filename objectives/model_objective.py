"""Exact judge of a whole candidate model: its output against the float model's on identical data (claims A-2, A-4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from alphasmith.objectives.batch import Batch, call, main_output
from alphasmith.objectives.candidate_batch import CONFIDENCE, is_behind
from alphasmith.objectives.candidate_model import CandidateModel
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.losses import divergences, relative_loss, squared_sum
from alphasmith.objectives.smoothing import Smoothing

TaskMetric: TypeAlias = Callable[[nn.Module, Sequence[Batch]], float]
ModelLoss: TypeAlias = Literal["mse", "kl"] | TaskMetric

#: Batches a candidate sees before it may be stopped; also the length of the first round of a race.
FEWEST_BATCHES = 3


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelScore:
    """One candidate of a race.

    Attributes:
        loss: Loss on all batches; None where the candidate was stopped or broke down.
        samples: Samples it was scored on.
        errors: (samples,) float64, see :meth:`ModelObjective.sample_errors`; empty for a task metric.
        stopped: Whether it was given up before the last batch.
        failure: Why it has no loss, where it broke down; else empty.
        losses: Loss on the batches seen so far, after each batch.
    """

    loss: float | None
    samples: int
    errors: Tensor
    stopped: bool
    failure: str
    losses: tuple[float, ...] = ()


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

    Raises:
        InputError: No batches, an unknown loss, or a mask without a real position.
        NonFiniteError: The float model's own output is NaN or infinite.
    """

    def __init__(self, candidate: CandidateModel, batches: Sequence[Batch], *, loss: ModelLoss = "mse") -> None:
        if not batches:
            raise InputError("batches", "is empty", "give at least one batch of data to process")
        if not callable(loss) and loss not in ("mse", "kl"):
            raise InputError("loss", f"{loss!r} is unknown", "use 'mse', 'kl' or a callable (model, batches) -> float")
        self._candidate = candidate
        self._batches = tuple(batches)
        self._loss: ModelLoss = loss
        self._references: tuple[Tensor, ...] = ()
        self._weights: tuple[float, ...] = ()
        self.evaluations = 0
        if not callable(loss):
            model = candidate.reset()
            self._references = tuple(_reference(model, index, batch) for index, batch in enumerate(self._batches))
            self._weights = tuple(_weight(reference, loss) for reference in self._references)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The data every candidate is scored on."""
        return self._batches

    @property
    def reference_bytes(self) -> int:
        """Memory the cached float outputs take [bytes]."""
        return sum(reference.nbytes for reference in self._references)

    @property
    def weight(self) -> float:
        """What the sum of all sample errors is divided by: energy of the float outputs (``mse``) or rows (``kl``)."""
        return math.fsum(self._weights) if self._weights else 1.0

    def reset(self) -> None:
        """Make the model the float model again; the next candidate is then built anew."""
        self._candidate.reset()

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
        """Loss on the batches seen so far, after each batch; the last value is :meth:`loss`.

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
        error = weight = 0.0
        for index in range(len(self._batches)):
            error += float(self._batch_errors(smoothings, index).sum())
            weight += self._weights[index]
            yield relative_loss(error, weight)

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
        return torch.cat([self._batch_errors(smoothings, index) for index in range(len(self._batches))])

    def race(
        self,
        candidates: Sequence[Mapping[str, Smoothing]],
        *,
        incumbent: Tensor | None = None,
        confidence: float = CONFIDENCE,
        protected: int = 0,
    ) -> list[ModelScore]:
        """Score several candidates on the same batches and give up those that are clearly behind.

        Batches are worked through in rounds that double, and all candidates take part in a round before the next one, so
        that each is built anew once per round only. A candidate stops as soon as its loss is above that of another by more
        than ``confidence`` standard errors of the paired differences, on the samples of ``FEWEST_BATCHES`` or more that
        both have seen. A task metric cannot be raced: then every candidate is scored in full.

        Args:
            candidates: As for :meth:`loss`, each.
            incumbent: What :meth:`sample_errors` returned for the candidate to beat, or None.
            confidence: Standard errors; larger stops later.
            protected: The first so many candidates are never stopped.

        Returns:
            One score per candidate, in order.

        Raises:
            InputError: As :meth:`loss`, or ``confidence`` is not positive.
        """
        if not confidence > 0:
            raise InputError("confidence", f"{confidence} is not positive", "use e.g. 3")
        if callable(self._loss):
            return [self._task_score(candidate) for candidate in candidates]
        runs = [_Run() for _ in candidates]
        self.evaluations += len(runs)
        for first, last in _rounds(len(self._batches)):
            for number, run in enumerate(runs):
                rivals = [r for r in runs if r is not run]
                for index in range(first, last):
                    if index >= FEWEST_BATCHES and number >= protected:
                        others = [r.errors for r in rivals if not r.failure]
                        others += [] if incumbent is None else [incumbent]
                        run.stopped = run.stopped or any(run.is_behind(other, confidence) for other in others)
                    if run.stopped or run.failure:
                        break
                    try:
                        run.add(self._batch_errors(candidates[number], index))
                    except NonFiniteError as error:
                        run.failure = str(error)
        return [self._score(run) for run in runs]

    def _batch_errors(self, smoothings: Mapping[str, Smoothing], index: int) -> Tensor:
        # An unchanged candidate costs nothing here; another one may have been scored since the last batch.
        self._candidate.apply(smoothings)
        batch, reference = self._batches[index], self._references[index]
        raw = _forward(self._candidate.model, batch)
        output = real_rows(raw, batch)
        if self._loss == "mse":
            if not bool(torch.isfinite(output).all()):
                raise NonFiniteError(f"the candidate's output on batch {index} is NaN or infinite")
            difference = output.to(torch.float32) - reference.to(torch.float32)
            # Squares of float32 differences summed in float64, without a float64 copy.
            rows = torch.linalg.vector_norm(_by_row(difference), dim=1, dtype=torch.float64).square()
        else:
            # Rounding can leave a divergence of equal distributions a few 1e-17 below zero.
            rows = _by_row(divergences(output, reference)).sum(1).clamp_min(0)
        return _by_sample(rows, raw, batch)

    def _score(self, run: _Run) -> ModelScore:
        complete = not run.stopped and not run.failure
        weights = accumulate(self._weights)
        losses = tuple(relative_loss(error, weight) for error, weight in zip(run.sums(), weights, strict=False))
        return ModelScore(
            loss=losses[-1] if complete else None,
            samples=run.errors.numel(),
            errors=run.errors,
            stopped=run.stopped,
            failure=run.failure,
            losses=losses,
        )

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
    """A candidate in a race."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self.stopped = False
        self.failure = ""

    @property
    def errors(self) -> Tensor:
        """(samples,) float64 of all batches so far."""
        return torch.cat(self._batches) if self._batches else torch.zeros(0, dtype=torch.float64)

    def add(self, errors: Tensor) -> None:
        self._batches.append(errors)

    def sums(self) -> Iterator[float]:
        """Error of all batches so far, after each batch."""
        return accumulate(float(errors.sum()) for errors in self._batches)

    def is_behind(self, other: Tensor, confidence: float) -> bool:
        """Whether the errors lie above another candidate's on the same samples, beyond the paired standard error."""
        fewest = sum(errors.numel() for errors in self._batches[:FEWEST_BATCHES])
        common = min(self.errors.numel(), other.numel())
        if common < max(fewest, 2):
            return False
        return is_behind(self.errors, other, confidence)


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


def _rounds(batches: int) -> Iterator[tuple[int, int]]:
    """First and last batch (exclusive) of every round of a race."""
    first, last = 0, min(FEWEST_BATCHES, batches)
    while first < batches:
        yield first, last
        first, last = last, min(2 * last, batches)


def _task_loss(metric: TaskMetric, model: nn.Module, batches: Sequence[Batch]) -> float:
    with torch.no_grad():
        value = float(metric(model, batches))
    if not math.isfinite(value):
        raise NonFiniteError(f"the task metric is {value}")
    return value


def _weight(reference: Tensor, loss: Literal["mse", "kl"]) -> float:
    return squared_sum(reference) if loss == "mse" else reference.numel() / reference.shape[-1]


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return main_output(call(model, batch))


def _reference(model: nn.Module, index: int, batch: Batch) -> Tensor:
    # The last forward may return a view of a larger buffer; a copy keeps only what is compared.
    reference = real_rows(_forward(model, batch), batch).detach().clone()
    if bool(torch.isnan(reference).any()) or not bool((reference != math.inf).all()):
        raise NonFiniteError(f"the float model's output on batch {index} is NaN or infinite")
    return reference
