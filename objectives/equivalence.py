"""Proof that folding did not change the float model, and the name of the site that did when it fails."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alphasmith.objectives.batch import Batch, call, main_output
from alphasmith.objectives.errors import EquivalenceError, InputError, NonFiniteError
from alphasmith.objectives.losses import squared_sum
from alphasmith.objectives.model_objective import real_rows
from alphasmith.objectives.sites.folding import fold
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing

#: Models whose float64 copy is larger than this [bytes] are compared in their own dtype.
FLOAT64_LIMIT = 1024**3

#: Named at fault when no single site is; as an exclusion pattern it matches all of them.
ALL_SITES = "*"


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """How far a folded model is from the one before folding.

    Attributes:
        error: Largest relative output error ``||y' - y|| / ||y||`` over batches.
        dtype: What both were run in: ``float64`` measures the folding alone, a model's own type the order of additions too.
    """

    error: float
    dtype: str


def prove(
    model: nn.Module,
    folded: nn.Module,
    batches: Sequence[Batch],
    *,
    tolerance: float = 1e-4,
    dtype: torch.dtype | None = None,
    float64_bytes: int = FLOAT64_LIMIT,
) -> float:
    """Require that two float models agree. Source: claim A-11 (product unchanged), architecture section 3 point 9.

    Outputs are compared in float64 copies when these are small, so that what is measured is the folding and not the
    order of additions. Padded positions are left out.

    Args:
        model: The model before folding.
        folded: The model after folding; neither is changed.
        batches: Data not used so far.
        tolerance: Largest relative output error ``||y' - y|| / ||y||`` allowed on any batch.
        dtype: What to compare in; None: float64 if each copy stays below ``float64_bytes`` and the model runs in float64,
            else as they are.
        float64_bytes: Memory for one float64 copy [bytes].

    Returns:
        The largest relative output error over batches.

    Raises:
        InputError: No batches, or a tolerance that is not positive.
        EquivalenceError: The error exceeds ``tolerance`` or the folded model's output is not finite.
        NonFiniteError: The model before folding returns NaN or infinity.
    """
    _check(batches, tolerance)
    chosen = dtype or _comparison_dtype(model, batches[0], float64_bytes)
    worst, _ = _compare(folded, batches, _references(model, batches, chosen), chosen)
    if worst > tolerance:
        raise EquivalenceError(ALL_SITES, worst, tolerance)
    return worst


def fold_and_prove(
    model: nn.Module,
    sites: Sequence[Site],
    smoothings: Mapping[str, Smoothing],
    batches: Sequence[Batch],
    *,
    tolerance: float = 1e-4,
    float64_bytes: int = FLOAT64_LIMIT,
) -> Equivalence:
    """Fold smoothings into a model, in place, and require that it computes what it did before.

    No second model is made: outputs before folding are kept, and float64 copies exist one at a time, where they are small.
    Source: claim A-11 (product unchanged), architecture section 3 point 9.

    Args:
        model: The float model, private; folded afterwards. After an error it is to be thrown away.
        sites: Its sites; those of other modes than ``fold`` or without smoothing are passed over.
        smoothings: Site name -> smoothing.
        batches: Data not used so far.
        tolerance: See :func:`prove`.
        float64_bytes: See :func:`prove`.

    Returns:
        The largest error over batches, and what it was measured in.

    Raises:
        InputError: No batches, a tolerance that is not positive, or a smoothing that does not fit its site.
        EquivalenceError: The error exceeds ``tolerance`` or an output is not finite; names the site at fault.
        NonFiniteError: The model before folding returns NaN or infinity.
    """
    _check(batches, tolerance)
    chosen = _comparison_dtype(model, batches[0], float64_bytes)
    references = _references(model, batches, chosen)
    folded = [site for site in sites if site.mode == "fold" and site.name in smoothings]
    for site in folded:
        fold(model, site, smoothings[site.name])
    worst, index = _compare(model, batches, references, chosen)
    if worst > tolerance:
        site_at_fault = _take_back(model, folded, smoothings, batches[index], references[index], tolerance, chosen)
        raise EquivalenceError(site_at_fault, worst, tolerance)
    own = str(references[0].dtype).removeprefix("torch.")
    return Equivalence(error=worst, dtype=own)


def _take_back(
    model: nn.Module,
    folded: Sequence[Site],
    smoothings: Mapping[str, Smoothing],
    batch: Batch,
    reference: Tensor,
    tolerance: float,
    dtype: torch.dtype | None,
) -> str:
    """Undo one fold after the other, last first, and name the one without which the model agrees again."""
    for site in reversed(folded):
        fold(model, site, _inverse(smoothings[site.name]))
        if _compare(model, [batch], [reference], dtype)[0] <= tolerance:
            return site.name
    return ALL_SITES


def _inverse(smoothing: Smoothing) -> Smoothing:
    """The smoothing that takes another back: of ``x' = (x - z) / s`` that is ``x = (x' - (-z / s)) / (1 / s)``."""
    shift = None if smoothing.shift is None else -smoothing.shift / smoothing.scales
    return Smoothing(scales=1 / smoothing.scales, shift=shift)


def _check(batches: Sequence[Batch], tolerance: float) -> None:
    if not batches:
        raise InputError("proof.batches", "is empty", "give at least one batch not used so far")
    if not 0 < tolerance < math.inf:
        raise InputError("proof.tolerance", f"{tolerance} is not a positive number", "use e.g. 1e-4")


def _comparison_dtype(model: nn.Module, batch: Batch, float64_bytes: int) -> torch.dtype | None:
    """The dtype to cast copies to, or None to compare the models as they are."""
    floating = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    if 8 * sum(t.numel() for t in floating) > float64_bytes:
        return None
    try:
        _output(_comparable(model, torch.float64), batch.to(dtype=torch.float64))
    except RuntimeError:  # some models build float32 tensors inside their forward, which float64 weights refuse
        return None
    return torch.float64


def _comparable(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The model in evaluation mode, as a copy in another dtype where one is given."""
    if dtype is None and not model.training:
        return model
    # Known copies keep deepcopy from cloning a tensor before it is cast.
    cast: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if dtype is not None and tensor.is_floating_point():
            value = tensor.detach().to(dtype, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            cast[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    return copy.deepcopy(model, cast).eval()


def _output(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return real_rows(main_output(call(model, batch)), batch)


def _references(model: nn.Module, batches: Sequence[Batch], dtype: torch.dtype | None) -> list[Tensor]:
    compared = _comparable(model, dtype)
    outputs = []
    for batch in batches:
        # The last forward may return a view of a larger buffer, or of a tensor that folding writes to.
        output = _output(compared, batch.to(dtype=dtype)).clone()
        if not bool(torch.isfinite(output).all()):
            raise NonFiniteError(
                "the float model's own output is NaN or infinite, so nothing can be proven with this batch"
            )
        outputs.append(output)
    return outputs


def _compare(
    folded: nn.Module, batches: Sequence[Batch], references: Sequence[Tensor], dtype: torch.dtype | None
) -> tuple[float, int]:
    """The largest relative error over batches, and the batch it was found on."""
    compared = _comparable(folded, dtype)
    errors = [
        _relative_error(_output(compared, batch.to(dtype=dtype)), reference)
        for batch, reference in zip(batches, references, strict=True)
    ]
    worst = max(errors)
    return worst, errors.index(worst)


def _relative_error(output: Tensor, reference: Tensor) -> float:
    """||y' - y|| / ||y||; infinite when y' is not finite, or y is zero and y' is not."""
    if not bool(torch.isfinite(output).all()):
        return math.inf
    error = squared_sum(output.to(torch.float64) - reference.to(torch.float64))
    energy = squared_sum(reference)
    if error == 0.0:
        return 0.0
    return math.sqrt(error / energy) if energy > 0.0 else math.inf
