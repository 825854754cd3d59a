"""Linear layers and convolutions that run as branch and residual. Source: formula fB11.

Their stored tensors are buffers, so a ``state_dict`` holds what an artifact does; what is multiplied is made of them once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphasmith.objectives.calibration.patches import conv_window
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.branch.rows import CONVOLUTIONS
from alphasmith.objectives.joint.branch.stored import BranchEntry, BranchParts, checked_entry, restore_branch
from alphasmith.objectives.quantization.integer_product import integer_product
from alphasmith.objectives.quantization.quantizers import code_scale, round_codes_

_CONVOLVE: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


class BranchModule(nn.Module):
    """What both kinds of layer share: stored tensors as buffers, which move with the model and are never cast.

    Args:
        entry: As it was stored.
        tensors: As they were stored; taken over, not copied.
        bias: That of the layer, or None; taken over.
        name: What to call the layer in errors.

    Attributes:
        entry: As given.
        bias: As given.

    Raises:
        InputError: What is stored is corrupt.
    """

    def __init__(
        self,
        entry: Mapping[str, Any] | BranchEntry,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        name: str,
    ) -> None:
        super().__init__()
        self.entry = checked_entry(name, entry)
        self._made: tuple[tuple[object, ...], BranchParts] | None = None
        self._name = name
        for key in sorted(tensors):
            self.register_buffer(key, tensors[key].detach())
        self._names = tuple(sorted(tensors))
        self.bias = bias
        self.parts()

    def tensors(self) -> dict[str, Tensor]:
        """What is stored of the weight."""
        return {name: self.get_buffer(name) for name in self._names}

    def parts(self) -> BranchParts:
        """Branch and residual as they are multiplied; made anew where a stored tensor has changed."""
        stored = self.tensors()
        key = tuple((id(tensor), tensor._version) for tensor in stored.values())
        if self._made is None or self._made[0] != key:
            device = next(iter(stored.values())).device
            made = restore_branch(self._name, self.entry, {name: tensor.cpu() for name, tensor in stored.items()})
            moved = {
                field: value.to(device) if isinstance(value, Tensor) else value for field, value in vars(made).items()
            }
            self._made = key, BranchParts(**moved)
        return self._made[1]

    def dense_weight(self) -> Tensor:
        """(O, C, kernel) float32 that stands for the float weight, where the input is not quantized."""
        parts = self.parts()
        whole = parts.smoothed_weight().reshape(self.entry.shape)
        if parts.smooth is None:
            return whole
        return whole / parts.smooth.reshape(-1, *(1,) * (whole.dim() - 2))

    def extra_repr(self) -> str:
        """Shape and form."""
        entry = self.entry
        inputs = "float" if entry.activation_bits is None else f"int{entry.activation_bits}"
        return (
            f"{entry.shape}, rank={entry.rank} in {entry.branch_bits} bits, {entry.residual} residual of {inputs} input"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but keep every dtype: casting codes or scales would change the weight."""
        before = dict(self._buffers)
        apply: Callable[..., nn.Module] = super()._apply
        apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        self._made = None
        return self


class BranchLinear(BranchModule):
    """A linear layer ``y = (x / s) L^T + Q(x / s) Q(R)^T + bias``, computed in float32 around an exact integer product where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., O) in the type of x."""
        rows = x.reshape(-1, x.shape[-1])
        y = branch_product(self.entry, self.parts(), rows)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1]).to(x.dtype)


