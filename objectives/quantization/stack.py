"""Several matrices in one tensor, such as the experts of a mixture, kept quantized and handed out one by one as they are used.

Models read such a tensor in functional calls: they take a matrix out of it and multiply with that, or multiply with all at
once. Something that answers like the tensor takes its place; its inputs are not seen, so only the weights are quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from alphasmith.objectives.quantization.quantizers import (
    QuantizedTensor,
    dequantize_weight,
    pack_int4,
    quantize_weight,
    unpack_int4,
)
from alphasmith.objectives.quantization.scheme import Scheme


class Stack(nn.Module):
    """A float tensor of matrices (E, ., .) as a module that answers like the tensor.

    Args:
        weight: The tensor; shared, not copied.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("held", weight.detach())

    def dense(self) -> Tensor:
        """The tensor."""
        return torch.as_tensor(self.held)

    def matrix(self, index: int) -> Tensor:
        """One of its matrices."""
        return self.dense()[index]

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.dense().shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.dense().dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.buffers()).device

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The tensor, moved or cast."""
        return self.dense().to(*args, **kwargs)

    def __len__(self) -> int:
        """Number of matrices."""
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        """Every matrix."""
        return (self.matrix(index) for index in range(len(self)))

    def __getitem__(self, index: Any) -> Tensor:
        """What the tensor gives; a single matrix is made alone."""
        single = isinstance(index, int) or (
            isinstance(index, Tensor) and index.dim() == 0 and index.dtype == torch.int64
        )
        return self.matrix(int(index)) if single else self.dense()[index]

    def __matmul__(self, other: Any) -> Any:
        """The product with every matrix."""
        return self.dense() @ other

    def __mul__(self, other: Any) -> Any:
        """The tensor times something."""
        return self.dense() * other

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run any of torch's functions with the tensor in the place of what stands for it."""
        found = tree_map(lambda value: value.dense() if isinstance(value, Stack) else value, (args, dict(kwargs or {})))
        return func(*found[0], **found[1])

    def __getattr__(self, name: str) -> Any:
        """Methods and attributes of the tensor that no module has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A tensor's special names are not this module's: by its ``__deepcopy__`` a copy would be a plain tensor.
            if name in ("held", *TENSORS) or name.startswith("__") or not hasattr(Tensor, name):
                raise
            return getattr(self.dense(), name)


#: Tensors that a quantized stack stores.
TENSORS = ("weight_values", "weight_scale")


class QuantizedStack(Stack):
    """Matrices (E, ., .) of which every one is quantized by itself, as the weight of an operator is.

    Args:
        values: (E, O, D) codes; int4: (E, O, ceil(D / 2)), packed.
        scale: (E, ...) the scales of every matrix.
        shape: Of the float tensor.
        scheme: Number format and granularity of its weights.
        transposed: The matrices are stored (in, out).
        dtype: Of the float tensor.
    """

    weight_values: Tensor
    weight_scale: Tensor
    input_scale = input_zero = smooth = shift = correction = None

    def __init__(
        self,
        values: Tensor,
        scale: Tensor,
        *,
        shape: Sequence[int],
        scheme: Scheme,
        transposed: bool,
        dtype: torch.dtype,
    ) -> None:
        nn.Module.__init__(self)
        self.scheme = scheme
        self.transposed = transposed
        self._shape = torch.Size(shape)
        self._dtype = dtype
        self.register_buffer("weight_values", values)
        self.register_buffer("weight_scale", scale)

    @classmethod
    def quantize(cls, weight: Tensor, *, scheme: Scheme, transposed: bool) -> Self:
        """Quantize every matrix of a tensor.

        Args:
            weight: (E, O, D), or (E, D, O) when ``transposed``.
            scheme: See the class.
            transposed: See the class.

        Raises:
            NonFiniteError: The weight is NaN or infinite.
        """
        values, scale = _quantized(weight, scheme, transposed)
        return cls(
            values, scale, shape=weight.shape, scheme=scheme, transposed=transposed, dtype=weight.dtype
        )  # fmt: skip

    def requantize(self, weight: Tensor) -> None:
        """Take another tensor of the same shape in place.

        Raises:
            NonFiniteError: The weight is NaN or infinite.
        """
        self.weight_values, self.weight_scale = _quantized(weight, self.scheme, self.transposed)

    def held(self) -> tuple[Tensor | None, ...]:
        """Codes and scales as they are now: what :meth:`take` takes back."""
        return self.weight_values, self.weight_scale

    def take(self, held: tuple[Tensor | None, ...]) -> None:
        """Become again what :meth:`held` gave."""
        self.weight_values, self.weight_scale = (torch.as_tensor(value) for value in held)

    @property
    def weight_numel(self) -> int:
        """Number of weights."""
        return self._shape.numel()

    @property
    def shape(self) -> torch.Size:
        """Of the float tensor."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the float tensor."""
        return self._dtype

    def matrix(self, index: int) -> Tensor:
        """One dequantized matrix."""
        values = self.weight_values[index]
        if self.scheme.weights == "int4":
            values = unpack_int4(values, self._shape[1 if self.transposed else 2])
        flat = dequantize_weight(QuantizedTensor(values, self.weight_scale[index]), self.scheme).to(self._dtype)
        return flat.t() if self.transposed else flat

    def dense(self) -> Tensor:
        """All dequantized matrices."""
        return torch.stack([self.matrix(index) for index in range(self._shape[0])])

    def extra_repr(self) -> str:
        """Shape and scheme."""
        return f"{tuple(self._shape)}, {self.scheme.name}, weights only"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but keep every dtype: casting codes or scales would change the weight."""
        for name in TENSORS:
            tensor = torch.as_tensor(self._buffers[name])
            self._buffers[name] = tensor.to(fn(tensor[:0]).device)
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.device)).dtype
        return self


@contextmanager
def standing_in(model: nn.Module, stacks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let modules stand for parameters inside a ``with`` block.

    Args:
        model: The model.
        stacks: Full name of a parameter -> what stands for it.
    """
    taken = [put(model, name, stack) for name, stack in stacks.items()]
    try:
        yield
    finally:
        for back in reversed(taken):
            back()


def put(model: nn.Module, name: str, stack: nn.Module) -> Callable[[], None]:
    """Let a module stand for a parameter.

    Args:
        model: The model, changed in place.
        name: Full name of the parameter.
        stack: What stands for it.

    Returns:
        A function that puts the parameter back in its place.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    parameters, modules = dict(owner._parameters), dict(owner._modules)
    del owner._parameters[leaf]
    owner._modules[leaf] = stack

    def back() -> None:
        # whole registries: what is taken out and put in again would stand at another place
        owner._parameters.clear()
        owner._parameters.update(parameters)
        owner._modules.clear()
        owner._modules.update(modules)

    return back


def _quantized(weight: Tensor, scheme: Scheme, transposed: bool) -> tuple[Tensor, Tensor]:
    made = [quantize_weight((m.t() if transposed else m).contiguous(), scheme) for m in weight.detach()]
    values = torch.stack([pack_int4(q.values) if scheme.weights == "int4" else q.values for q in made])
    return values, torch.stack([q.scale for q in made])
