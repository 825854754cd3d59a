"""Convolutions in ONNX Runtime: as ConvInteger, and as a product of windows that are copied out, against float.

    python -m benchmarks.convolutions [--repeats 9] [--out [docs/exports.md]]

The exporter writes single layers of random integers, either way; CPU time of one thread, interleaved. From this the exporter has
the fewest channels that it copies windows of (search/exports/onnx/convolutions.py).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import torch

from alphasmith.objectives.calibration.weight_matrix import as_matrix
from alphasmith.objectives.literals import OnnxLayout
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.exports.onnx import convolutions
from alphasmith.search.exports.onnx.rewriting import rewrite
from alphasmith.search.exports.source import DeployedOperator
from benchmarks.timing import interleaved_times, machine, median, parser, publish, speedup, table

_DOCUMENT = Path(__file__).resolve().parents[1] / "docs/exports.md"
_LAYOUTS: tuple[OnnxLayout, ...] = ("ort-u8", "ort-s8")
_SCHEME = "w8a8-channel-static"
_OPSET = 20


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution.

    Attributes:
        inputs: Channels that it reads.
        outputs: Channels that it makes.
        kernel: Size of its window, per axis.
        stride: Between windows.
        space: What it reads, per axis.
        groups: Of channels.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: int
    space: tuple[int, ...]
    groups: int = 1

    def __str__(self) -> str:
        window, space = (" x ".join(map(str, sizes)) for sizes in (self.kernel, self.space))
        apart = f", stride {self.stride}" if self.stride > 1 else ""
        grouped = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.inputs} -> {self.outputs}, {window}{apart}{grouped}, on {space}"


LAYERS = (
    Layer(inputs=3, outputs=64, kernel=(7, 7), stride=2, space=(224, 224)),
    Layer(inputs=16, outputs=16, kernel=(3, 3), stride=1, space=(32, 32)),
    Layer(inputs=32, outputs=32, kernel=(3, 3), stride=1, space=(16, 16)),
    Layer(inputs=64, outputs=64, kernel=(3, 3), stride=1, space=(56, 56)),
    Layer(inputs=80, outputs=384, kernel=(3,), stride=1, space=(3000,)),
    Layer(inputs=128, outputs=128, kernel=(3, 3), stride=1, space=(28, 28)),
    Layer(inputs=256, outputs=256, kernel=(3, 3), stride=1, space=(14, 14)),
    Layer(inputs=384, outputs=384, kernel=(3,), stride=2, space=(3000,)),
    Layer(inputs=512, outputs=512, kernel=(3, 3), stride=1, space=(7, 7)),
    Layer(inputs=64, outputs=64, kernel=(3, 3), stride=1, space=(28, 28), groups=64),
)


def graph(layer: Layer, layout: OnnxLayout | None) -> bytes:
    """An ONNX model of a layer.

    Args:
        layer: The convolution.
        layout: Of the export; None: in float.
    """
    spaces = len(layer.kernel)
    shape = (layer.outputs, layer.inputs // layer.groups, *layer.kernel)
    codes = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0))
    told = {"operator": "layer", "transposed": 0, "groups": layer.groups}
    typed = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["batch", layer.inputs, *[None] * spaces]), type=typed)
    bias = _initializer("bias", np.zeros(layer.outputs, np.float32))
    nodes, initializers, inputs = [], [bias], [x]
    if layout is None:
        initializers.append(_initializer("weight", codes.numpy().astype(np.float32)))
        inputs.append(initializers[-1])
    else:
        nodes = [ir.node("Input", [x], told, domain="alphasmith"), ir.node("Weight", [], told, domain="alphasmith")]
        for node, sizes in zip(nodes, (x.shape, ir.Shape(shape)), strict=True):
            node.outputs[0].shape, node.outputs[0].type = sizes, typed
        inputs = [node.outputs[0] for node in nodes]
    pads = [size // 2 for size in layer.kernel] * 2
    convolution = {"group": layer.groups, "pads": pads, "strides": [layer.stride] * spaces}
    nodes.append(ir.node("Conv", [*inputs, bias], convolution))
    nodes[-1].outputs[0].shape, nodes[-1].outputs[0].type = ir.Shape(["batch", *[None] * (spaces + 1)]), typed
    opsets = {"": _OPSET} if layout is None else {"": _OPSET, "alphasmith": 1}
    made = ir.Model(
        ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, initializers=initializers, opset_imports=opsets),
        ir_version=10,
    )
    if layout is not None:
        operator = DeployedOperator(
            name="layer",
            kind="conv",
            transposed=False,
            scheme=Scheme.parse(_SCHEME),
            codes=as_matrix(codes, "conv", False, layer.groups).to(torch.int8),
            scale=torch.full((layer.outputs, 1), 1e-3),
            input_scale=torch.tensor(0.03),
            input_zero=None,
            explicit=False,
        )
        rewrite(made, {"layer": operator}, layout)
    return bytes(ir.to_proto(made).SerializeToString())


def _initializer(name: str, value: Any) -> ir.Value:
    kind = ir.TensorType(ir.DataType.from_numpy(value.dtype))
    return ir.Value(name=name, shape=ir.Shape(value.shape), type=kind, const_value=ir.tensor(value, name=name))


def row(layer: Layer, batch: int, repeats: int) -> list[str]:
    """A line of the table.

    Args:
        layer: The convolution.
        batch: Samples of a call.
        repeats: Rounds, each of which calls every model once.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    graphs = {("", ""): graph(layer, None)}
    for layout, (way, fewest) in itertools.product(_LAYOUTS, {"integers": math.inf, "copied": 0}.items()):
        with patch.dict(convolutions.COPIED, {layout: fewest}):
            graphs[layout, way] = graph(layer, layout)
    sessions = {name: onnxruntime.InferenceSession(made, options) for name, made in graphs.items()}
    x = {"x": np.random.default_rng(0).standard_normal((batch, layer.inputs, *layer.space)).astype(np.float32)}
    calls = {name: partial(session.run, None, x) for name, session in sessions.items()}
    times = interleaved_times(calls, repeats, time.process_time)
    ratios = {name: speedup(times["", ""], taken) for name, taken in times.items()}
    cells = []
    for layout in _LAYOUTS:
        # What the exporter makes of the layer by itself; one of several groups is the same either way.
        taken = graph(layer, layout) != graphs[layout, "integers"]
        shown = f"{ratios[layout, 'integers']:.2f}, {ratios[layout, 'copied']:.2f}"
        cells.append(f"{shown} (taken)" if taken else shown)
    return [str(layer), str(batch), f"{1e3 * median(times['', '']):.3g}", *cells]


def main(layers: Sequence[Layer] = LAYERS) -> None:
    """Print the table, and put it into the document where that is asked for."""
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, default=9)
    given = made.parse_args()
    torch.set_num_threads(1)
    rows = [row(layer, batch, given.repeats) for layer in layers for batch in (1, 8)]
    header = ("layer", "batch", "float [ms]", *(f"{layout}: ConvInteger, copied windows" for layout in _LAYOUTS))
    publish("CONVOLUTIONS", f"{machine()}\n\n{table(header, rows)}", given.out)


if __name__ == "__main__":
    main()
