"""Indices whose errors make up for each other on what a layer reads. Source: formula fB12."""

from __future__ import annotations

import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.codebook._sorted import midpoints

#: Added to the diagonal of a covariance, as a share of its mean: directions that hardly occur may not be paid for with those that do.
_DAMPING = 0.1
#: Columns whose errors are spread over the later ones at once.
_BLOCK = 64


def compensated(weights: Tensor, table: Tensor, covariance: Tensor) -> Tensor:
    """Index of an entry for every weight, column after column, each error made up for by the columns behind it. Source: formula fB12.

    What is lost of the layer's output is far less than with nearest entries wherever inputs are correlated; of the weights themselves
    more is lost.

    Args:
        weights: (O, ...) finite, D numbers a row.
        table: (K,) float32, strictly ascending. Weights that are exactly 0 keep the entry 0 where there is one.
        covariance: (D, D) mean of x x^T over the rows that the layer reads, symmetric and positive semidefinite.

    Returns:
        int64 in the shape of ``weights``, on the CPU.

    Raises:
        InputError: The covariance is of another size, or not finite.
    """
    rows = weights.detach().to("cpu", torch.float64).flatten(1).clone()
    columns = rows.shape[1]
    if covariance.shape != (columns, columns) or not bool(torch.isfinite(covariance).all()):
        raise InputError(
            "covariance", f"{tuple(covariance.shape)} does not fit {columns} columns", "take that of its layer"
        )
    spread = _spread(covariance.detach().to("cpu", torch.float64))
    edges = torch.from_numpy(midpoints(table.detach().cpu().double().numpy()))
    entries = table.detach().cpu().double()
    zero = torch.nonzero(entries == 0)
    held = (rows == 0) if zero.numel() else None
    found = torch.empty(rows.shape, dtype=torch.int64)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = rows.new_empty(rows.shape[0], stop - start)
        for column in range(start, stop):
            value = rows[:, column].contiguous()
            index = torch.bucketize(value, edges)
            if held is not None:
                index = torch.where(held[:, column], zero[0, 0], index)
            found[:, column] = index
            error = (value - entries[index]) / spread[column, column]
            rows[:, column:stop] -= error[:, None] * spread[column, column:stop]
            errors[:, column - start] = error
        rows[:, stop:] -= errors @ spread[start:stop, stop:]
    return found.reshape(weights.shape)


def _spread(covariance: Tensor) -> Tensor:
    """Upper triangle: row j over its diagonal is how an error in column j is spread over the later ones."""
    mean = float(covariance.diagonal().mean())
    damped = covariance + torch.eye(len(covariance), dtype=torch.float64) * (_DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    made: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return made
