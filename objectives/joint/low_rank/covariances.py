"""What the activation-scaled and the whitened decomposition count errors by: the covariance of every layer's inputs. Formula fB4."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.patches import ConvolutionTap, Window, gather_patches
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.low_rank.classes import layer_classes
from alphasmith.objectives.joint.low_rank.factored import FactoredConv, FactoredLinear
from alphasmith.objectives.media.batch import Batch, call, data_errors, unfused_attention

#: Patches of one convolution that are multiplied at once.
_AT_ONCE = 8192


def input_covariances(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Layer -> (D, D) mean of x x^T over what it reads, float64: rows of linear layers, patches of convolutions.

    D is I, for convolutions I / groups * kernel, over all groups together. Convolutions factored in the spatial form and layers that
    the batches do not reach are left out: the first step of the one reads columns of patches, and nothing is known of the others.

    Args:
        model: In evaluation mode, on one device; not modified.
        batches: Samples, on any device.

    Raises:
        InputError: There is no batch, or the model cannot be called with one.
        NonFiniteError: A layer reads NaN or infinity.
    """
    sums = {name: _Sum() for name in layer_classes(model)}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    seen = 0
    with ExitStack() as stack:
        for name, found in sums.items():
            module = model.get_submodule(name)
            if isinstance(module, (nn.Linear, FactoredLinear)):
                handle = module.register_forward_pre_hook(found.linear)
                stack.callback(handle.remove)
            elif isinstance(module, FactoredConv):
                if module.form == "channel":
                    stack.enter_context(ConvolutionTap(module.right, _conv(found, module.groups)))
            else:
                # A computed weight is a new tensor at every call: it is held still while the batches run.
                weight: Any = module.weight
                if not isinstance(weight, nn.Parameter):
                    stack.enter_context(torch.nn.utils.parametrize.cached())
                    weight = module.weight
                groups: Any = module.groups
                stack.enter_context(ConvolutionTap(weight, _conv(found, groups)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(unfused_attention())
        for batch in batches:
            with data_errors():
                call(model, batch.to(device))
            seen += 1
    if not seen:
        raise InputError("svd.metric", "there is no sample to take covariances of", "give training samples")
    for name, found in sums.items():
        if found.total is not None and not bool(torch.isfinite(found.total).all()):
            raise NonFiniteError(f"{name} reads NaN or infinity")
    return {name: found.total / found.rows for name, found in sums.items() if found.total is not None}


class _Sum:
    """Sum of x x^T over rows."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows = 0

    def linear(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        """Hook of a linear layer."""
        if given:
            self.add(given[0].flatten(0, -2) if given[0].dim() > 1 else given[0][None])

    def add(self, rows: Tensor) -> None:
        """Rows (N, D)."""
        wide = rows.double()
        product = wide.T @ wide
        self.total = product if self.total is None else self.total + product
        self.rows += len(rows)


def _conv(found: _Sum, groups: int) -> Any:
    """What a tap calls: the patches of an input, a block of columns a group."""

    def seen(x: Tensor, window: Window) -> None:
        count = x.shape[0]
        for size in window.output_size(x.shape[2:]):
            count *= size
        for start in range(0, count, _AT_ONCE):
            positions = torch.arange(start, min(start + _AT_ONCE, count), device=x.device)
            patches = gather_patches(x, window, positions)
            found.add(patches.unflatten(1, (groups, -1)).flatten(0, 1))

    return seen
