"""Layers in factored form, both factors trainable. Source: claim B-5; what they compute is the dense product of their factors.

A convolution has two forms: ``channel`` (a convolution to r channels, then one of kernel 1) and ``spatial`` (a column of the kernel to r
channels, then a row of it). Grouped convolutions keep their groups: every group has factors of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.low_rank.decomposition import Factors, decompose
from alphasmith.objectives.literals import ConvForm

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = TypeVar("Layer", nn.Linear, Convolution)


class FactoredLinear(nn.Module):
    """A linear layer ``y = (x right^T) left^T + bias``.

    Attributes:
        right: (r, I) parameter.
        left: (O, r) parameter.
        bias: (O,) parameter, or None.

    Args:
        factors: Of the weight (O, I).
        bias: That of the layer; taken over, not copied.
    """

    def __init__(self, factors: Factors, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.right = nn.Parameter(factors.right)
        self.left = nn.Parameter(factors.left)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return F.linear(F.linear(x, self.right), self.left, self.bias)

    def dense_layer(self) -> nn.Linear:
        """The linear layer that computes the same up to float rounding; its bias is shared."""
        made = nn.Linear(self.right.shape[1], self.left.shape[0], bias=self.bias is not None, device="meta")
        return _filled(made, (self.left.double() @ self.right.double()).to(self.left.dtype), self.bias)

    def dense_weight(self) -> Tensor:
        """(O, I) product of the factors."""
        return self.left @ self.right

    @property
    def rank(self) -> int:
        """r."""
        return int(self.left.shape[1])

    def take(self, factors: Sequence[Factors]) -> None:
        """Put other factors into the place of these, as new parameters; any rank.

        Args:
            factors: One, of a weight (O, I).
        """
        (one,) = factors
        self.right, self.left = nn.Parameter(one.right), nn.Parameter(one.left)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.right.shape[1]}, {self.left.shape[0]}, rank={self.left.shape[1]}"


class FactoredConv(nn.Module):
    """A convolution in two steps.

    Attributes:
        right: (groups * r, I / groups, kernel) parameter, the first step; kernel (kh, 1) in the spatial form.
        left: (O, r, kernel) parameter, the second; kernel 1, or (1, kw) in the spatial form.
        bias: (O,) parameter, or None.

    Args:
        source: The convolution; its settings are kept and its bias is taken over.
        factors: Of every group's matrix, all of one rank, as :func:`conv_matrices` lays them out.
        form: ``channel``, or ``spatial`` for two axes.
    """

    def __init__(self, source: Convolution, factors: Sequence[Factors], form: ConvForm) -> None:
        super().__init__()
        kernel, groups = tuple(source.kernel_size), source.groups
        axes = len(kernel)
        self.form, self.groups, self.kernel = form, groups, kernel
        self._sizes = source.in_channels // groups, source.out_channels // groups
        self._dilation = tuple(source.dilation)
        if form == "channel":
            self._strides = (tuple(source.stride), (1,) * axes)
            self._dilations = (self._dilation, (1,) * axes)
        else:
            self._strides = ((source.stride[0], 1), (1, source.stride[1]))
            self._dilations = ((self._dilation[0], 1), (1, self._dilation[1]))
        self.take(factors)
        self.bias = source.bias
        self._settings = {
            key: getattr(source, key)
            for key in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        }
        self._mode = "constant" if source.padding_mode == "zeros" else source.padding_mode
        self._pads = _pads(source)
        before, after = self._pads[::2], self._pads[1::2]
        self._paddings: tuple[tuple[int, ...], tuple[int, ...]] = ((0,) * axes, (0,) * axes)
        if self._mode == "constant" and before == after:  # the convolutions pad with zeros themselves, without a copy
            sizes = tuple(reversed(before))
            self._paddings = (sizes, (0,) * axes) if form == "channel" else ((sizes[0], 0), (0, sizes[1]))
            self._pads = []
        self._steps = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]

    @property
    def rank(self) -> int:
        """r of every group."""
        return int(self.left.shape[1])

    def take(self, factors: Sequence[Factors]) -> None:
        """Put other factors into the place of these, as new parameters; any rank.

        Args:
            factors: Of every group's matrix, all of one rank, laid out in the form of the layer.
        """
        rank, kernel = factors[0].rank, self.kernel
        inputs, outputs = self._sizes
        if self.form == "channel":
            right = [one.right.reshape(rank, inputs, *kernel) for one in factors]
            left = [one.left.reshape(outputs, rank, *(1,) * len(kernel)) for one in factors]
        else:
            right = [one.left.reshape(inputs, kernel[0], rank).permute(2, 0, 1).unsqueeze(3) for one in factors]
            left = [one.right.reshape(rank, outputs, kernel[1]).permute(1, 0, 2).unsqueeze(2) for one in factors]
        self.right = nn.Parameter(torch.cat(right).contiguous())
        self.left = nn.Parameter(torch.cat(left).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, ...) -> (B, O, ...), or without B."""
        if any(self._pads):
            x = F.pad(x, self._pads, mode=self._mode)
        first, second = zip(self._strides, self._paddings, self._dilations, strict=True)
        return self._steps(
            self._steps(x, self.right, None, *first, self.groups), self.left, self.bias, *second, self.groups
        )

    def dense_layer(self) -> Convolution:
        """The convolution that computes the same up to float rounding; its bias is shared."""
        weight = self._product(self.left.double(), self.right.double()).to(self.left.dtype)
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.kernel) - 1]
        sizes = weight.shape[1] * self.groups, weight.shape[0]
        made: Convolution = kind(*sizes, **self._settings, bias=self.bias is not None, device="meta")
        return _filled(made, weight, self.bias)

    def dense_weight(self) -> Tensor:
        """(O, I / groups, kernel) product of the factors."""
        return self._product(self.left, self.right)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        right = right.unflatten(0, (self.groups, -1))
        left = left.unflatten(0, (self.groups, -1))
        if self.form == "channel":
            return torch.einsum("gor,gri...->goi...", left.flatten(2), right).flatten(0, 1)
        return torch.einsum("gorx,griy->goiyx", left.squeeze(3), right.squeeze(4)).flatten(0, 1)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.left.shape[0]} outputs, kernel={self.kernel}, rank={self.left.shape[1]}, form={self.form}"


