"""Whether a spectrum is flat: no rank at which factors are smaller keeps the energy asked for. Source: formulas fB5, fB6."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from alphasmith.objectives.joint.low_rank.decomposition import decompose, saving_rank
from alphasmith.objectives.joint.low_rank.factorization import LowRankSettings, dense_matrices


@dataclass(frozen=True, kw_only=True)
class FlatLayer:
    """A layer that truncation does not make smaller.

    Attributes:
        name: Its dotted name.
        shape: Of its weight.
        needed: Smallest rank that keeps the energy asked for, or the rank asked for; of several groups the largest.
        saving: Largest rank at which the factors have fewer numbers than the weight; 0: none.
        kept: Share of the squared singular values that ``saving`` of them have, of several groups the smallest.
        reason: All this in one line.
    """

    name: str
    shape: tuple[int, ...]
    needed: int
    saving: int
    kept: float
    reason: str


def fallback_layers(
    model: nn.Module,
    settings: LowRankSettings,
    *,
    covariances: Mapping[str, Tensor] | None = None,
    rows: Mapping[str, Tensor] | None = None,
) -> tuple[FlatLayer, ...]:
    """The layers that stay dense under :func:`~alphasmith.objectives.joint.low_rank.factorization.factorize` because their spectrum is flat.

    Truncation loses too much there; a branch beside a quantized residual loses nothing of what it does not hold.

    Args:
        model: Not changed.
        settings: As for ``factorize``.
        covariances: As for ``factorize``.
        rows: As for ``factorize``.

    Returns:
        Flat layers, in the order of the model. Layers that cannot be decomposed for another reason are not among them.

    Raises:
        InputError: As ``factorize``.
        NonFiniteError: A weight is NaN or infinite.
    """
    found = []
    for layer in dense_matrices(model, settings, covariances=covariances, rows=rows):
        saving = saving_rank(*layer.matrices[0][0].shape)
        made = [
            decompose(matrix, energy=layer.energy, rank=layer.rank, weighting=weighting, name=f"{layer.name}.weight")
            for matrix, weighting in layer.matrices
        ]
        needed = max(one.rank for one in made) if layer.rank is None else layer.rank
        if needed <= saving:
            continue
        kept = min(_kept(one.singular, saving) for one in made)
        asked = f"rank {needed}" if layer.energy is None else f"rank {needed} for {layer.energy:g} of its energy"
        found.append(
            FlatLayer(
                name=layer.name,
                shape=layer.shape,
                needed=needed,
                saving=saving,
                kept=kept,
                reason=f"branch in place of truncate: {asked}, and factors are smaller up to rank {saving} ({kept:.3g})",
            )
        )
    return tuple(found)


def _kept(singular: Tensor, rank: int) -> float:
    squares = singular.double().square()
    total = float(squares.sum())
    return float(squares[:rank].sum()) / total if total else 1.0
