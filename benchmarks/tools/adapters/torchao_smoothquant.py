"""torchao's SmoothQuant prototype: one fixed alpha, each linear by itself, the scale stays a multiplication at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tools.adapters.contract import Arguments, Smoothed, serve


def smooth(model: nn.Module, batches: Sequence[Arguments], settings: Mapping[str, Any]) -> Smoothed:
    """Observe, and ask every observer for its factor, as the tool's step ``convert`` does, which would round the weights as well.

    The observer that keeps a running abs-max gives the factors of the default one, which cannot join batches of different lengths.
    """
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.prototype.smoothquant.core import SmoothQuantObservedLinear
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    base = Int8DynamicActivationInt8WeightConfig()
    config = SmoothQuantConfig(base_config=base, step="prepare", use_running_absmax=True, **settings)
    quantize_(model, config)
    scales = {}
    with torch.no_grad():
        for batch in batches:
            model(**batch)
        for name, linear in model.named_modules():
            if isinstance(linear, SmoothQuantObservedLinear) and linear.obs.calibration_count:
                scales[name] = linear.obs.calculate_qparams()[0].clone()
                _pre_scale(linear, scales[name])
    return Smoothed(scales=scales, model=model, settings={"alpha": config.alpha})


def _pre_scale(linear: nn.Linear, scales: Tensor) -> None:
    """What ``convert`` makes of a linear, in float. Its weight may be tied to another module's, which stays."""
    linear.weight = nn.Parameter(linear.weight * scales, requires_grad=False)
    linear.register_forward_pre_hook(lambda module, given: (given[0] * (1.0 / scales), *given[1:]))


if __name__ == "__main__":
    serve(smooth, "torchao")
