"""Which class of layer a tensor belongs to: tables of one class have the same number of entries."""

from __future__ import annotations

from typing import Literal

from torch import nn

from alphasmith.objectives.joint.branch.layers import BranchConv, BranchLinear
from alphasmith.objectives.joint.low_rank.factored import FactoredConv, FactoredLinear
from alphasmith.objectives.joint.structure import CONVOLUTIONS, is_recurrent

#: Class of layer by what computes with a tensor.
LayerClass = Literal["conv", "recurrent", "linear", "embedding", "other"]
_KINDS: tuple[tuple[LayerClass, tuple[type[nn.Module], ...]], ...] = (
    ("conv", (*CONVOLUTIONS, FactoredConv, BranchConv)),
    ("linear", (nn.Linear, FactoredLinear, BranchLinear, nn.MultiheadAttention)),
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
)


def layer_classes(model: nn.Module, names: list[str]) -> dict[str, tuple[str, LayerClass]]:
    """Tensor -> its layer and the class of that; what is inside a recurrent layer is recurrent.

    Args:
        model: The model.
        names: Full names of its tensors.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    recurrent = {name for name, module in modules.items() if is_recurrent(module)}
    return {name: _of(owner_of(name), modules, recurrent) for name in names}


def owner_of(name: str) -> str:
    """The module that a tensor belongs to; of one that a weight is computed from, the module with that weight."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def _of(owner: str, modules: dict[str, nn.Module], recurrent: set[str]) -> tuple[str, LayerClass]:
    above = owner
    while above:
        if above in recurrent:
            return owner, "recurrent"
        above = above.rpartition(".")[0]
    module = modules[owner]
    return owner, next((kind for kind, types in _KINDS if isinstance(module, types)), "other")
