"""Normalizations folded into the weights around them before these are decomposed. Source: claim B-5; formulas fB1, fB5.

The scale gamma of a normalization is a tensor of its own, which no singular value of a weight feels. Behind a convolution or a linear
layer, a batch normalization becomes a part of it: rows times gamma / sqrt(var + eps). Before them, the size of gamma goes into their columns
the way smoothing scales do, and the normalization keeps its sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrize

from alphasmith.objectives.joint.structure import BATCH_NORMS, CONVOLUTIONS, NORMS, read_structure
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.folding import fold
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing, tie_index, tied_extreme

#: Smallest scale that is folded, relative to the largest of its normalization: a scale is divided by, so none may be 0.
_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class FoldedNorms:
    """What became of the normalizations of a model.

    Attributes:
        rows: Normalization -> the layer before it, which it is now a part of.
        columns: Normalization -> the layers behind it, whose columns now have its scales.
        left: Normalization -> why it stays as it was.
    """

    rows: dict[str, str]
    columns: dict[str, tuple[str, ...]]
    left: dict[str, str]


def fold_norms(model: nn.Module, batch: Batch) -> FoldedNorms:
    """Fold every normalization that can be into the weights around it; the model computes the same up to float rounding.

    Recurrent layers take columns only when they are built of linear layers, see
    :func:`~alphasmith.objectives.model.plain_operators.rewrite`.

    Args:
        model: In evaluation mode; changed in place, so give a private copy. A batch normalization that becomes part of the layer before
            it is replaced by ``nn.Identity``.
        batch: One tiny batch; what the model does on it must be what it does on any.

    Raises:
        InputError: The model is in training mode, or has no linear layer or convolution.
    """
    rows: dict[str, str] = {}
    left: dict[str, str] = {}
    structure = read_structure(model, batch)
    for place in structure.norms:
        norm = model.get_submodule(place.name)
        if isinstance(norm, BATCH_NORMS):
            reason = _into_rows(model, place.name, norm, place.alone)
            if reason:
                left[place.name] = reason
            else:
                rows[place.name] = place.alone
    columns = _into_columns(model, batch)
    for place in structure.norms:
        if place.name not in rows and place.name not in columns:
            left.setdefault(place.name, "its scales do not provably fold into what reads it")
    left |= dict.fromkeys(structure.idle, "the example batch does not reach it")
    return FoldedNorms(rows=rows, columns=columns, left={n: r for n, r in left.items() if n not in columns})


def row_scales(norm: nn.Module) -> Tensor | None:
    """(C,) |gamma| / sqrt(var + eps) that a batch normalization multiplies the rows before it with; None where it takes statistics of the batch.

    For a decomposition that counts the rows so without folding them: the normalization stays, with its gamma to be trained.
    """
    if not isinstance(norm, BATCH_NORMS) or norm.running_var is None:
        return None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    return scale if norm.weight is None else scale * norm.weight.detach().abs()


def _into_rows(model: nn.Module, name: str, norm: Any, layer_name: str) -> str:
    """Make a batch normalization part of the layer before it; returns why it cannot be, or an empty string."""
    if not layer_name:
        return "it is not the only reader of one layer's output"
    layer = model.get_submodule(layer_name)
    if norm.running_mean is None:
        return "it takes the statistics of every batch"
    if parametrize.is_parametrized(layer) or parametrize.is_parametrized(norm):
        return "a weight is computed"
    mean, variance, gamma, beta = norm.running_mean, norm.running_var, norm.weight, norm.bias
    if isinstance(layer, CONVOLUTIONS):
        transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        if transposed and layer.groups != 1:
            return "a transposed convolution in groups has its outputs on two axes"
        arguments = (layer.weight, layer.bias, mean, variance, norm.eps, gamma, beta)
        layer.weight, layer.bias = fusion.fuse_conv_bn_weights(*arguments, transpose=transposed)
    elif isinstance(layer, nn.Linear):
        ones = torch.ones_like(mean)
        given = (ones if gamma is None else gamma, torch.zeros_like(mean) if beta is None else beta)
        layer.weight, layer.bias = fusion.fuse_linear_bn_weights(
            layer.weight, layer.bias, mean, variance, norm.eps, *given
        )
    else:
        return "the layer before it is neither a convolution nor a linear layer"
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is norm:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity().train(norm.training))
    return ""


def _into_columns(model: nn.Module, batch: Batch) -> dict[str, tuple[str, ...]]:
    """Scales of normalizations into the columns of what reads them; returns normalization -> layers."""
    found: dict[str, tuple[str, ...]] = {}
    for site in discover(model, batch).sites:
        if site.mode != "fold" or not site.producers:
            continue
        if all(isinstance(model.get_submodule(name), NORMS) for name in site.producers):
            smoothing = _own_scales(model, site)
            if smoothing is not None:
                fold(model, site, smoothing)
                found |= {name: tuple(operator.name for operator in site.operators) for name in site.producers}
    return found


def _own_scales(model: nn.Module, site: Site) -> Smoothing | None:
    """The sizes of the producers' gammas as smoothing scales, and their beta as the shift where the biases behind can take it."""
    named = dict(model.named_parameters())
    norms = {f"{name}.weight" for name in site.producers}
    scales = torch.zeros(site.channels)
    edits = [edit for edit in site.edits if edit.parameter in norms and edit.power < 0 and not edit.offset]
    if not edits:
        return None
    for edit in edits:
        gamma = named[edit.parameter].detach().float().abs()
        channel = edit.channel.expand(gamma.shape).reshape(-1)
        inside = channel >= 0
        scales.scatter_reduce_(0, channel[inside], gamma.reshape(-1)[inside], reduce="amax")
    scales = tied_extreme(scales, tie_index(site.ties, site.channels), "amax")
    largest = float(scales.max())
    if largest == 0:
        return None
    return Smoothing(scales=scales.clamp_min(_FLOOR * largest), shift=_own_shift(named, site))


def _own_shift(named: dict[str, nn.Parameter], site: Site) -> Tensor | None:
    if not site.shift_edits or torch.unique(site.ties).numel() != site.channels:
        return None
    shift = torch.zeros(site.channels)
    producers = [edit for edit in site.shift_edits if not edit.weight]
    if len(producers) != 1:  # several betas cannot all become 0 by one shift
        return None
    beta = named[producers[0].parameter].detach().float()
    channel = producers[0].channel.expand(beta.shape).reshape(-1)
    shift[channel[channel >= 0]] = beta.reshape(-1)[channel >= 0]
    return shift
