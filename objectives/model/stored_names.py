"""What a checkpoint of transformers calls the parameters of a model, and which classes stand in the way of a quantized one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def stored_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Parameter -> its name in a checkpoint, where that is another one.

    Args:
        model: Of transformers, on any device.
        names: Of parameters.

    Returns:
        Without parameters that keep their name, and without those that are made of several tensors or of a part of one; the latter
        by name and shape alone, so compare shapes.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name in names:
        if name in parameters:
            reverted = revert_weight_conversion(model, {name: parameters[name].detach()})
            if len(reverted) == 1 and name not in reverted:
                (found[name],) = reverted
    return found


def splits_weights(model: nn.Module) -> bool:
    """Whether its class makes several weights of one tensor on loading, which transformers 5.23 cannot do for a quantized checkpoint.

    Args:
        model: Of transformers.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    config: Any = getattr(model, "config", None)
    keys = (type(model).__name__, getattr(config, "model_type", None))
    known = next((k for key in keys if key and (k := get_checkpoint_conversion_mapping(key)) is not None), ())
    return any(len(entry.target_patterns) > 1 and entry.source_patterns[0].endswith(".weight") for entry in known)


def initializes_all_weights(model: nn.Module) -> bool:
    """Whether its class initializes a weight of every linear layer on loading, which fails where weights are packed.

    Args:
        model: Of transformers, on the device ``meta``; as it was afterwards.
    """
    bare = nn.Linear(1, 1, bias=False, device="meta")
    del bare.weight
    initialize: Any = getattr(model, "initialize_weights", None)
    if initialize is None:
        return False
    model.add_module("bare", bare)
    try:
        initialize()
    except AttributeError:
        return True
    finally:
        del model.bare
    return False
