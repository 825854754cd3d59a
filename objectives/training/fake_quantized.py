"""A compressed model in float whose weights and activations are rounded in every forward pass, so that it can be trained.

Every integer operator becomes one with a float weight that rounds to the very codes it had. What it computes is what the
integer model computes, saturating products among it (formula fA20); gradients pass the rounding (formula fA12). Smoothing scales and shifts stay where the run put them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.model.modules import replace_module
from alphasmith.objectives.model.private_copy import private_copy
from alphasmith.objectives.quantization.operator import DequantizedWeight, QuantizedOperator
from alphasmith.objectives.quantization.quantizers import CodeGrid, pack_int4, row_grid
from alphasmith.objectives.quantization.saturating_pairs import SaturatedCalls, SaturatingPairs, pairs_of
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.stack import QuantizedStack, Stack
from alphasmith.objectives.training._rounding import rounded, rounded_by_row

#: Norms that keep a running mean and variance.
_WITH_STATISTICS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


class FakeQuantized(nn.Module):
    """A compressed model as one that can be trained; called as the model is, it returns what the model returns.

    Before the first step it agrees with the integer model within float rounding; :meth:`integers` gives the integer model back, with
    exactly the codes and scales that the forward pass rounds to. Source: claim A-13, formulas fA12 and fA13.

    Args:
        model: A model with quantized operators, as ``load_quantized`` gives it; copied.
        learn_steps: Learn the step sizes of weights; else they stay.
        learn_ranges: Learn static ranges of activations; else they stay.
        freeze_norm_statistics: Keep mean and variance of batch norms as they are.

    Raises:
        InputError: The model has no quantized operator.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learn_steps: bool = True,
        learn_ranges: bool = True,
        freeze_norm_statistics: bool = True,
    ) -> None:
        super().__init__()
        twin = private_copy(model)
        self._frozen = freeze_norm_statistics
        found = [m for m in twin.modules() if isinstance(m, (QuantizedOperator, QuantizedStack))]
        if not found:
            raise InputError("model", "has no quantized operator", "give the quantized model of a run")
        for module in found:
            trained = (
                _TrainedOperator(module, learn_steps=learn_steps, learn_ranges=learn_ranges)
                if isinstance(module, QuantizedOperator)
                else _TrainedStack(module, learn_steps=learn_steps)
            )
            if module is twin:
                twin = trained
            else:
                replace_module(twin, module, trained)
        self.model = twin
        # Found once: a walk over all modules in every step is felt in small models.
        self._trained = [m for m in twin.modules() if isinstance(m, (_TrainedOperator, _TrainedStack))]
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns; every weight is rounded once, however often it is used."""
        with self._weights_held():
            return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; norms with frozen statistics stay in evaluation mode.

        Args:
            mode: Whether to train.
        """
        super().train(mode)
        if mode and self._frozen:
            for module in self.model.modules():
                if isinstance(module, _WITH_STATISTICS) and module.track_running_stats:
                    module.eval()
        return self

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """Parameters by how they are trained: weights, which may decay; vectors, which may not; logarithms of step sizes."""
        steps = [p for m in self._trained for p in m.logarithms()]
        known = {id(p) for p in steps}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        return [p for p in others if p.dim() > 1], [p for p in others if p.dim() <= 1], steps

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name; shared, not copied."""
        found = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
        for name, module in self.named_modules():
            if isinstance(module, _WITH_STATISTICS) and not self._frozen:
                found |= {f"{name}.{leaf}": buffer for leaf, buffer in module.named_buffers(recurse=False)}
        return found

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Become again what :meth:`state` gave.

        Args:
            state: Tensors under the same names, or copies of them.

        Raises:
            InputError: Its names or shapes are those of another model.
        """
        own = self.state()
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in state.items()}:
            raise InputError("checkpoint", "belongs to another model", "delete it, or give the model it was made with")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def integers(self) -> nn.Module:
        """The integer model as it is trained now, in evaluation mode; it shares no memory with this one.

        Raises:
            NonFiniteError: A parameter is NaN or infinite.
        """
        for name, parameter in self.model.named_parameters():
            if parameter.is_floating_point() and not bool(torch.isfinite(parameter.float()).all()):
                raise NonFiniteError(f"{name} is NaN or infinite after training")
        model = copy.deepcopy(self.model)
        for module in [m for m in model.modules() if isinstance(m, (_TrainedOperator, _TrainedStack))]:
            integer = module.integer()
            if module is model:
                model = integer
            else:
                replace_module(model, module, integer)
        return model.eval().requires_grad_(False)

    @contextmanager
    def _weights_held(self) -> Iterator[None]:
        for module in self._trained:
            module.hold()
        try:
            yield
        finally:
            for module in self._trained:
                module.release()