class LowRankProduct(nn.Module):
    """A parametrization: the weight of a layer as a product of its factors, multiplied at every call.

    For layers whose own forward does more than the product. The factors are the parameters that torch keeps of a parametrized weight.

    Attributes:
        groups: Matrices of the weight.
        rank: Of every one.
        form: How they are laid out.

    Args:
        factors: Of every matrix of the weight, all of one rank.
        shape: Of the weight.
        form: How its matrices are laid out.
    """

    def __init__(self, factors: Sequence[Factors], shape: Sequence[int], form: ConvForm) -> None:
        super().__init__()
        self._first: Sequence[Factors] | None = factors
        self.groups, self.rank = len(factors), factors[0].rank
        self._shape, self.form = tuple(shape), form

    def take(self, layer: nn.Module, factors: Sequence[Factors]) -> None:
        """Put other factors into the place of these, as new parameters; any rank.

        The parametrization stays: torch keeps it in a class that all copies of the layer share, and to take it away would break them.

        Args:
            layer: Whose weight this is.
            factors: Of every matrix, all of one rank.
        """
        self.rank = factors[0].rank
        kept: nn.Module = layer.parametrizations["weight"]  # type: ignore[index, assignment]
        for place, tensor in enumerate((*(one.left for one in factors), *(one.right for one in factors))):
            setattr(kept, f"original{place}", nn.Parameter(tensor))

    def forward(self, *factors: Tensor) -> Tensor:
        """All left factors and then all right ones -> the dense weight."""
        lefts, rights = factors[: self.groups], factors[self.groups :]
        return dense_weight([a @ b for a, b in zip(lefts, rights, strict=True)], self._shape, self.form)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The factors of a weight: at first those given, of one assigned later its own at the same rank."""
        found, self._first = self._first, None
        if found is None:
            matrices = conv_matrices(weight, self.groups, self.form)
            found = [decompose(matrix, rank=self.rank, name="weight") for matrix in matrices]
        return (*(one.left for one in found), *(one.right for one in found))


def low_rank_product(module: nn.Module) -> LowRankProduct | None:
    """The parametrization of a layer's weight where it is one of low rank; None for any other layer."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    found = [one for one in module.parametrizations["weight"] if isinstance(one, LowRankProduct)]  # type: ignore[index]
    return found[0] if found else None


def conv_matrices(weight: Tensor, groups: int, form: ConvForm) -> list[Tensor]:
    """A weight as one matrix a group. Source: claim B-5.

    Args:
        weight: (O, I / groups, kernel); without a kernel for a linear layer.
        groups: Groups of the convolution, 1 for a linear layer.
        form: ``channel``: (O / groups, I / groups * kernel). ``spatial``: (I / groups * kh, O / groups * kw).

    Raises:
        InputError: The spatial form of a kernel that has not two axes.
    """
    parts = weight.detach().chunk(groups)
    if form == "channel":
        return [part.flatten(1) for part in parts]
    if weight.dim() != 4:
        raise InputError("svd.form", f"a kernel of {weight.dim() - 2} axes has no spatial form", "use channel")
    return [part.permute(1, 2, 0, 3).flatten(2).flatten(0, 1) for part in parts]


def dense_weight(matrices: Sequence[Tensor], shape: Sequence[int], form: ConvForm) -> Tensor:
    """The inverse of :func:`conv_matrices`.

    Args:
        matrices: One a group.
        shape: (O, I / groups, kernel) of the weight.
        form: How the matrices are laid out.
    """
    if form == "channel":
        return torch.cat(list(matrices)).reshape(tuple(shape))
    outputs, inputs, height, width = shape
    size = (inputs, height, outputs // len(matrices), width)
    return torch.cat([matrix.reshape(size).permute(2, 0, 1, 3) for matrix in matrices])


def _filled(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    """A layer without tensors with these."""
    layer.weight = nn.Parameter(weight.detach())
    if isinstance(bias, nn.Parameter):
        layer.bias = bias
    return layer


def _pads(source: Convolution) -> list[int]:
    """Padding before and after every axis, the last axis first, as ``torch.nn.functional.pad`` takes it."""
    if source.padding == "valid":
        return [0] * (2 * len(source.kernel_size))
    if source.padding == "same":
        totals = [d * (k - 1) for d, k in zip(source.dilation, source.kernel_size, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(int(size), int(size)) for size in source.padding]
    return [size for pair in reversed(pairs) for size in pair]