class BranchConv(BranchModule):
    """A convolution of one group in the same form: a convolution to r channels, one of kernel 1, and one with the residual.

    Args:
        entry: As it was stored.
        tensors: As they were stored.
        source: The convolution; its geometry is kept and its bias is taken over.
        name: What to call it in errors.
    """

    def __init__(
        self, entry: Mapping[str, Any] | BranchEntry, tensors: Mapping[str, Tensor], source: nn.Module, name: str
    ) -> None:
        if not isinstance(source, CONVOLUTIONS) or source.groups != 1:
            raise InputError(name, "is no convolution of one group", "leave it out")
        super().__init__(entry, tensors, source.bias, name)
        window = conv_window(source.kernel_size, source.stride, source.padding, source.dilation)
        self._pads = [count for pair in reversed(window.padding) for count in pair]
        self._mode = "constant" if source.padding_mode == "zeros" else source.padding_mode
        self._stride, self._dilation = window.stride, window.dilation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, O, ...), or without B, in the type of x."""
        entry, parts = self.entry, self.parts()
        axes = len(entry.shape) - 2
        convolve, ones = _CONVOLVE[axes - 1], (1,) * axes
        inner = x.to(torch.float32)
        if parts.smooth is not None:
            inner = inner / parts.smooth.reshape(-1, *ones)
        rounded = inner
        if entry.activation_bits is not None:
            scale = parts.input_scale
            if scale is None:
                batched = x.dim() == axes + 2
                peaks = inner.abs().amax(tuple(range(int(batched), x.dim())), keepdim=True)
                scale = code_scale(peaks, _format(entry.activation_bits))
            rounded = _codes(inner, scale, entry.activation_bits) * scale
        if any(self._pads):
            rounded = F.pad(rounded, self._pads, mode=self._mode)
        residual = parts.residual.reshape(entry.shape)
        bias = None if self.bias is None else self.bias.to(torch.float32)
        y = convolve(rounded, residual, bias, self._stride, 0, self._dilation)
        if parts.left is not None and parts.right is not None:
            if any(self._pads):
                inner = F.pad(inner, self._pads, mode=self._mode)
            right = parts.right.reshape(-1, *entry.shape[1:])
            y = y + convolve(
                convolve(inner, right, None, self._stride, 0, self._dilation),
                parts.left.reshape(*parts.left.shape, *ones),
            )
        return y.to(x.dtype)


def branch_product(entry: BranchEntry, parts: BranchParts, rows: Tensor, *, peaks: Tensor | None = None) -> Tensor:
    """(T, O) float32 of rows (T, D), without a bias. Source: formula fB11.

    Args:
        entry: Of the weight.
        parts: Its branch and residual.
        rows: Any floating type.
        peaks: (T, 1) range of every row's input, where it is not the row's own.

    Raises:
        InputError: Rows have another number of columns than the weight.
        NonFiniteError: A row to be quantized holds NaN or infinity.
    """
    if rows.shape[-1] != entry.matrix_shape[1]:
        raise InputError("input", f"has {rows.shape[-1]} columns", f"give (..., {entry.matrix_shape[1]})")
    x = rows.to(torch.float32)
    if parts.smooth is not None:
        x = x / parts.smooth.repeat_interleave(x.shape[1] // parts.smooth.shape[0])
    bits = entry.activation_bits
    if bits is None:
        y = F.linear(x, parts.residual)
    else:
        scale = parts.input_scale
        if scale is None:
            scale = code_scale(x.abs().amax(1, keepdim=True) if peaks is None else peaks, _format(bits))
        codes = _codes(x, scale, bits)
        if parts.codes is not None and parts.step is not None:
            y = integer_product(codes.to(torch.int8), parts.codes).to(torch.float32) * scale * parts.step
        else:
            y = F.linear(codes * scale, parts.residual)
    if parts.left is not None and parts.right is not None:
        y = y + F.linear(F.linear(x, parts.right), parts.left)
    return y


def branch_module(
    layer: nn.Module, entry: Mapping[str, Any] | BranchEntry, tensors: Mapping[str, Tensor], *, name: str
) -> BranchModule:
    """The layer that takes the place of a float one.

    Args:
        layer: ``nn.Linear`` or a convolution of one group; its bias is taken over, of its weight only shape and device are read.
        entry: As it was stored.
        tensors: As they were stored.
        name: What to call it in errors.

    Raises:
        InputError: What is stored is corrupt or belongs to a layer of another kind or shape.
    """
    known = checked_entry(name, entry)
    shape = tuple(getattr(layer, "weight", torch.empty(0)).shape)
    if shape != known.shape:
        raise InputError(name, f"is stored for shape {known.shape}, the layer has {shape}", "give the same model")
    made: BranchModule
    if isinstance(layer, nn.Linear):
        made = BranchLinear(known, tensors, layer.bias, name)
    else:
        made = BranchConv(known, tensors, layer, name)
    device = layer.get_parameter("weight").device
    return (made if device.type == "meta" else made.to(device)).train(layer.training)


def _format(bits: int) -> Any:
    """The number format of an activation of so many bits."""
    return "int4" if bits == 4 else "int8"


def _codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integers in float32."""
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("an input that is to be quantized holds NaN or infinity")
    return round_codes_(x / scale, _format(bits))
