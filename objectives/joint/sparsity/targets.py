"""Which normalizations the two sparsity terms are put on, found by structure. Source: claim B-4."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from alphasmith.objectives.joint.structure import NormPlace, read_structure
from alphasmith.objectives.media.batch import Batch


@dataclass(frozen=True, kw_only=True)
class SparsityTargets:
    """Parameters gamma of the normalizations, by name.

    Attributes:
        encoder: Those of encoder layers: they belong to a convolution or a linear layer and stand before every recurrent layer.
        recurrent: Those of recurrent layers: inside one, or the first behind its output.
        skipped: Normalization -> why it is in neither.
        warnings: What people should know before they train, a line each: a term that is empty, and why.
    """

    encoder: tuple[str, ...]
    recurrent: tuple[str, ...]
    skipped: dict[str, str]
    warnings: tuple[str, ...]


def find_targets(model: nn.Module, batch: Batch) -> SparsityTargets:
    """Find the normalizations of encoder layers and of recurrent layers. Source: claim B-4.

    Args:
        model: In evaluation mode; not modified.
        batch: One tiny batch; all its intermediate tensors are held at once.
    """
    structure = read_structure(model, batch)
    encoder: list[str] = []
    recurrent: list[str] = []
    skipped = dict.fromkeys(structure.idle, "the example batch does not reach it")
    for place in structure.norms:
        reason = _refused(model.get_submodule(place.name), place)
        if reason:
            skipped[place.name] = reason
        else:
            (recurrent if place.recurrent else encoder).append(f"{place.name}.weight")
    warnings = []
    if not structure.recurrent:
        warnings.append("the model has no recurrent layer: the second sparsity term is empty")
    elif not recurrent:
        warnings.append("no normalization belongs to a recurrent layer: the second sparsity term is empty")
    if not structure.norms:
        warnings.append("the model has no normalization: nothing drives its weights to low rank while it is trained")
    elif not encoder:
        warnings.append("no normalization belongs to an encoder layer: the first sparsity term is empty")
    return SparsityTargets(
        encoder=tuple(encoder), recurrent=tuple(recurrent), skipped=skipped, warnings=tuple(warnings)
    )


def _refused(norm: nn.Module, place: NormPlace) -> str:
    if not isinstance(norm._parameters.get("weight"), nn.Parameter):
        return "it has no scales"
    if place.recurrent:
        return ""
    if place.after_recurrent:
        return "it stands behind the recurrent layers and belongs to none of them"
    return "" if place.layers else "it belongs to no layer"
