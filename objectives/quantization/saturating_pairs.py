"""Products of u8 x s8 that are added two by two in 16 bits with saturation, as ``vpmaddubsw`` does: what they lose, to the integer.

x86 processors without 8-bit dot products (VNNI) multiply unsigned activations by signed weights like this; signed activations become
unsigned by adding 128. Pairs are neighbours along the input channels, at one kernel position; the last of an odd number is alone.

    p = u_2i w_2i + u_2i+1 w_2i+1        computed: min(max(p, -32768), 32767)        lost: computed - p, formula fA20

Only pairs of large weights of one sign can leave the 16 bits, so the loss is summed over these alone, on top of an exact product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from alphasmith.objectives.calibration.patches import Window, convolution_call, gather_patches
from alphasmith.objectives.quantization.quantizers import BYTE_MIDDLE

_LOW, _HIGH = -(2**15), 2**15 - 1
_LARGEST = 255  # of an unsigned code
_IN_FLIGHT = 1 << 22  # codes times pairs at a time
_POSITIONS = 1 << 12  # patches of a convolution at a time


class SaturatingPairs:
    """The pairs of one weight that can leave 16 bits.

    Attributes:
        outputs: O.

    Args:
        weight: (O, D) integers in -128..127, any type.
        kernel: Columns of every input channel, which lie side by side: kernel positions of a convolution, 1 for linear.
    """

    def __init__(self, weight: Tensor, kernel: int = 1) -> None:
        self.outputs, columns = weight.shape
        # Channels together at every kernel position, an even number of them: (O, K, C).
        order = torch.arange(columns, device=weight.device).view(-1, kernel).t()
        padded = functional.pad(order, (0, order.shape[1] % 2), value=columns)
        first, second = padded[:, 0::2].flatten(), padded[:, 1::2].flatten()
        wide = functional.pad(weight, (0, 1))  # the column of the padding: zeros
        left, right = wide[:, first], wide[:, second]
        above = left.clamp_min(0).to(torch.int32) + right.clamp_min(0).to(torch.int32)
        below = left.clamp_max(0).to(torch.int32) + right.clamp_max(0).to(torch.int32)
        output, pair = ((above * _LARGEST > _HIGH) | (below * _LARGEST < _LOW)).nonzero(as_tuple=True)
        self._output = output
        self._columns = first[pair], second[pair]
        self._weights = left[output, pair].to(torch.int32), right[output, pair].to(torch.int32)

    def lost(self, codes: Tensor) -> Tensor:
        """What saturation makes of a product, to be added to the exact one.

        Args:
            codes: (T, D) integers in 0..255, any type.

        Returns:
            (T, O) int32.
        """
        rows = codes.shape[0]
        total = torch.zeros(self.outputs, rows, dtype=torch.int32, device=codes.device)
        if not rows or not self._output.numel():
            return total.t()
        # Rows of a transposed matrix are read and added to as a whole; the padding reads zeros.
        columns = functional.pad(codes.to(torch.int32), (0, 1)).t().contiguous()
        peak = columns.amax(dim=1)
        left, right = (peak[c] * w for c, w in zip(self._columns, self._weights, strict=True))
        over = left.clamp_min(0) + right.clamp_min(0) > _HIGH
        under = left.clamp_max(0) + right.clamp_max(0) < _LOW
        for some in (over | under).nonzero().flatten().split(max(1, _IN_FLIGHT // rows)):
            pairs = [
                columns[c[some]].mul_(w[some].unsqueeze(1)) for c, w in zip(self._columns, self._weights, strict=True)
            ]
            exact = pairs[0].add_(pairs[1])
            total.index_add_(0, self._output[some], torch.clamp(exact, _LOW, _HIGH, out=pairs[1]).sub_(exact))
        return total.t()


def pairs_of(codes: Tensor, shape: Sequence[int], groups: int) -> tuple[SaturatingPairs, ...]:
    """The pairs of an operator's weight that can saturate, of every convolution group.

    Args:
        codes: (O, D) integers of the weight as a matrix.
        shape: Of the weight itself: kernel positions come third.
        groups: Of a convolution; 1 for linear.
    """
    kernel = math.prod(shape[2:])
    return tuple(SaturatingPairs(block, kernel) for block in codes.chunk(groups))


class SaturatedCalls(TorchFunctionMode):
    """While active, products of a given weight come out as saturating kernels compute them, whatever module calls for them.

    Gradients are those of the exact product: what is lost counts as a constant.

    Args:
        weight: The dequantized weight to watch for, by identity.
        pairs: Its pairs, of every convolution group.
        scale: Of the output's codes: (O,) step of the weight.
        grid: Gives step and zero point of the codes of the input, broadcastable to it; a zero of None stands for signed codes.
    """

    def __init__(
        self,
        weight: Tensor,
        pairs: tuple[SaturatingPairs, ...],
        scale: Tensor,
        grid: Callable[[], tuple[Tensor, Tensor | None]],
    ) -> None:
        super().__init__()
        self._weight, self._pairs, self._scale, self._grid = weight, pairs, scale, grid

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Add what saturation loses to a product with the watched weight; run any other function unchanged."""
        given = dict(kwargs or {})
        output = func(*args, **given)
        linear = {functional.linear: 1, torch.addmm: 2}.get(func)
        if linear is not None and len(args) > linear and args[linear] is self._weight:
            return output + self._linear(args[linear - 1])
        call = convolution_call(func, args, given)
        if call is not None and call.weight is self._weight:
            batched = call.input.dim() == self._weight.dim()
            lost = self._convolved(call.input if batched else call.input[None], call.window, output.dtype)
            return output + (lost if batched else lost[0])
        return output

    @torch.no_grad()
    def _linear(self, x: Tensor) -> Tensor:
        # One step for all rows, or one for each.
        step, zero = self._grid()
        step = step.reshape(-1, 1) if step.dim() else step
        zero = zero.reshape(-1, 1) if zero is not None and zero.dim() else zero
        rows = x.reshape(-1, x.shape[-1])
        lost = self._pairs[0].lost(_unsigned((rows / step).round_(), zero)).to(x.dtype)
        return (lost * step * self._scale).reshape(*x.shape[:-1], -1)

    @torch.no_grad()
    def _convolved(self, x: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
        step, zero = self._grid()
        # Zeros around the input are codes of 0 like any other, so patches are cut before codes become unsigned.
        codes = (x / step).round_()
        size = window.output_size(x.shape[2:])
        each = math.prod(size)
        blocks = len(self._pairs)
        lost = x.new_empty(x.shape[0] * each, blocks * self._pairs[0].outputs, dtype=torch.int32)
        zeros = None if zero is None else zero.expand(x.shape[0], *[1] * (x.dim() - 1)).flatten()
        for positions in torch.arange(len(lost), device=x.device).split(_POSITIONS):
            patches = gather_patches(codes, window, positions)
            middle = None if zeros is None else zeros[positions.div(each, rounding_mode="floor")].unsqueeze(1)
            columns = _unsigned(patches, middle).chunk(blocks, dim=1)
            found = [pairs.lost(part) for pairs, part in zip(self._pairs, columns, strict=True)]
            lost[positions] = torch.cat(found, dim=1)
        image = lost.view(x.shape[0], *size, -1).movedim(-1, 1).to(dtype)
        return image * step * self._scale.view(-1, *[1] * len(size))


def _unsigned(codes: Tensor, zero: Tensor | None) -> Tensor:
    return codes + (BYTE_MIDDLE if zero is None else zero)
