"""Proof that folding did not change the float model, and the name of the site that did when it fails."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import EquivalenceError, InputError, NonFiniteError
from alphasmith.objectives.judge.answers import answer, farthest
from alphasmith.objectives.media.batch import CALL_ERRORS, Batch, main_name
from alphasmith.objectives.sites.folding import fold
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.objectives.stored_types import misfit, round_to

#: Models whose float64 copy is larger than this [bytes] are compared in their own dtype.
FLOAT64_LIMIT = 1024**3

#: Named at fault when no single site is; as an exclusion pattern it matches all of them.
ALL_SITES = "*"


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """How far a folded model is from the one before folding.

    Attributes:
        error: Largest relative output error ``||y' - y|| / ||y||`` over batches and outputs.
        dtype: What both were run in: ``float64`` measures the folding alone, a model's own type the order of additions too.
        outputs: Names of the floating tensors that were compared: all that the model returns.
        stored: The same error once the folded model was rounded to the types that it is stored in; None: it was not.
        misfit: A tensor that its type cannot hold, for which nothing was rounded; empty: there is none.
    """

    error: float
    dtype: str
    outputs: tuple[str, ...]
    stored: float | None = None
    misfit: str = ""


@dataclass(frozen=True, kw_only=True)
class References:
    """What a model answered before it was folded.

    Attributes:
        batches: The data.
        answers: Per batch every floating tensor of the output, see ``answers.answer``.
        cast: What both models are cast to; None: compared as they are.
    """

    batches: tuple[Batch, ...]
    answers: tuple[Mapping[str, Tensor], ...]
    cast: torch.dtype | None

    def only(self, batch: int) -> References:
        """Those of one batch."""
        return replace(self, batches=(self.batches[batch],), answers=(self.answers[batch],))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self.answers[0])

    @property
    def dtype(self) -> str:
        """What the main output is computed in."""
        return str(self.answers[0][main_name(self.answers[0])].dtype).removeprefix("torch.")


def prove(
    model: nn.Module,
    folded: nn.Module,
    batches: Sequence[Batch],
    *,
    tolerance: float = 1e-4,
    dtype: torch.dtype | None = None,
    float64_bytes: int = FLOAT64_LIMIT,
) -> float:
    """Require that two float models agree in every floating tensor that they return. Source: claim A-11 (product unchanged).

    Outputs are compared in float64 copies when these are small and finite, so that what is measured is the folding and not
    the order of additions. Padded positions are left out.

    Args:
        model: The model before folding.
        folded: The model after folding; neither is changed.
        batches: Data not used so far.
        tolerance: Largest relative output error ``||y' - y|| / ||y||`` allowed on any batch and output.
        dtype: What to compare in; None: float64 if each copy stays below ``float64_bytes`` and the model runs in float64
            with finite outputs, else as they are.
        float64_bytes: Memory for one float64 copy [bytes].

    Returns:
        The largest relative output error over batches and outputs.

    Raises:
        InputError: No batches, or a tolerance that is not positive.
        EquivalenceError: The error exceeds ``tolerance`` or the folded model's output is not finite.
        NonFiniteError: The model before folding returns NaN or infinity.
    """
    _check(batches, tolerance)
    references = references_of(model, batches, dtype=dtype, float64_bytes=float64_bytes)
    found = compare(folded, references)
    if found.error > tolerance:
        raise EquivalenceError(ALL_SITES, found.error, tolerance, output=found.output)
    return found.error


def fold_and_prove(
    model: nn.Module,
    sites: Sequence[Site],
    smoothings: Mapping[str, Smoothing],
    batches: Sequence[Batch],
    *,
    tolerance: float = 1e-4,
    float64_bytes: int = FLOAT64_LIMIT,
    stored: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Equivalence:
    """Fold smoothings into a model, in place, and require that it computes what it did before.

    No second model is made: outputs before folding are kept, and float64 copies exist one at a time, where they are small.
    Source: claim A-11 (product unchanged).

    Args:
        model: The float model, private; folded afterwards. After an error it is to be thrown away.
        sites: Its sites; those of other modes than ``fold`` or without smoothing are passed over.
        smoothings: Site name -> smoothing.
        batches: Data not used so far.
        tolerance: See :func:`prove`.
        float64_bytes: See :func:`prove`.
        stored: Name of a tensor -> type that it is to be stored in. The folded model is rounded to these, in place, if all
            fit.

    Returns:
        The largest error over batches and outputs, before and after rounding, and what it was measured in.

    Raises:
        InputError: No batches, a tolerance that is not positive, or a smoothing that does not fit its site.
        EquivalenceError: The error exceeds ``tolerance`` or an output is not finite; names the site at fault.
        NonFiniteError: The model before folding returns NaN or infinity.
    """
    _check(batches, tolerance)
    references = references_of(model, batches, float64_bytes=float64_bytes)
    folded = [site for site in sites if site.mode == "fold" and site.name in smoothings]
    for site in folded:
        fold(model, site, smoothings[site.name])
    found = compare(model, references)
    if found.error > tolerance:
        site_at_fault = _take_back(model, folded, smoothings, references.only(found.batch), tolerance)
        raise EquivalenceError(site_at_fault, found.error, tolerance, output=found.output)
    proven = Equivalence(error=found.error, dtype=references.dtype, outputs=references.names)
    tensors = model.state_dict()
    if not stored or (odd := misfit(tensors, stored)):
        return replace(proven, misfit=odd) if stored else proven
    round_to(tensors, stored)
    return replace(proven, stored=compare(model, references).error)


def _take_back(
    model: nn.Module,
    folded: Sequence[Site],
    smoothings: Mapping[str, Smoothing],
    references: References,
    tolerance: float,
) -> str:
    """Undo one fold after the other, last first, and name the one without which the model agrees again."""
    for site in reversed(folded):
        fold(model, site, inverse(smoothings[site.name]))
        if compare(model, references).error <= tolerance:
            return site.name
    return ALL_SITES


def inverse(smoothing: Smoothing) -> Smoothing:
    """The smoothing that takes another back: of ``x' = (x - z) / s`` that is ``x = (x' - (-z / s)) / (1 / s)``."""
    shift = None if smoothing.shift is None else -smoothing.shift / smoothing.scales
    return Smoothing(scales=1 / smoothing.scales, shift=shift)


def _check(batches: Sequence[Batch], tolerance: float) -> None:
    if not batches:
        raise InputError("proof.batches", "is empty", "give at least one batch not used so far")
    if not 0 < tolerance < math.inf:
        raise InputError("proof.tolerance", f"{tolerance} is not a positive number", "use e.g. 1e-4")


def references_of(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    dtype: torch.dtype | None = None,
    float64_bytes: int = FLOAT64_LIMIT,
) -> References:
    """What a model answers, kept to be compared with what it answers later.

    Args:
        model: The model; unchanged.
        batches: The data, on its device; not empty.
        dtype: See :func:`prove`.
        float64_bytes: See :func:`prove`.

    Raises:
        NonFiniteError: Its main output is NaN or infinite in its own type.
    """
    if dtype is None and _float64_size(model) <= float64_bytes:
        try:
            found = _references(model, batches, torch.float64)
        except CALL_ERRORS:  # some models build float32 tensors inside their forward, which float64 weights refuse
            found = None
        # A mask of the smallest float32, say, may leave nothing but NaN where float32 rounds it away.
        if found is not None and _is_finite(found):
            return found
    found = _references(model, batches, dtype)
    if not _is_finite(found):
        raise NonFiniteError(
            "the float model's own output is NaN or infinite, so nothing can be proven with this batch"
        )
    return found


def _float64_size(model: nn.Module) -> int:
    return 8 * sum(t.numel() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())


def _references(model: nn.Module, batches: Sequence[Batch], cast: torch.dtype | None) -> References:
    compared = _comparable(model, cast)
    # The last forward may return a view of a larger buffer, or of a tensor that folding writes to.
    answers = tuple({n: t.clone() for n, t in answer(compared, b.to(dtype=cast)).items()} for b in batches)
    return References(batches=tuple(batches), answers=answers, cast=cast)


def _is_finite(references: References) -> bool:
    """Whether all main outputs are; the others may hold what they like, it is compared as it is."""
    return all(bool(torch.isfinite(found[main_name(found)]).all()) for found in references.answers)


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
    for module in model.modules():
        # Old parametrizations keep what they computed as a plain attribute, which torch refuses to copy.
        cast.update((id(v), v.detach()) for v in vars(module).values() if isinstance(v, torch.Tensor) and not v.is_leaf)
    return copy.deepcopy(model, cast).eval()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest relative error of a model against its references, and where it was found.

    Attributes:
        error: ``||y' - y|| / ||y||``.
        batch: Number of the batch.
        output: Name of the tensor.
    """

    error: float
    batch: int
    output: str


def compare(folded: nn.Module, references: References) -> Difference:
    """How far a folded model is from what it answered before.

    Args:
        folded: The model, folded; unchanged.
        references: Made of it before, see :func:`references_of`.
    """
    compared = _comparable(folded, references.cast)
    found = []
    for index, (batch, reference) in enumerate(zip(references.batches, references.answers, strict=True)):
        error, name = farthest(answer(compared, batch.to(dtype=references.cast)), reference)
        found.append(Difference(error=error, batch=index, output=name))
    return max(found, key=lambda difference: difference.error)
