"""A weight as branch and residual, refitted while the error of its output falls. Source: formula fB11."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.branch._smoothed import SmoothedWeight
from alphasmith.objectives.joint.branch.layers import branch_product
from alphasmith.objectives.joint.branch.rows import LayerRows
from alphasmith.objectives.joint.branch.settings import BranchSettings
from alphasmith.objectives.joint.branch.stored import (
    BranchEntry,
    BranchParts,
    assembled,
    restore_branch,
    restore_factors,
    seal,
    store_factors,
    store_residual,
)
from alphasmith.objectives.joint.low_rank.decomposition import Factors, decompose, saving_rank
from alphasmith.objectives.judge.losses import relative_loss, squared_sum


@dataclass(frozen=True, eq=False, kw_only=True)
class BranchWeight:
    """One weight as branch and residual.

    Attributes:
        entry: What is stored as JSON.
        tensors: What is stored as tensors.
        error: Squared error of the output over its squares, on the rows it was made with (relative form of fA5).
        float_bytes: Bytes of the weight itself.
        rounds: Relative error after every round, the first before any refit; the smallest is ``error``.
        notes: What people should know, a line each.
    """

    entry: BranchEntry
    tensors: Mapping[str, Tensor]
    error: float
    float_bytes: int
    rounds: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parts(self) -> BranchParts:
        """Branch and residual as they are multiplied."""
        return restore_branch("weight", self.entry, self.tensors)


def branch_layer(
    weight: Tensor, rows: Tensor | LayerRows, settings: BranchSettings, *, name: str = "weight"
) -> BranchWeight:
    """Smooth a weight, keep its largest singular values as a branch, quantize what is left. Source: formula fB11.

    With ``refits`` the branch is fitted again to what the residual leaves, and the residual to what that branch leaves, as
    long as the error of the output falls; the best round is the result.

    Args:
        weight: (O, C, kernel), floating and finite; without a kernel for a linear layer.
        rows: (T, D) that it is multiplied with: they set scales and ranges, and judge the rounds.
        settings: How.
        name: What to call it in errors and notes.

    Raises:
        InputError: Shapes do not fit, the rank saves nothing, or singular values do not converge.
        NonFiniteError: The weight or a row holds NaN or infinity, or the output is zero where the form's is not.
    """
    given = rows if isinstance(rows, LayerRows) else LayerRows(x=rows)
    given.check(weight, name)
    check_rank(weight, settings, name)
    return encode(SmoothedWeight(weight, given, settings, name), settings, name)


def check_rank(weight: Tensor, settings: BranchSettings, name: str) -> None:
    """Refuse a rank from which on two factors have no fewer numbers than their weight. Source: formula fB6.

    Args:
        weight: (O, C, kernel).
        settings: Their rank counts.
        name: What to call it in errors.

    Raises:
        InputError: The rank is above the largest that saves.
    """
    most = saving_rank(weight.shape[0], weight[0].numel())
    if settings.rank > most:
        problem = f"{settings.rank} is above {most}, the largest at which the factors of {name} are smaller than it"
        raise InputError("branch.rank", problem, f"use {most} or less")


def encode(smoothed: SmoothedWeight, settings: BranchSettings, name: str) -> BranchWeight:
    """:func:`branch_layer` of a weight that is checked and smoothed already.

    Args:
        smoothed: Made with the alphas of ``settings``.
        settings: How.
        name: What to call the weight in errors and notes.
    """
    best: BranchWeight | None = None
    errors: list[float] = []
    factors = smoothed.factors(settings.rank) if settings.rank else None
    for _ in range(1 + (settings.refits if settings.rank else 0)):
        made, left_over = _round(smoothed, factors, settings, name)
        errors.append(made.error)
        if best is not None and made.error >= best.error:
            break
        best = made
        if len(errors) <= settings.refits and settings.rank:
            factors = decompose(left_over, rank=settings.rank, name=name)
    if best is None:  # one round is always run
        raise NonFiniteError(f"{name}: no round was run")
    return replace(best, rounds=tuple(errors))


def output_error(branch: BranchWeight, weight: Tensor, rows: Tensor | LayerRows) -> float:
    """Squared error of the output over its squares, exactly as deployed. Source: relative form of formula fA5.

    Args:
        branch: Of the weight.
        weight: (O, C, kernel) it stands for.
        rows: (T, D), held out or not.

    Raises:
        InputError: Shapes do not fit.
        NonFiniteError: A row holds NaN or infinity, or the output is zero where the branch's is not.
    """
    given = rows if isinstance(rows, LayerRows) else LayerRows(x=rows)
    given.check(weight, "weight")
    if tuple(weight.shape) != branch.entry.shape:
        raise InputError("weight", f"shape {tuple(weight.shape)} is not {branch.entry.shape}", "give the same weight")
    wanted = given.x @ weight.detach().to("cpu", torch.float32).flatten(1).t()
    return _error(branch.entry, branch.parts, given, wanted)


def _round(
    smoothed: SmoothedWeight, factors: Factors | None, settings: BranchSettings, name: str
) -> tuple[BranchWeight, Tensor]:
    """The weight with a given branch, and what its residual leaves of the smoothed weight (O, D)."""
    tensors: dict[str, Tensor] = {}
    if smoothed.scales is not None:
        tensors["smooth"] = smoothed.scales
    if settings.activation_bits is not None and settings.activation_granularity == "static":
        tensors["input_scale"] = smoothed.input_scale(settings.activation_bits)
    residual, notes = smoothed.matrix, smoothed.notes
    if factors is not None:
        tensors |= store_factors(factors, settings.branch_bits)
        left, right = restore_factors(tensors)
        # What the stored branch leaves, so that the residual makes up for its rounding, too.
        residual = residual - left @ right
        notes += factors.notes
    stored, codebook, more = store_residual(residual, settings, name)
    tensors |= stored
    entry = seal(smoothed.weight, settings, tensors, codebook)
    parts = assembled(entry, tensors, name)
    error = _error(entry, parts, smoothed.rows, smoothed.outputs)
    size = smoothed.weight.numel() * smoothed.weight.element_size()
    made = BranchWeight(
        entry=entry, tensors=tensors, error=error, float_bytes=size, rounds=(error,), notes=tuple(dict.fromkeys((*notes, *more)))
    )  # fmt: skip
    return made, smoothed.matrix - parts.residual


def _error(entry: BranchEntry, parts: BranchParts, rows: LayerRows, wanted: Tensor) -> float:
    peaks = None
    if rows.sample_peaks is not None:
        peaks = rows.sample_peaks if parts.smooth is None else rows.sample_peaks / parts.smooth
        peaks = peaks.amax(1, keepdim=True)
    found = branch_product(entry, parts, rows.x, peaks=peaks)
    return relative_loss(squared_sum(found - wanted), squared_sum(wanted))
