"""One batch of media as the model is called with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.text import error_line

#: What a model raises on data it was not made for.
CALL_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Arguments of one forward call, its padding mask and, for task metrics, its labels.

    Attributes:
        args: Positional arguments; the first dimension of every tensor is the sample.
        kwargs: Keyword arguments, likewise.
        mask: (B, L) bool, True where a position is real; None when nothing is padded.
        labels: (B, ...) targets of a task metric, or None.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Number of samples."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                return int(value.shape[0])
        return 1

    def narrow(self, start: int, stop: int) -> Batch:
        """Samples ``start`` to ``stop`` (exclusive)."""

        def cut(value: Any) -> Any:
            return value[start:stop] if isinstance(value, torch.Tensor) and value.dim() > 0 else value

        return replace(
            self,
            args=tuple(cut(v) for v in self.args),
            kwargs={k: cut(v) for k, v in self.kwargs.items()},
            mask=cut(self.mask),
            labels=cut(self.labels),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """Move tensors to ``device`` and floating tensors to ``dtype``."""

        def move(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        return replace(
            self,
            args=tuple(move(v) for v in self.args),
            kwargs={k: move(v) for k, v in self.kwargs.items()},
            mask=move(self.mask),
            labels=move(self.labels),
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; a quantized one may have buffers only, and one without tensors is on the CPU.

    Args:
        model: All of it on one device.
    """
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def call(model: nn.Module, batch: Batch) -> Any:
    """Run ``model`` on ``batch`` and return whatever it returns."""
    return model(*batch.args, **batch.kwargs)


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Attention as single products: in evaluation, torch's modules may hand a whole layer to one fused kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def data_errors() -> Iterator[None]:
    """Around a call of the user's model on the user's data: what it raises on data that it was not made for is of one kind.

    Raises:
        InputError: It cannot be called with the batch.
    """
    try:
        yield
    except InputError:
        raise
    except CALL_ERRORS as error:
        raise InputError(
            "data",
            f"the model cannot be run on it ({error_line(error)})",
            "give what its forward takes, samples first: float32 values, or int64 where it looks something up",
        ) from error


def floating_outputs(output: Any, name: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """Every floating tensor that a model returned, with a name a person finds it by, e.g. ``scores`` or ``hidden_states[2]``.

    Tensors are looked for inside tuples, lists, mappings and dataclasses. Other objects are state, such as a key-value
    cache, and not searched.

    Args:
        output: What the model returned.
        name: What to call it where it is itself a tensor.
    """
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, Mapping):
        for key, item in output.items():
            yield from floating_outputs(item, str(key) if name == "output" else f"{name}.{key}")
    elif isinstance(output, (tuple, list)):
        for index, item in enumerate(output):
            yield from floating_outputs(item, f"{name}[{index}]")
    elif is_dataclass(output) and not isinstance(output, type):
        yield from floating_outputs({entry.name: getattr(output, entry.name) for entry in fields(output)}, name)


def main_output(output: Any) -> torch.Tensor:
    """The tensor that is the model's answer, which losses and metrics are computed from.

    That is ``logits`` or ``last_hidden_state`` where the output names one, else its first floating tensor with a dimension:
    a number beside the answer, such as an auxiliary loss, says nothing of single samples.

    Args:
        output: What the model returned: a tensor, a tuple, a dict, a dataclass or a transformers ``ModelOutput``.

    Raises:
        ValueError: No floating tensor was returned.
    """
    found = dict(floating_outputs(output))
    if not found:
        raise ValueError(f"the model returned {type(output).__name__}, which holds no floating tensor")
    return found[main_name(found)]


def main_name(outputs: Mapping[str, torch.Tensor]) -> str:
    """Which of the floating tensors of an output :func:`main_output` takes.

    Args:
        outputs: All of them, as :func:`floating_outputs` names them; not empty.
    """
    for key in ("logits", "last_hidden_state"):
        if key in outputs:
            return key
    return next((name for name, tensor in outputs.items() if tensor.dim()), next(iter(outputs)))