class _Step(nn.Module):
    """Positive scales as ``start * exp(logarithm)``: exactly ``start`` before the first step, and never 0 or below."""

    start: Tensor

    def __init__(self, start: Tensor, *, learned: bool) -> None:
        super().__init__()
        self._kept: Tensor | None = None
        self.register_buffer("start", start.detach().clone())
        self.logarithm = nn.Parameter(torch.zeros_like(self.start)) if learned else None

    def forward(self) -> Tensor:
        """The scales."""
        if self.logarithm is None:
            return self.start
        return self.start * self.logarithm.exp() if self._kept is None else self._kept

    def hold(self) -> None:
        """Compute them once from now on: a recurrent layer asks for them at every position."""
        self.release()
        self._kept = self()

    def release(self) -> None:
        """Forget them."""
        self._kept = None


class _Held(nn.Module):
    """Keeps what it computes from its parameters from :meth:`hold` to :meth:`release`."""

    def __init__(self) -> None:
        super().__init__()
        self._holding = False
        self._kept: Tensor | None = None

    def hold(self) -> None:
        """Compute steps, range and the rounded weight once from now on."""
        self._holding, self._kept = True, None
        for step in self._steps():
            step.hold()

    def release(self) -> None:
        """Forget them."""
        self._holding, self._kept = False, None
        for step in self._steps():
            step.release()

    def rounded_weight(self) -> Tensor:
        """Codes times scales, shaped like the float weight."""
        if self._kept is not None:
            return self._kept
        weight = self._rounded()
        if self._holding:
            self._kept = weight
        return weight

    def logarithms(self) -> list[nn.Parameter]:
        """Parameters that are logarithms of step sizes."""
        return [step.logarithm for step in self._steps() if step.logarithm is not None]

    def _steps(self) -> list[_Step]:
        return [module for module in self.children() if isinstance(module, _Step)]

    def _rounded(self) -> Tensor:
        raise NotImplementedError


