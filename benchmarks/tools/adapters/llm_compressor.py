"""llm-compressor's SmoothQuantModifier through ``oneshot``: one fixed strength, folded into the norms that its mappings name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from benchmarks.tools.adapters.contract import Arguments, Smoothed, UnsupportedError, column_factors, linears, serve


class _NoProcessor:
    """``oneshot`` wants a processor although the data are tensors already."""

    def save_pretrained(self, *arguments: Any, **named: Any) -> None:
        """Nothing to save."""


def smooth(model: nn.Module, batches: Sequence[Arguments], settings: Mapping[str, Any]) -> Smoothed:
    """Smooth in place, and read the scales from the columns of the weights."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    before = {name: linear.weight.detach().clone() for name, linear in linears(model).items()}
    modifier = SmoothQuantModifier(**settings)
    data: DataLoader[Arguments] = DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]  # a list will do
    oneshot(
        model=model,
        dataset=data,
        recipe=[modifier],
        num_calibration_samples=len(batches),
        pipeline="basic",
        processor=_NoProcessor(),
    )
    scales = column_factors(before, model)
    if not scales:
        raise UnsupportedError("its mappings name no layer of this model")
    return Smoothed(scales=scales, model=model, settings={"smoothing_strength": modifier.smoothing_strength})


if __name__ == "__main__":
    serve(smooth, "llmcompressor", "compressed-tensors")
