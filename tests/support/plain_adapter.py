"""An adapter that needs no other tool: alpha 0.5 for every linear, or the fault that its settings ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tools.adapters.contract import Arguments, Smoothed, UnsupportedError, column_factors, linears, serve


def smooth(model: nn.Module, batches: Sequence[Arguments], settings: Mapping[str, Any]) -> Smoothed:
    """Scales ``sqrt(a_j / w_j)``, folded nowhere: each linear divides its own input."""
    fault = settings.get("fault")
    if fault == "unsupported":
        raise UnsupportedError("it knows no such layer")
    if fault == "raises":
        raise ValueError("no scale fits")
    peaks: dict[str, Tensor] = {}
    found = linears(model)
    hooks = [linear.register_forward_pre_hook(_watch(name, peaks)) for name, linear in found.items()]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    before = {name: linear.weight.detach().clone() for name, linear in found.items()}
    for name, peak in peaks.items():
        linear = found[name]
        scales = (peak / linear.weight.detach().abs().amax(0)).sqrt()
        linear.weight = nn.Parameter(linear.weight * scales, requires_grad=False)
        linear.register_forward_pre_hook(lambda module, given, s=scales: (given[0] / s, *given[1:]))
    return Smoothed(scales=column_factors(before, model), model=model, settings={"alpha": 0.5})


def _watch(name: str, peaks: dict[str, Tensor]) -> Any:
    def watch(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        peak = given[0].detach().abs().flatten(0, -2).amax(0)
        peaks[name] = torch.maximum(peaks.get(name, peak), peak)

    return watch


if __name__ == "__main__":
    serve(smooth)