class _TrainedOperator(_Held):
    """A quantized operator with a float weight.

    Args:
        source: The integer operator, whose bias is trained, too.
        learn_steps: Learn the steps of the weight.
        learn_ranges: Learn the range of the input.
    """

    def __init__(self, source: QuantizedOperator, *, learn_steps: bool, learn_ranges: bool) -> None:
        super().__init__()
        self.source = source
        self.step = _Step(source.weight_scale, learned=learn_steps)
        # Not called weight: fused kernels would take a parameter of this name for what the operator multiplies with.
        self.master = nn.Parameter(source.weight.as_subclass(Tensor).detach().clone())
        scale = source.input_scale
        self.range = None if scale is None else _Step(scale, learned=learn_ranges)
        correction = source.correction
        # Beside a bias it would be a second one, so it is trained only where there is none.
        lonely = correction is not None and source.inner._parameters.get("bias") is None
        self.correction = nn.Parameter(correction.clone()) if correction is not None and lonely else None
        self._lent: tuple[Tensor | None, Callable[[Tensor], Tensor]] | None = None
        self._pairs: tuple[SaturatingPairs, ...] = ()

    def hold(self) -> None:
        """Also what is added to the product, what rounds the input, and which pairs of the weight can saturate."""
        super().hold()
        self._pairs = ()
        self._lent = self._bias(), self._quantizer()

    def release(self) -> None:
        """Also what is added to the product, what rounds the input, and which pairs of the weight can saturate."""
        super().release()
        self._lent, self._pairs = None, ()

    @property
    def weight(self) -> DequantizedWeight:
        """The rounded weight, shaped like the float operator's."""
        return self.rounded_weight().as_subclass(DequantizedWeight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operator, see ``QuantizedOperator``."""
        bias, quantize = (self._bias(), self._quantizer()) if self._lent is None else self._lent
        weight = self.rounded_weight()
        if not self.source.scheme.saturates:
            return self.source.simulated(args, kwargs, weight=weight, bias=bias, quantize=quantize)
        grids = list[CodeGrid]()

        def watched(x: Tensor) -> Tensor:
            grids.append(self._grid(x))
            return quantize(x)

        with SaturatedCalls(weight, self._saturating(weight), self.step().detach().reshape(-1), lambda: grids[-1]):
            return self.source.simulated(args, kwargs, weight=weight, bias=bias, quantize=watched)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the replaced module that models read from their children."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("source", "master", "correction", "range", "step"):
                raise
            return getattr(super().__getattr__("source"), name)

    def integer(self) -> QuantizedOperator:
        """The integer operator, with the codes that the weight rounds to."""
        source = self.source
        with torch.no_grad():
            scale = self.step()
            codes = _codes(source.matrix(self.rounded_weight()), scale, source.scheme)
            values = pack_int4(codes) if source.scheme.weights == "int4" else codes
            range_scale = None if self.range is None else self.range()
            correction = source.correction if self.correction is None else self.correction.detach()
            zero = source.input_zero
            source.take((values, scale.clone(), range_scale, zero, source.smooth, source.shift, correction, None))
        return source

    def _quantizer(self) -> Callable[[Tensor], Tensor]:
        """What smooths and rounds the input."""
        source = self.source
        fmt = source.scheme.activations
        if fmt == "none":
            return source.smoothed
        if self.range is None:
            return self._by_row
        shift, smooth = source.channelwise(source.shift), source.channelwise(source.smooth)
        given = {"scale": self.range(), "fmt": fmt, "zero": source.input_zero, "shift": shift, "smooth": smooth}
        return partial(rounded, **given)

    @torch.no_grad()
    def _saturating(self, weight: Tensor) -> tuple[SaturatingPairs, ...]:
        """Pairs of the codes of a rounded weight."""
        if self._pairs:
            return self._pairs
        source = self.source
        codes = _codes(source.matrix(weight), self.step(), source.scheme)
        found = pairs_of(codes, weight.shape, int(getattr(source.inner, "groups", 1)))
        if self._holding:
            self._pairs = found
        return found

    @torch.no_grad()
    def _grid(self, x: Tensor) -> CodeGrid:
        """Step and zero point of the codes of an input before it is smoothed."""
        source = self.source
        if self.range is None:
            x = source.smoothed(x).to(torch.float32)
            return row_grid(x, source.scaled_dims(x), source.scheme.activations)
        zero = source.input_zero
        return CodeGrid(self.range(), None if zero is None else zero.to(torch.float32))

    def _by_row(self, x: Tensor) -> Tensor:
        x = self.source.smoothed(x)
        fmt = self.source.scheme.activations
        return rounded_by_row(x.to(torch.float32), self.source.scaled_dims(x), fmt).to(x.dtype)

    def _bias(self) -> Tensor | None:
        return self.source.corrected(self.source.correction if self.correction is None else self.correction)

    def _rounded(self) -> Tensor:
        flat = _rounded_matrix(self.source.matrix(self.master).to(torch.float32), self.step(), self.source.scheme)
        return self.source.from_matrix(flat.to(self.master.dtype))


class _TrainedStack(Stack, _Held):
    """Quantized matrices in one tensor, in float.

    Args:
        source: The quantized ones.
        learn_steps: Learn their steps.
    """

    def __init__(self, source: QuantizedStack, *, learn_steps: bool) -> None:
        _Held.__init__(self)
        self.source = source
        self.step = _Step(source.weight_scale, learned=learn_steps)
        self.master = nn.Parameter(source.dense().clone())

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.master.dtype

    def dense(self) -> Tensor:
        """All rounded matrices."""
        return self.rounded_weight()

    def integer(self) -> QuantizedStack:
        """The quantized matrices, with the codes that these round to."""
        source = self.source
        with torch.no_grad():
            scales = self.step().clone()
            matrices = self._matrices(self.rounded_weight())
            codes = [_codes(m, s, source.scheme) for m, s in zip(matrices, scales, strict=True)]
            values = torch.stack([pack_int4(c) if source.scheme.weights == "int4" else c for c in codes])
            source.take((values, scales))
        return source

    def _rounded(self) -> Tensor:
        pairs = zip(self._matrices(self.master), self.step(), strict=True)
        made = [_rounded_matrix(m.to(torch.float32), s, self.source.scheme).to(self.master.dtype) for m, s in pairs]
        return torch.stack([m.t() for m in made] if self.source.transposed else made)

    def _matrices(self, weight: Tensor) -> list[Tensor]:
        return [m.t() if self.source.transposed else m for m in weight]


def _rounded_matrix(matrix: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """A matrix (O, D) as its codes stand for, with gradients to it and to its scales, shaped as ``quantize_weight`` has them."""
    if scheme.weight_granularity != "group":
        return rounded(matrix, scale, scheme.weights)
    rows, columns = matrix.shape
    size, groups = columns if scheme.group_size is None else scheme.group_size, scale.shape[1]
    blocks = functional.pad(matrix, (0, groups * size - columns)).reshape(rows, groups, size)
    return rounded(blocks, scale[:, :, None], scheme.weights).reshape(rows, groups * size)[:, :columns]


def _codes(matrix: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Codes (O, D) of a matrix that consists of codes times scales."""
    if scheme.weight_granularity == "group":
        scale = scale.repeat_interleave(scheme.group_size or matrix.shape[1], dim=1)[:, : matrix.shape[1]]
    # Exact: a product of code and scale, divided by the scale, is nearer to the code than to any other.
    codes = matrix.to(torch.float32) / scale
    return codes.to(torch.float8_e4m3fn) if scheme.weights == "fp8" else codes.round().to(torch.int8)
