"""The patches a convolution multiplies with its weight, cut only where they are wanted.

Shapes: x (B, C, *S) with n spatial dimensions, K = prod(kernel), P patches of D = C*K columns ordered as ``weight.flatten(1)`` is,
with the blocks of grouped convolutions one after the other. A forward is the product of patches and weight, so rows of the
patches are to a convolution what rows of X are to a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from alphasmith.objectives.errors import InputError

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_CONVOLUTIONS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _ARGUMENTS),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _TRANSPOSED),
}


@dataclass(frozen=True, kw_only=True)
class Window:
    """Geometry of one convolution, one entry per spatial dimension [positions].

    Attributes:
        kernel: Kernel size.
        stride: Distance between neighbouring patches.
        padding: (before, after) zeros; below 0 where that many are left out.
        dilation: Distance between neighbouring kernel elements.
        spread: Distance between neighbouring inputs: 1, but for transposed convolutions, with zeros between them.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    spread: tuple[int, ...]

    def output_size(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output for an input of spatial size ``spatial``."""
        return tuple(
            ((size - 1) * apart + sum(pad) - gap * (k - 1)) // step + 1
            for size, k, step, pad, gap, apart in zip(
                spatial, self.kernel, self.stride, self.padding, self.dilation, self.spread, strict=True
            )
        )


def conv_window(
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
) -> Window:
    """Geometry from the arguments of ``torch.nn.functional.conv1d`` and its siblings.

    Args:
        kernel: Spatial size of the weight.
        stride, dilation: One number, or one per dimension.
        padding: Likewise, or ``"same"`` or ``"valid"``.

    Raises:
        InputError: ``padding`` is another word.
    """
    n = len(kernel)
    gaps = _spread(dilation, n)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise InputError("padding", f"{padding!r} is unknown", "use 'same', 'valid' or numbers")
        totals = [gap * (k - 1) if padding == "same" else 0 for k, gap in zip(kernel, gaps, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((p, p) for p in _spread(padding, n))
    return Window(kernel=tuple(kernel), stride=_spread(stride, n), padding=pads, dilation=gaps, spread=(1,) * n)


def transposed_window(
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> Window:
    """Geometry from the arguments of ``torch.nn.functional.conv_transpose1d`` and its siblings.

    Args:
        kernel: Spatial size of the weight, whose elements the patches meet in reverse order.
        stride, padding, output_padding, dilation: One number, or one per dimension.
    """
    n = len(kernel)
    gaps, more = _spread(dilation, n), _spread(output_padding, n)
    before = [gap * (k - 1) - p for gap, k, p in zip(gaps, kernel, _spread(padding, n), strict=True)]
    pads = tuple((zeros, zeros + after) for zeros, after in zip(before, more, strict=True))
    return Window(kernel=tuple(kernel), stride=(1,) * n, padding=pads, dilation=gaps, spread=_spread(stride, n))


def pads(window: Window) -> bool:
    """Whether the convolution reads zeros around its input."""
    return any(before or after for before, after in window.padding)


def gather_patches(x: torch.Tensor, window: Window, positions: torch.Tensor) -> torch.Tensor:
    """Patches at chosen output positions.

    Args:
        x: (B, C, *S), what the convolution reads before its zero padding.
        window: Geometry.
        positions: (P,) int64 flat indices into (B, *output_size), last dimension fastest.

    Returns:
        (P, C * K) of x's dtype and device; only the patches asked for are ever made.

    Raises:
        InputError: x has another number of dimensions than the window, or a position is out of range.
    """
    spatial = x.shape[2:]
    if len(spatial) != len(window.kernel):
        raise InputError("x", f"{tuple(x.shape)} does not fit kernel {window.kernel}", "give (batch, channels, ...)")
    out = window.output_size(spatial)
    total = x.shape[0] * math.prod(out)
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < total:
        raise InputError("positions", f"not all in [0, {total})", "give flat indices into (batch, *output size)")
    return _gather(x, window, out, positions.to(x.device))


def _gather(x: torch.Tensor, window: Window, out: tuple[int, ...], positions: torch.Tensor) -> torch.Tensor:
    coordinates: list[torch.Tensor] = []
    rest = positions
    for size in reversed(out):
        coordinates.append(rest % size)
        rest = rest.div(size, rounding_mode="floor")
    coordinates.reverse()
    count = positions.shape[0]
    flat = torch.zeros(count, 1, dtype=torch.int64, device=x.device)
    inside = torch.ones(count, 1, dtype=torch.bool, device=x.device)
    for d, size in enumerate(x.shape[2:]):
        taps = torch.arange(window.kernel[d], device=x.device) * window.dilation[d] - window.padding[d][0]
        index = coordinates[d][:, None] * window.stride[d] + taps
        apart = window.spread[d]
        valid = (index >= 0) & (index < size * apart) & (index % apart == 0)
        index = index.div(apart, rounding_mode="floor")
        flat = (flat[:, :, None] * size + index.clamp(0, size - 1)[:, None, :]).flatten(1)
        inside = (inside[:, :, None] & valid[:, None, :]).flatten(1)
    channels = torch.arange(x.shape[1], device=x.device)
    patches = x.flatten(2)[rest[:, None, None], channels[None, :, None], flat[:, None, :]]
    return patches.masked_fill_(~inside[:, None, :], 0).flatten(1)


def kept_positions(mask: torch.Tensor, window: Window) -> torch.Tensor:
    """Which output positions stand on real input.

    Args:
        mask: (B, *S) bool, True where the input is real.
        window: Geometry.

    Returns:
        (B, *output_size) bool: True where the input position under the middle of the kernel (the nearest one inside) is real.
    """
    for d, size in enumerate(window.output_size(mask.shape[1:])):
        # twice the middle of what the kernel covers, so that it is a whole number
        middle = 2 * torch.arange(size, device=mask.device) * window.stride[d] - 2 * window.padding[d][0]
        middle = middle + window.dilation[d] * (window.kernel[d] - 1)
        apart = window.spread[d]
        middle = (middle if apart == 1 else middle + apart).div(2 * apart, rounding_mode="floor")
        mask = mask.index_select(d + 1, middle.clamp(0, mask.shape[d + 1] - 1))
    return mask


class ConvolutionCall(NamedTuple):
    """What a functional convolution is called with.

    Attributes:
        input: (B, C, *S) or (C, *S).
        weight: Its weight.
        window: Geometry.
    """

    input: torch.Tensor
    weight: torch.Tensor
    window: Window


def convolution_call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ConvolutionCall | None:
    """What a function of torch is called with, if it is a convolution; None: it is another one.

    Args:
        func: The function.
        args, kwargs: Of the call.
    """
    if func not in _CONVOLUTIONS:
        return None
    given = dict(zip(_CONVOLUTIONS[func], args, strict=False)) | dict(kwargs)
    kernel = given["weight"].shape[2:]
    stride, padding, dilation = (given.get(n, d) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1)))
    if _CONVOLUTIONS[func] is _TRANSPOSED:
        window = transposed_window(kernel, stride, padding, given.get("output_padding", 0), dilation)
    else:
        window = conv_window(kernel, stride, padding, dilation)
    return ConvolutionCall(given["input"], given["weight"], window)


class ConvolutionTap(TorchFunctionMode):
    """While active, shows every convolution with one given weight exactly what it reads.

    A module may pad or rearrange its input before it convolves; the functional call is the one place where patches and
    weight meet.

    Args:
        weight: The parameter to watch for, by identity.
        seen: Called with x (B, C, *S) and the window before the convolution runs.
    """

    def __init__(self, weight: torch.Tensor, seen: Callable[[torch.Tensor, Window], None]) -> None:
        super().__init__()
        self._weight = weight
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Report a convolution with the watched weight, then run ``func`` unchanged."""
        kwargs = kwargs or {}
        call = convolution_call(func, args, kwargs)
        if call is not None and call.weight is self._weight:
            self._seen(call.input if call.input.dim() == self._weight.dim() else call.input[None], call.window)
        return func(*args, **kwargs)


def _spread(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values
