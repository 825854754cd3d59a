"""Intel Neural Compressor's SmoothQuant with ``alpha="auto"``: a grid of alphas for every tensor, judged layer by layer.

Its module imports Intel's extension for PyTorch, which is retired, and calls it only to quantize, after smoothing: an empty module
stands in for it.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.tools.adapters.contract import Arguments, Smoothed, UnsupportedError, serve

_EXTENSION = "intel_extension_for_pytorch"
#: Arguments of the search that the tool's configuration holds.
_SEARCHED = ("init_alpha", "alpha_min", "alpha_max", "alpha_step", "shared_criterion", "do_blockwise")


def smooth(model: nn.Module, batches: Sequence[Arguments], settings: Mapping[str, Any]) -> Smoothed:
    """Search with the defaults of ``SmoothQuantConfig``; the scales are the tool's own record of them."""
    _stand_in()
    from neural_compressor.torch.algorithms.smooth_quant.utility import TorchSmoothQuant
    from neural_compressor.torch.quantization import SmoothQuantConfig

    config = SmoothQuantConfig(alpha="auto", **settings)
    searched = {name: getattr(config, name) for name in _SEARCHED}
    # Named: it would take the first of two arguments for the batch and the second for a label.
    search = TorchSmoothQuant(model, dataloader=list(batches), example_inputs=batches[0])
    search.transform(alpha="auto", folding=config.folding, op_types=[torch.nn.Linear], auto_alpha_args=searched)
    if not search.weight_scale_info:
        raise UnsupportedError("it finds no layer to smooth in a trace of this model")
    return Smoothed(
        scales=search.weight_scale_info, model=search.model, settings={"folding": config.folding, **searched}
    )


def _stand_in() -> None:
    stand_in = types.ModuleType(_EXTENSION)
    stand_in.__version__ = "2.8.0"  # type: ignore[attr-defined]  # asked for by the tool
    stand_in.__spec__ = importlib.machinery.ModuleSpec(_EXTENSION, None)
    sys.modules[_EXTENSION] = stand_in


if __name__ == "__main__":
    serve(smooth, "neural-compressor", traced=True)
