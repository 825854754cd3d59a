"""One linear or convolution that computes in the deployed number format.

The module it replaces is kept inside, without its weight: the weight lives here as integers (or fp8) and scales. Operators
the integer product cannot serve run the inner module's own forward on dequantized tensors, so a subclass that pads or
reshapes before it multiplies keeps its behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from alphasmith.objectives.calibration.patches import conv_window, pads
from alphasmith.objectives.calibration.weight_matrix import as_matrix, from_matrix, matrix_shape
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.model.modules import weight_parameter
from alphasmith.objectives.quantization._integer_linear import IntegerLinear
from alphasmith.objectives.quantization.integer_product import MOST_CHANNELS, WeightProducts
from alphasmith.objectives.quantization.quantizers import (
    CodeGrid,
    QuantizedTensor,
    activation_grid,
    dequantize_weight,
    fake_quantize_activation,
    pack_int4,
    quantize_weight,
    row_grid,
    unpack_int4,
)
from alphasmith.objectives.quantization.saturating_pairs import SaturatedCalls, SaturatingPairs, pairs_of
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.types import OperatorKind

Execution = Literal["integer", "simulated"]


@dataclass(frozen=True, eq=False, kw_only=True)
class OperatorPayload:
    """Tensors a quantized operator holds beside those of the module it replaced.

    Attributes:
        weight_values: (O, D) integers or fp8, D = inputs of one output, flattened; int4: (O, ceil(D / 2)) uint8, packed.
        weight_scale: float32, shaped as ``quantize_weight`` returns it.
        input_scale: () float32 for static activations, else None.
        input_zero: () uint8 code that stands for 0, for static uint8 activations, else None.
        smooth: (C,) float32 the input is divided by (explicit sites), or None.
        shift: (C,) subtracted from the input before that, or None. Zeros that a convolution pads with are shifted too.
        correction: (O,) what the float weight makes of the shift, added to the output; or None.
    """

    weight_values: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
    smooth: Tensor | None = None
    shift: Tensor | None = None
    correction: Tensor | None = None


#: Their names.
TENSORS = tuple(field.name for field in fields(OperatorPayload))


@dataclass(frozen=True, eq=False, kw_only=True)
class OperatorTensors:
    """What a quantized operator is made from, in float.

    Attributes:
        weight: The (smoothed) weight to quantize, shaped like the float operator's.
        low: () smallest value of the input after shift and division, over calibration and times the range factor, at most 0; None
            where activations are not static.
        high: () largest value, likewise, at least 0.
        smooth: (C,) the input is divided by (explicit sites), or None.
        shift: (C,) subtracted from the input before that, or None.
        correction: (O,) what the weight makes of the shift, added to the output beside the bias; None without a shift.
    """

    weight: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    smooth: Tensor | None = None
    shift: Tensor | None = None
    correction: Tensor | None = None


class DequantizedWeight(Tensor):
    """A plain tensor that fused kernels refuse.

    Some modules (``nn.TransformerEncoderLayer``) hand the weights of their children to one fused kernel when every weight is
    an ordinary tensor; that would bypass the quantizer and, at explicit sites, the division by s.
    """


class QuantizedOperator(nn.Module):
    """A quantized ``nn.Linear``, transformers ``Conv1D`` or ``nn.Conv1d/2d/3d``, transposed ones among them (or subclass), that replaces the float one.

    Computes ``op(dequantize(quantize((x - shift) / smooth)), dequantize(weight)) + bias + correction``. Where integer
    execution applies (linear forward not overridden, integer activations, integer weights per tensor or channel) the product is
    taken between the integers, exactly, and scaled afterwards, which differs by float rounding only; a zero point of the
    activations is taken out of the integers as ``zero * sum_c weight``. Where the scheme's kernel saturates, so does the product.
    Source: claim A-12, formulas fA4, fA17 and fA20.

    The product runs in float32 (float64 for float64 models) whatever the input's dtype, as integer kernels accumulate,
    and returns the input's dtype. Attributes of the replaced module (``bias``, ``in_features``, ``stride`` ...) are
    still found here; ``weight`` is the dequantized weight. Moving the model moves the payload and never casts it.

    Args:
        inner: The float operator; its ``weight`` parameter is taken away from it.
        payload: The quantized weight, its scales, and what happens to the input.
        scheme: Number formats and granularity.
        kind: ``linear`` or ``conv``.
        transposed: True when ``inner.weight`` is stored (in, out).
        execution: ``integer`` uses integer products where they apply; ``simulated`` never does.
        keep_dense: Keep the dequantized weight between calls (4 more bytes per weight, faster small calls).
        dtype: What to compute in; None: :func:`compute_dtype` of the inner weight.

    Raises:
        InputError: ``inner`` owns no weight parameter, or the tensors do not fit it or the scheme.

    Attributes:
        keep_codes: Keep integer weights in float32 between calls where integer units do not pay (4 more bytes per weight).
    """

    inner: nn.Module
    weight_values: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero: Tensor | None
    smooth: Tensor | None
    shift: Tensor | None
    correction: Tensor | None

    def __init__(
        self,
        inner: nn.Module,
        payload: OperatorPayload,
        *,
        scheme: Scheme,
        kind: OperatorKind,
        transposed: bool,
        execution: Execution = "integer",
        keep_dense: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        weight = weight_parameter(inner)
        super().__init__()
        self.scheme = scheme
        self.kind: OperatorKind = kind
        self.transposed = transposed
        self.execution: Execution = execution
        self.keep_dense = keep_dense
        self._shape = tuple(weight.shape)
        self.weight_numel = weight.numel()
        self._dtype = dtype or compute_dtype(weight.dtype)
        self._dense: Tensor | None = None
        self._linear: IntegerLinear | None = None
        self.keep_codes = False
        self._pairs: tuple[SaturatingPairs, ...] = ()
        self._groups = int(getattr(inner, "groups", 1))
        outputs, inputs = matrix_shape(self._shape, kind, transposed, self._groups)
        self._inputs = inputs
        self._integers = scheme.integer_operands and inputs <= MOST_CHANNELS
        self._channels = int(inputs) if kind == "linear" else int(getattr(inner, "in_channels", weight.shape[1]))
        stored = (outputs, -(-inputs // 2) if scheme.weights == "int4" else inputs)
        found = tuple(payload.weight_values.shape)
        if found != stored:
            raise InputError("weight_values", f"shape {found} is not {stored}", "give the payload of this operator")
        if (payload.input_scale is not None) != scheme.static:
            raise InputError("input_scale", "contradicts the scheme", "give one scale for static activations only")
        if (payload.input_zero is not None) != (scheme.static and scheme.asymmetric):
            raise InputError("input_zero", "contradicts the scheme", "give one code for static uint8 activations only")
        for name, size in (("smooth", self._channels), ("shift", self._channels), ("correction", outputs)):
            vector: Tensor | None = getattr(payload, name)
            if vector is not None and vector.shape != (size,):
                raise InputError(name, f"shape {tuple(vector.shape)} is not ({size},)", "give one per channel")
        device = weight.device if weight.device.type != "meta" else payload.weight_values.device
        del inner.weight
        self.inner = inner.to(self._dtype)
        for name in TENSORS:
            tensor: Tensor | None = getattr(payload, name)
            self.register_buffer(name, None if tensor is None else tensor.detach().to(device))
        self.train(inner.training)
        self.register_load_state_dict_post_hook(_forget_derived)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    @classmethod
    def quantize(
        cls,
        inner: nn.Module,
        tensors: OperatorTensors,
        *,
        scheme: Scheme,
        kind: OperatorKind,
        transposed: bool,
        execution: Execution = "integer",
        keep_dense: bool = False,
    ) -> Self:
        """Quantize a weight and take the place of ``inner``.

        Args:
            inner: The float operator; its own weight is dropped.
            tensors: The weight and what happens to the input.
            scheme: See the class.
            kind: See the class.
            transposed: See the class.
            execution: See the class.
            keep_dense: See the class.

        Raises:
            InputError: As the class; or static activations without ``low`` and ``high``.
            NonFiniteError: The weight or a bound is NaN or infinite.
        """
        return cls(
            inner,
            _payload(tensors, scheme, kind, transposed, int(getattr(inner, "groups", 1))),
            scheme=scheme,
            kind=kind,
            transposed=transposed,
            execution=execution,
            keep_dense=keep_dense,
        )

    def requantize(self, tensors: OperatorTensors) -> None:
        """Take another weight, input range, division and shift in place, as ``quantize`` would.

        Raises:
            InputError: The weight's shape is another one.
            NonFiniteError: See ``quantize``.
        """
        weight = tensors.weight
        if tuple(weight.shape) != self._shape:
            raise InputError(
                "weight", f"shape {tuple(weight.shape)} is not {self._shape}", "give this operator's weight"
            )
        payload = _payload(tensors, self.scheme, self.kind, self.transposed, self._groups)
        for name in TENSORS:
            value: Tensor | None = getattr(payload, name)
            setattr(self, name, None if value is None else value.detach().to(weight.device))
        self._forget()

    def held(self) -> tuple[Tensor | None, ...]:
        """The payload as it is now, and the dequantized weight where one is kept: what :meth:`take` takes back."""
        return (*(getattr(self, name) for name in TENSORS), self._dense)

    def take(self, held: tuple[Tensor | None, ...]) -> None:
        """Become again what :meth:`held` gave."""
        self._forget()
        *payload, self._dense = held
        for name, value in zip(TENSORS, payload, strict=True):
            setattr(self, name, value)

    @property
    def dtype(self) -> torch.dtype:
        """What the operator computes in: float32 or float64."""
        return self._dtype

    @property
    def weight(self) -> DequantizedWeight:
        """Dequantized weight, shaped like the float operator's (float32, or float64 in float64 models)."""
        return self._dequantized().as_subclass(DequantizedWeight)

    def integer_weight(self) -> Tensor:
        """(O, D) int8 (int4 values unpacked) or float8_e4m3fn: the stored weight before its scale."""
        if self.scheme.weights == "int4":
            return unpack_int4(self.weight_values, self._inputs)
        return self.weight_values

    @property
    def uses_integers(self) -> bool:
        """Whether the product is taken between integers; otherwise it runs on dequantized tensors."""
        inner = cast(nn.Module, self._modules["inner"])
        return (
            self._integers
            and self.execution == "integer"
            and type(inner).forward in (nn.Linear.forward, Conv1D.forward)
            and not inner._forward_hooks  # a hook on the inner module expects to see its input and output
            and not inner._forward_pre_hooks
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operator; its first argument, by position or name, is the input.

        (..., C) for linear, (B, C, *space) or (C, *space) for conv. Further arguments go to the replaced forward as they are.
        """
        if len(args) + len(kwargs) == 1 and self.uses_integers:
            return self._integer_forward(args[0] if args else next(iter(kwargs.values())))
        weight, grids = self._dequantized(), list[CodeGrid]()
        bias, quantize = self.corrected(self.correction), partial(self._fake_quantized, grids=grids)
        with self._saturated(weight, grids):
            return self.simulated(args, kwargs, weight=weight, bias=bias, quantize=quantize)

    def simulated(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        weight: Tensor,
        bias: Tensor | None,
        quantize: Callable[[Tensor], Tensor],
    ) -> Any:
        """Run the operator on dequantized tensors of the caller's: what trains an operator lends its own.

        Args:
            args: Of the call, see :meth:`forward`.
            kwargs: Of the call.
            weight: Dequantized, shaped like the float operator's.
            bias: (O,) what is added to the product, see :meth:`corrected`; or None.
            quantize: Makes of the (padded) input what the operator multiplies: smooths and rounds it.
        """
        input, more, named = _arguments(args, kwargs)
        padding = self._zero_padding()
        x = quantize(functional.pad(input.to(self._dtype), padding) if padding else input.to(self._dtype))
        output = self._float_forward(x, more, named, weight, bias, padded=bool(padding))
        return output.to(input.dtype) if isinstance(output, Tensor) else output

    def extra_repr(self) -> str:
        """Scheme and execution, shown by ``print(model)``."""
        explicit = ", explicit" if self.smooth is not None else ""
        shifted = ", shifted" if self.shift is not None else ""
        return f"{self.scheme.name}, {self.execution}{explicit}{shifted}"

    def __getattr__(self, name: str) -> Any:
        """Attributes of the replaced module that models read from their children (``bias``, ``in_features`` ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner" or name in TENSORS:  # these are this module's own, never the inner one's
                raise
            return getattr(super().__getattr__("inner"), name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but keep every dtype: casting a payload or a scale would change the quantized weight."""
        before = dict(self._buffers)
        apply: Callable[..., nn.Module] = super()._apply
        apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        self.inner.to(dtype=self._dtype)
        self._forget()
        return self

    def _forget(self) -> None:
        """Drop what was derived from the payload."""
        self._dense, self._linear, self._pairs = None, None, ()

    def _integer_forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self._channels:  # the reshape below would accept some wrong inputs in silence
            raise InputError("input", f"has {x.shape[-1]} channels", f"give (..., {self._channels})")
        linear = self._linear
        if linear is None:
            linear = self._linear = self._integer_linear()
        rows = x if x.dim() == 2 else x.reshape(-1, self._channels)
        output = linear(rows, self.corrected(self._buffers["correction"]))
        output = output if x.dim() == 2 else output.reshape(*x.shape[:-1], -1)
        return output if output.dtype == x.dtype else output.to(x.dtype)

    def _integer_linear(self) -> IntegerLinear:
        """What :meth:`_integer_forward` runs, made of the payload as it is now."""
        return IntegerLinear(
            WeightProducts(self.integer_weight, largest=255 if self.scheme.asymmetric else 128, keep=self.keep_codes),
            weight_scale=self.weight_scale,
            outputs=self.weight_values.shape[0],
            activations=self.scheme.activations,
            grid=self._static_grid(),
            dtype=self._dtype,
            smoothed=None if self.shift is None and self.smooth is None else self.smoothed,
            lost=self._saturating()[0].lost if self.scheme.saturates else None,
        )

    def corrected(self, correction: Tensor | None) -> Tensor | None:
        """(O,) what is added to the product: the bias, the correction, or both; None where there is neither.

        Args:
            correction: (O,) what the weight makes of the shift, or None.
        """
        bias = cast(nn.Module, self._modules["inner"])._parameters.get("bias")
        if bias is None:
            return correction
        return bias if correction is None else bias + correction

    def smoothed(self, x: Tensor) -> Tensor:
        """An input, shifted and divided by the smoothing scales where this operator does that itself.

        Args:
            x: (..., C) for linear, (B, C, *space) or (C, *space) for conv.
        """
        shift, smooth = self.channelwise(self.shift), self.channelwise(self.smooth)
        if shift is not None:
            x = x - shift
        return x if smooth is None else x / smooth

    def channelwise(self, vector: Tensor | None) -> Tensor | None:
        """A vector (C,), or None, as it meets the channels of an input.

        Args:
            vector: One number a channel, or None.
        """
        if vector is None or self.kind == "linear":
            return vector
        return vector.reshape(-1, *[1] * (len(self._shape) - 2))

    def _saturating(self) -> tuple[SaturatingPairs, ...]:
        """The pairs of the weight that can saturate, of every convolution group."""
        if not self._pairs:
            self._pairs = pairs_of(self.integer_weight(), self._shape, self._groups)
        return self._pairs

    def _saturated(self, weight: Tensor, grids: list[CodeGrid]) -> AbstractContextManager[object]:
        """Within it, products with the dequantized ``weight`` saturate if the scheme says so; ``grids`` has that of the input last."""
        if not self.scheme.saturates:
            return nullcontext()
        return SaturatedCalls(weight, self._saturating(), self.weight_scale.reshape(-1), lambda: grids[-1])

    def _fake_quantized(self, x: Tensor, grids: list[CodeGrid]) -> Tensor:
        """An input as its codes stand for, after smoothing; their grid is appended to ``grids``."""
        x = self.smoothed(x)
        if self.scheme.activations == "none":
            return x
        grids.append(self._grid_of(x))
        scale, zero = grids[-1]
        return fake_quantize_activation(x, scale, self.scheme.activations, zero).to(self._dtype)

    def _float_forward(
        self,
        x: Tensor,
        more: Sequence[Any],
        kwargs: Mapping[str, Any],
        weight: Tensor,
        bias: Tensor | None,
        *,
        padded: bool,
    ) -> Any:
        """The inner module's own forward, lent the weight, the corrected bias and, if x is padded, no padding."""
        inner = self.inner
        own = vars(inner)
        padding = own["padding"] if padded else None
        own["weight"] = weight  # the forward of any subclass finds it there
        try:
            if bias is not None:
                own["bias"] = bias  # found before the parameter, which stays
            if padded:
                own["padding"] = (0,) * (len(self._shape) - 2)
            return inner(x, *more, **kwargs)
        finally:
            del own["weight"]
            if bias is not None:
                del own["bias"]
            if padded:
                own["padding"] = padding

    def _zero_padding(self) -> list[int]:
        """Zeros to put around the input before it is shifted, as ``functional.pad`` takes them; [] when there are none.

        A padded zero is an input value like any other: the exact correction ``W z`` counts on every one being shifted.
        """
        inner = self.inner
        if self.shift is None or not isinstance(inner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return []
        if inner.padding_mode != "zeros":  # the inner module then pads with values of the input, which are shifted
            return []
        window = conv_window(self._shape[2:], inner.stride, inner.padding, inner.dilation)
        return [count for pair in reversed(window.padding) for count in pair] if pads(window) else []

    def _dequantized(self) -> Tensor:
        if self._dense is not None:
            return self._dense
        quantized = QuantizedTensor(self.integer_weight(), self.weight_scale)
        flat = dequantize_weight(quantized, self.scheme).to(self._dtype)
        dense = from_matrix(flat, self._shape, self.kind, self.transposed, self._groups)
        if self.keep_dense:
            self._dense = dense
        return dense

    def _grid_of(self, x: Tensor) -> CodeGrid:
        """Activation scale and zero point: the calibrated ones, or those of every row (linear) or sample (conv) of a smoothed input."""
        return self._static_grid() or row_grid(x, self.scaled_dims(x), self.scheme.activations)

    def _static_grid(self) -> CodeGrid | None:
        if self.input_scale is None:
            return None
        return CodeGrid(self.input_scale, None if self.input_zero is None else self.input_zero.to(torch.float32))

    def scaled_dims(self, x: Tensor) -> tuple[int, ...]:
        """Dimensions of an input that share one scale where activations get theirs at run time: those of a row, or of a sample.

        Args:
            x: (..., C) for linear, (B, C, *space) or (C, *space) for conv.
        """
        if self.kind == "linear":
            return (-1,)
        unbatched = x.dim() == len(self._shape) - 1
        return tuple(range(x.dim()))[0 if unbatched else 1 :]

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight shaped like the float operator's as the matrix (O, D) that is quantized.

        Args:
            weight: Shaped like the float operator's.
        """
        return as_matrix(weight, self.kind, self.transposed, self._groups)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`.

        Args:
            matrix: (O, D).
        """
        return from_matrix(matrix, self._shape, self.kind, self.transposed, self._groups)


def _forget_derived(operator: nn.Module, _keys: object) -> None:
    """A payload that was loaded in place is another one."""
    cast(QuantizedOperator, operator)._forget()


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, list[Any], dict[str, Any]]:
    """The input of a call and its further arguments; every forward served here names its input first."""
    if not args:  # models do call operators by keyword
        (_, input), *rest = kwargs.items()
        return input, [], dict(rest)
    return args[0], list(args[1:]), dict(kwargs)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a quantized operator of a model in ``dtype`` computes in: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _payload(
    tensors: OperatorTensors, scheme: Scheme, kind: OperatorKind, transposed: bool, groups: int
) -> OperatorPayload:
    """The quantized weight, with a static activation scale and zero point if the scheme has them."""
    weight = tensors.weight.detach()
    # Contiguous, as it comes back from a file: memory order decides the order of additions, hence the last bits.
    flat = as_matrix(weight, kind, transposed, groups).contiguous()
    quantized = quantize_weight(flat, scheme)
    values = pack_int4(quantized.values) if scheme.weights == "int4" else quantized.values
    scale = zero = None
    if scheme.static:
        if tensors.low is None or tensors.high is None:
            raise InputError(
                "low, high", "are missing for static activations", "calibrate this site, or use granularity 'token'"
            )
        low, high = (edge.detach().to(weight.device) for edge in (tensors.low, tensors.high))
        scale, zero = activation_grid(low, high, scheme.activations)
    return OperatorPayload(
        weight_values=values,
        weight_scale=quantized.scale,
        input_scale=scale,
        input_zero=None if zero is None else zero.to(torch.uint8),
        smooth=tensors.smooth,
        shift=tensors.shift,
        correction=tensors.correction,
    )
