"""Exported graphs as ONNX Runtime and OpenVINO run them, beside our module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.quantization.operator import QuantizedOperator

#: Of the numbers of an output; float parts are summed in another order.
CLOSE = 2e-6
#: A search that decides nothing of what an export holds.
PLAIN = {"search": {"trials": 4, "refine": False, "guard": "site"}}


def session(file: Path) -> Any:
    """A graph on one thread, with exact products on every processor; what was made of it is kept for :func:`kinds`."""
    return _opened(str(file), optimized=str(file.parent.parent / f"{file.stem}-optimized.onnx"))


def memory_session(content: bytes) -> Any:
    """As :func:`session`, of a graph that is in no file."""
    return _opened(content, optimized="")


def _opened(model: str | bytes, *, optimized: str) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install 'alphasmith[onnx]'")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def kinds(file: Path) -> Counter[str]:
    """Nodes that ONNX Runtime made of a graph that was opened."""
    onnx = pytest.importorskip("onnx", reason="needs pip install 'alphasmith[onnx]'")
    optimized = onnx.load(file.parent.parent / f"{file.stem}-optimized.onnx", load_external_data=False)
    return Counter(node.op_type for node in optimized.graph.node)


def openvino_layers(compiled: Any) -> Counter[tuple[str, str]]:
    """Kinds of layers that OpenVINO made of a graph, and what they compute with."""
    told = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return Counter((str(one["layerType"].astype(str)), str(one["runtimePrecision"].astype(str))) for one in told)


def simulate(model: nn.Module) -> nn.Module:
    """Let quantized operators multiply dequantized values, as formulas are written."""
    for module in model.modules():
        if isinstance(module, QuantizedOperator):
            module.execution = "simulated"
    return model


def simulated(model: nn.Module, batch: Batch) -> Tensor:
    """Main output of a quantized model, of dequantized values."""
    with torch.no_grad():
        return main_output(call(simulate(model), batch))


def difference(found: Any, expected: Tensor) -> float:
    """Relative."""
    return float(np.linalg.norm(np.asarray(found) - expected.numpy()) / np.linalg.norm(expected.numpy()))


def texts(samples: int, length: int, *names: str) -> dict[str, Tensor]:
    """Inputs of a language model."""
    ids = torch.arange(samples * length).reshape(samples, length) % 27
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {name: made[name] for name in names}


def numbers(given: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inputs as ONNX Runtime takes them."""
    return {name: value.numpy() for name, value in given.items()}
