"""Exact judge of a whole candidate model: its output against the float model's on identical data (claims A-2, A-4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from alphasmith.objectives.batch import Batch, call, main_output
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.losses import kl_divergence, relative_loss, squared_sum
from alphasmith.objectives.quantized import CandidateModel

TaskMetric: TypeAlias = Callable[[nn.Module, Sequence[Batch]], float]
ModelLoss: TypeAlias = Literal["mse", "kl"] | TaskMetric


class ModelObjective:
    """Loss of a candidate set of scales at the model's output. Source: claims A-2 and A-4, formula fA5.

    ``mse`` is the relative squared error ``sum (Yhat - Y)^2 / sum Y^2`` over all batches; ``kl`` the mean divergence of
    the output distributions per row [nats]; a callable is a task metric of the candidate model, lower is better. Padded
    positions count for neither. The float outputs are computed once and kept: memory is that of the outputs of
    ``batches`` (:attr:`reference_bytes`).

    Args:
        candidate: The working copy to score; it is reset to the float model to compute the references.
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
        self.evaluations = 0
        if not callable(loss):
            model = candidate.reset()
            self._references = tuple(_reference(model, index, batch) for index, batch in enumerate(self._batches))

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The data every candidate is scored on."""
        return self._batches

    @property
    def reference_bytes(self) -> int:
        """Memory the cached float outputs take [bytes]."""
        return sum(reference.nbytes for reference in self._references)

    def loss(self, scales: Mapping[str, Tensor]) -> float:
        """Loss of one candidate on all batches.

        Args:
            scales: Site name -> (C,) positive scales; missing sites keep s = 1.

        Raises:
            InputError: The scales do not fit the sites.
            NonFiniteError: A scale, a weight, an output or the loss is NaN or infinite.
        """
        return list(self.losses(scales))[-1]

    def losses(self, scales: Mapping[str, Tensor]) -> Iterator[float]:
        """Loss on the batches seen so far, after each batch; the last value is :meth:`loss`.

        Stop iterating to prune; nothing needs to be cleaned up. A task metric is not a sum over batches and yields once.

        Args:
            scales: As for :meth:`loss`.

        Raises:
            InputError: As :meth:`loss`.
            NonFiniteError: As :meth:`loss`.
        """
        self._candidate.apply(scales)
        self.evaluations += 1
        if callable(self._loss):
            with torch.no_grad():
                value = float(self._loss(self._candidate.model, self._batches))
            if not math.isfinite(value):
                raise NonFiniteError(f"the task metric is {value}")
            yield value
            return
        error = weight = 0.0
        for index, (batch, reference) in enumerate(zip(self._batches, self._references, strict=True)):
            # Unchanged scales cost nothing here; another candidate may have been scored since the last batch.
            self._candidate.apply(scales)
            output = real_rows(_forward(self._candidate.model, batch), batch)
            if not bool(torch.isfinite(output).all()) and self._loss == "mse":
                raise NonFiniteError(f"the candidate's output on batch {index} is NaN or infinite")
            if self._loss == "mse":
                error += squared_sum(output.to(torch.float32) - reference.to(torch.float32))
                weight += squared_sum(reference)
                yield relative_loss(error, weight)
            else:
                rows = reference.numel() // reference.shape[-1]
                error += kl_divergence(output, reference) * rows
                weight += rows
                yield error / weight


def real_rows(output: Tensor, batch: Batch) -> Tensor:
    """The output without padded positions: (N, ...) when it is (B, L, ...) and the mask (B, L), else ``output`` itself.

    A (B, L) output is taken whole: it may as well be B rows of L classes.

    Args:
        output: The model's main output.
        batch: The batch it was computed from.

    Raises:
        InputError: The mask leaves nothing.
    """
    mask = batch.mask
    if mask is None or output.dim() < 3 or output.shape[:2] != mask.shape:
        return output
    rows = output[mask.to(device=output.device, dtype=torch.bool)]
    if rows.shape[0] == 0:
        raise InputError("batch.mask", "marks every position as padding", "give batches with real positions")
    return rows


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return main_output(call(model, batch))


def _reference(model: nn.Module, index: int, batch: Batch) -> Tensor:
    # The last forward may return a view of a larger buffer; a copy keeps only what is compared.
    reference = real_rows(_forward(model, batch), batch).detach().clone()
    if bool(torch.isnan(reference).any()) or not bool((reference != math.inf).all()):
        raise NonFiniteError(f"the float model's output on batch {index} is NaN or infinite")
    return reference
