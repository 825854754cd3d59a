"""Proof that folding did not change the float model, and the name of the site that did when it fails."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from alphasmith.objectives.batch import Batch, call, main_output
from alphasmith.objectives.errors import EquivalenceError, InputError, NonFiniteError
from alphasmith.objectives.losses import squared_sum
from alphasmith.objectives.model_objective import real_rows
from alphasmith.objectives.sites.folding import fold
from alphasmith.objectives.sites.types import Site

#: Models whose float64 copy is larger than this [bytes] are compared in their own dtype.
FLOAT64_LIMIT = 1024**3

#: Named at fault when no single site is; as an exclusion pattern it matches all of them.
ALL_SITES = "*"


def prove(
    model: nn.Module,
    folded: nn.Module,
    batches: Sequence[Batch],
    *,
    tolerance: float = 1e-4,
    dtype: torch.dtype | None = None,
    sites: Sequence[Site] = (),
    scales: Mapping[str, Tensor] | None = None,
) -> float:
    """Require that two float models agree. Source: claim A-11 (product unchanged), architecture section 3 point 9.

    Outputs are compared in float64 copies when these are small, so that what is measured is the folding and not the
    order of additions. Padded positions are left out.

    Args:
        model: The model before folding.
        folded: The model after folding; neither is changed.
        batches: Data not used so far.
        tolerance: Largest relative output error ``||y' - y|| / ||y||`` allowed on any batch.
        dtype: What to compare in; None: float64 if each copy stays below ``FLOAT64_LIMIT`` bytes and the model runs in
            float64, else as they are.
        sites: With ``scales``: what was folded, to name the site at fault on failure.
        scales: Site name -> (C,).

    Returns:
        The largest relative output error over batches.

    Raises:
        InputError: No batches.
        EquivalenceError: The error exceeds ``tolerance`` or the folded model's output is not finite.
        NonFiniteError: The model before folding returns NaN or infinity.
    """
    if not batches:
        raise InputError("proof.batches", "is empty", "give at least one batch not used so far")
    if not 0 < tolerance < math.inf:
        raise InputError("proof.tolerance", f"{tolerance} is not a positive number", "use e.g. 1e-4")
    chosen = _comparison_dtype(model, batches[0], dtype)
    compared = _comparable(model, chosen)
    references = [_reference(compared, batch.to(dtype=chosen)) for batch in batches]
    del compared  # one float64 copy at a time
    compared = _comparable(folded, chosen)
    worst = 0.0
    for batch, reference in zip(batches, references, strict=True):
        error = _relative_error(_output(compared, batch.to(dtype=chosen)), reference)
        if error > tolerance:
            del compared  # the search for the culprit makes a copy of its own
            named = ALL_SITES if scales is None else find_culprit(model, sites, scales, batch, tolerance, dtype=dtype)
            raise EquivalenceError(named, error, tolerance)
        worst = max(worst, error)
    return worst


def find_culprit(
    model: nn.Module,
    sites: Sequence[Site],
    scales: Mapping[str, Tensor],
    batch: Batch,
    tolerance: float,
    *,
    dtype: torch.dtype | None = None,
) -> str:
    """Fold one site after the other on a private copy and name the first that breaks the model.

    Args:
        model: The model before folding; not changed.
        sites: The sites that were folded; those of other modes or without scales are passed over.
        scales: Site name -> (C,).
        batch: Data on which the proof failed.
        tolerance: See :func:`prove`.
        dtype: See :func:`prove`.

    Returns:
        The site's name, or ``ALL_SITES`` when no fold alone moves the output beyond the tolerance.

    Raises:
        InputError: Scales do not fit their site.
        NonFiniteError: The model before folding returns NaN or infinity.
    """
    chosen = _comparison_dtype(model, batch, dtype)
    moved = batch.to(dtype=chosen)
    work = copy.deepcopy(model).eval().to(dtype=chosen)
    reference = _reference(work, moved)
    for site in sites:
        if site.mode != "fold" or site.name not in scales:
            continue
        fold(work, site, scales[site.name])
        if _relative_error(_output(work, moved), reference) > tolerance:
            return site.name
    return ALL_SITES


def _comparison_dtype(model: nn.Module, batch: Batch, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype to cast copies to, or None to compare the models as they are."""
    if dtype is not None:
        return dtype
    floating = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    if 8 * sum(t.numel() for t in floating) > FLOAT64_LIMIT:
        return None
    try:
        _output(_comparable(model, torch.float64), batch.to(dtype=torch.float64))
    except RuntimeError:  # some models build float32 tensors inside their forward, which float64 weights refuse
        return None
    return torch.float64


def _comparable(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    if dtype is None and not model.training:
        return model
    return copy.deepcopy(model).eval().to(dtype=dtype)


def _output(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return real_rows(main_output(call(model, batch)), batch)


def _reference(model: nn.Module, batch: Batch) -> Tensor:
    output = _output(model, batch)
    if not bool(torch.isfinite(output).all()):
        raise NonFiniteError(
            "the float model's own output is NaN or infinite, so nothing can be proven with this batch"
        )
    return output


def _relative_error(output: Tensor, reference: Tensor) -> float:
    """||y' - y|| / ||y||; infinite when y' is not finite, or y is zero and y' is not."""
    if not bool(torch.isfinite(output).all()):
        return math.inf
    error = squared_sum(output.to(torch.float64) - reference.to(torch.float64))
    energy = squared_sum(reference)
    if error == 0.0:
        return 0.0
    return math.sqrt(error / energy) if energy > 0.0 else math.inf
