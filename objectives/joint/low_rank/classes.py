"""Which class of layers a layer belongs to: convolutions, gates of recurrent layers over their input or state, other linear layers."""

from __future__ import annotations

from torch import nn

from alphasmith.objectives.joint.low_rank.factored import FactoredConv, FactoredLinear
from alphasmith.objectives.joint.structure import is_recurrent
from alphasmith.objectives.literals import LayerClass


def layer_classes(model: nn.Module) -> dict[str, LayerClass]:
    """Name -> class of every linear layer and convolution, factored or not, in the order of the model.

    Args:
        model: Its recurrent layers are taken apart by :func:`~alphasmith.objectives.model.plain_operators.rewrite`; those that are not
            hold no linear layer.
    """
    recurrent = [name for name, module in model.named_modules() if is_recurrent(module)]
    found: dict[str, LayerClass] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, FactoredConv)):
            found[name] = "conv"
        elif isinstance(module, (nn.Linear, FactoredLinear)):
            inside = any(name.startswith(f"{layer}.") for layer in recurrent)
            last = name.rpartition(".")[2]
            # The projection of a state is read by the next state, as the gates over the state are.
            found[name] = "linear" if not inside else "recurrent_ih" if last == "ih" else "recurrent_hh"
    return found
