"""One batch of media as the model is called with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn


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


def call(model: nn.Module, batch: Batch) -> Any:
    """Run ``model`` on ``batch`` and return whatever it returns."""
    return model(*batch.args, **batch.kwargs)


def main_output(output: Any) -> torch.Tensor:
    """The tensor that is the model's answer: logits if named so, else the first floating tensor of the output.

    Args:
        output: What the model returned: a tensor, a tuple, a dict or a transformers ``ModelOutput``.

    Raises:
        ValueError: No floating tensor was returned.
    """
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ("logits", "last_hidden_state"):
            if isinstance(output.get(key), torch.Tensor):
                return torch.as_tensor(output[key])
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        for item in output:
            if isinstance(item, torch.Tensor) and item.is_floating_point():
                return item
            if isinstance(item, (tuple, list, Mapping)):
                return main_output(item)
    raise ValueError(f"the model returned {type(output).__name__}, which holds no floating tensor")
