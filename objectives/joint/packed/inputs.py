"""What the matrices of a model read while it runs on samples. Source: formula fB12."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from alphasmith.objectives.joint.low_rank.covariances import input_covariances
from alphasmith.objectives.joint.low_rank.factored import FactoredConv, FactoredLinear
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model.plain_operators import rewrite
from alphasmith.objectives.model.private_copy import private_copy


def parameter_inputs(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Parameter -> (D, D) mean of x x^T over the rows that it is multiplied with, float64.

    Of factored layers the first factor is known, what the second one reads follows from it. Left out are convolutions in groups and in
    the spatial form, embeddings, and layers that the samples do not reach.

    Args:
        model: Dense, factored, with recurrent layers whole or taken apart; not modified.
        batches: Samples.

    Raises:
        InputError: There is no batch, or the model cannot be called with one.
        NonFiniteError: A layer reads NaN or infinity.
    """
    plain = private_copy(model).eval()
    names = rewrite(plain, attention=False).renamed
    found = {}
    for layer, covariance in input_covariances(plain, batches).items():
        module = plain.get_submodule(layer)
        if getattr(module, "groups", 1) == 1:
            name = f"{layer}.right" if isinstance(module, (FactoredLinear, FactoredConv)) else f"{layer}.weight"
            found[names.get(name, name)] = covariance
    return found
