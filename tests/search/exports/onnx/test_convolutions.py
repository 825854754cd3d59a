"""Convolutions in ONNX exports: which nodes they become, what runtimes make of these, and that they compute what our module computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from alphasmith.objectives.calibration.weight_matrix import as_matrix
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import OnnxLayout
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search import export, load_quantized
from alphasmith.search.exports.source import DeployedOperator
from alphasmith.search.exports.verification import verify_export
from benchmarks.narrow_runtime import narrow_runtime
from benchmarks.real_folders import AbsentError
from tests.support.onnx_runtime import (
    CLOSE,
    PLAIN,
    difference,
    kinds,
    memory_session,
    openvino_layers,
    session,
    simulated,
)
from tests.support.run_cases import launch, seeded, vectors

ir = pytest.importorskip("onnx_ir", reason="needs pip install 'alphasmith[onnx]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'alphasmith[onnx]'")

from alphasmith.search.exports.onnx.reading import OnnxOperators
from alphasmith.search.exports.onnx.rewriting import Rewritten, rewrite

LAYOUTS: tuple[OnnxLayout, ...] = ("ort-u8", "ort-s8", "qdq")


class Same(nn.Conv2d):
    """Puts zeros around its input itself, as many as its size asks for."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, ceil(H / stride), ceil(W / stride))."""
        around: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            more = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            around += [more // 2, more - more // 2]
        return super().forward(nn.functional.pad(x, around))


class Sighted(nn.Module):
    """A patch layer, a kernel of size 1, a sum that is rounded behind a ReLU and a pooling, one before a batch norm, computed padding."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.point = nn.Conv2d(8, 12, 1)
        # Without a bias, which would be rounded to whole steps of the sum.
        self.pooled = nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.normed = nn.Conv2d(16, 16, 3)
        self.bn = nn.BatchNorm2d(16)
        self.last = Same(16, 8, 3, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 5)."""
        x = torch.relu(self.point(nn.functional.gelu(self.patch(x))))
        x = self.normed(torch.max_pool2d(torch.relu(self.pooled(x)), 2))
        x = torch.relu(self.last(torch.relu(self.bn(x))))
        return torch.as_tensor(self.head(x.mean((2, 3))))


@pytest.mark.parametrize("layout", ["ort-u8", pytest.param("ort-s8", marks=pytest.mark.slow), "qdq"])
def test_a_network_of_convolutions(layout: OnnxLayout, tmp_path: Path) -> None:
    model, batches = seeded(Sighted), vectors(48, 3, 17, 20)
    # Signed weights of 7 bits: those of 8 saturate on processors without VNNI.
    scheme = {"weights": "int7" if layout == "ort-s8" else "int8"}
    # A shift behind the pooling is no rounding of the sum before it.
    values = {"search": {**PLAIN["search"], "shift": ["none"]}, "scheme": scheme}
    result = launch(tmp_path / "run", model, batches, values).folder
    with pytest.raises(InputError, match=r"model=\.\.\., batch="):
        export(result, "onnx", tmp_path / "out", layout=layout)
    record = export(result, "onnx", tmp_path / "out", layout=layout, model=model, batch=batches[0]).record
    assert {operator.name for operator in record.operators} == {"patch", "point", "pooled", "normed", "last", "head"}
    file = tmp_path / "out/model.onnx"
    opened = session(file)
    for x in (batches[1], batches[2][:3, :, :16, :13]):
        expected = simulated(load_quantized(result, model), Batch(args=(x,)))
        assert difference(opened.run(None, {"x": x.numpy()})[0], expected) < CLOSE
    made = kinds(file)
    assert made["MatMulIntegerToFloat"] == 3  # the patch layer, the kernel of size 1, the head
    told = [note for note in record.notes if "computes the convolution" in note]
    if layout != "qdq":
        assert made["ConvInteger"] == 3
        assert not told
        stored = ir.load(file).graph.initializers
        # ONNX Runtime has no fast kernel of ConvInteger for signed weights.
        assert stored["last.weight_codes"].dtype == ir.DataType.UINT8
    else:
        assert made["QLinearConv"] == 1
        assert made["Conv"] + made["FusedConv"] == 2
        assert "convolution of normed, last in float" in told[0]
    assert verify_export(tmp_path / "out", run=result)["operators"] == 6


def test_openvino_finds_the_integers_of_convolutions(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs pip install openvino")
    model, batches = seeded(Sighted), vectors(48, 3, 16, 16)
    result = launch(tmp_path / "run", model, batches, PLAIN).folder
    export(result, "onnx", tmp_path / "out", layout="qdq", model=model, batch=batches[0])
    compiled = openvino.Core().compile_model(str(tmp_path / "out/model.onnx"), "CPU")
    expected = simulated(load_quantized(result, model), Batch(args=(batches[1],)))
    found = next(iter(compiled({"x": batches[1].numpy()}).values()))
    assert difference(found, expected) < 0.1  # kernels of processors without VNNI saturate
    made = openvino_layers(compiled)
    for layer, count in (("Convolution", 3), ("FullyConnected", 3)):
        assert sum(made[layer, integers] for integers in ("u8", "i8")) == count


class Odd(nn.Module):
    """Operators of kinds that other models here lack: transposed and grouped convolutions, padding of values, one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 8, 3, padding=2, dilation=2, groups=2)
        self.mirrored = nn.Conv1d(8, 8, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1, groups=2)
        self.again = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4, L) -> (B, 3)."""
        x = torch.relu(self.up(torch.relu(self.mirrored(torch.relu(self.first(x))))))
        x = self.again(torch.relu(self.again(x.mT)))
        return torch.as_tensor(self.head(x.mean(1)))


@pytest.mark.parametrize("layout", ["ort-u8", "qdq"])
def test_operators_without_integers_in_a_layout_are_told(layout: str, tmp_path: Path) -> None:
    model, batches = seeded(Odd), vectors(48, 4, 12)
    result = launch(tmp_path / "run", model, batches, PLAIN).folder
    made = export(result, "onnx", tmp_path / "out", layout=layout, model=model, batch=(batches[0],)).record
    assert {operator.name for operator in made.operators} == {"first", "mirrored", "up", "again", "head"}
    assert any("up" in note and "float" in note for note in made.notes)
    expected = simulated(load_quantized(result, model), Batch(args=(batches[1],)))
    found = session(tmp_path / "out/model.onnx").run(None, {"x": batches[1].numpy()})[0]
    assert difference(found, expected) < 1e-4
    assert verify_export(tmp_path / "out", run=result)["operators"] == 5


# ------------------------------------------------------------------------------------------------------------- single convolutions


def deployed(
    shape: tuple[int, ...], codes: Tensor, groups: int, *, zero: int | None = None, name: str = "conv"
) -> DeployedOperator:
    """A convolution with these codes (O, C / groups, *kernel) and a scale of its own for every output."""
    return DeployedOperator(
        name=name,
        kind="conv",
        transposed=False,
        scheme=Scheme.parse(f"{'w8a8' if zero is None else 'w8au8'}-channel-static"),
        codes=as_matrix(codes.reshape(shape), "conv", False, groups).to(torch.int8),
        scale=torch.linspace(1e-3, 2e-3, shape[0])[:, None],
        input_scale=torch.tensor(0.02),
        input_zero=None if zero is None else torch.tensor(zero, dtype=torch.uint8),
        explicit=False,
    )


SHAPE = (6, 4, 3, 3)


def stored(name: str, value: Any) -> Any:
    """A number or more as an initializer."""
    kind = ir.TensorType(ir.DataType.from_numpy(value.dtype))
    return ir.Value(name=name, shape=ir.Shape(value.shape), type=kind, const_value=ir.tensor(value, name=name))


def graph_of(
    shape: tuple[int, ...],
    groups: int,
    bias: Tensor | None,
    sizes: list[Any],
    *,
    around: list[int] | None = None,
    value: float | None = None,
    mode: str = "constant",
    **attributes: Any,
) -> Any:
    """A marked convolution as the exporter writes it; ``around``: numbers that its module puts around its input, in the order of Pad."""
    told = {"operator": "conv", "transposed": 0, "groups": groups}
    typed = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["batch", shape[1] * groups, *sizes]), type=typed)
    mark = ir.node("Input", [x], told, domain="alphasmith", name="input")
    mark.outputs[0].shape, mark.outputs[0].type = x.shape, typed
    weight = ir.node("Weight", [], told, domain="alphasmith", name="weight")
    weight.outputs[0].shape = ir.Shape(shape)
    inputs, initializers, padding = [mark.outputs[0], weight.outputs[0]], [], []
    if around is not None:
        initializers = [stored("around", np.array(around, np.int64))]
        initializers += [] if value is None else [stored("value", np.array(value, np.float32))]
        padding = [ir.node("Pad", [mark.outputs[0], *initializers], {"mode": mode}, name="padding")]
        padding[0].outputs[0].shape, padding[0].outputs[0].type = ir.Shape([None] * len(x.shape)), typed
        inputs[0] = padding[0].outputs[0]
    if bias is not None:
        initializers.append(stored("bias", bias.numpy()))
        inputs.append(initializers[-1])
    node = ir.node("Conv", inputs, {"group": groups, **attributes}, name="convolution")
    node.outputs[0].shape, node.outputs[0].type = ir.Shape(["batch", shape[0], *[None] * len(sizes)]), typed
    for made in (mark, weight, *padding, node):
        made.outputs[0].name = f"{made.name}_value"
    graph = ir.Graph(
        [x],
        [node.outputs[0]],
        nodes=[mark, weight, *padding, node],
        initializers=initializers,
        opset_imports={"": 20, "alphasmith": 1},
    )
    return ir.Model(graph, ir_version=10)


@hypothesis.settings(deadline=None, max_examples=60)
@given(
    layout=st.sampled_from(LAYOUTS),
    spaces=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 2)),
    channels=st.sampled_from((3, 3, 32, 256)),
    around=st.sampled_from((None, (0, 1), (2, 1))),
    dilation=st.integers(1, 2),
    groups=st.integers(1, 2),
    zero=st.sampled_from((None, 0, 77, 255)),
    biased=st.booleans(),
    free=st.booleans(),
    extreme=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_convolutions_are_those_of_the_integers(
    layout: OnnxLayout,
    spaces: int,
    kernel: int,
    stride: int,
    padding: tuple[int, int],
    channels: int,
    around: tuple[int, int] | None,
    dilation: int,
    groups: int,
    zero: int | None,
    biased: bool,
    free: bool,
    extreme: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if layout == "qdq":  # a float sum, whose rounding grows with its length
        channels = 3
    shape = (2 * groups, channels, *[kernel] * spaces)
    sizes = [5 + int(n) for n in torch.randint(0, 3, (spaces,), generator=generator)]
    codes = torch.randint(-128, 128, shape, generator=generator)
    x = torch.randn(2, channels * groups, *sizes, generator=generator) * 1.5
    if extreme:  # where 16 bits are not enough for two products
        codes, x = torch.full_like(codes, 127), torch.full_like(x, 100.0)
    if layout == "ort-s8":  # weights of 7 bits, with which no processor saturates
        codes = codes.clamp(-64, 63)
    operator = deployed(shape, codes, groups, zero=zero)
    bias = torch.randn(shape[0], generator=generator) if biased else None
    told: dict[str, Any] = {
        "strides": [stride] * spaces,
        "pads": [padding[0]] * spaces + [padding[1]] * spaces,
        "dilations": [dilation] * spaces,
    }
    zeros = None if around is None else [0, 0, *[around[0]] * spaces, 0, 0, *[around[1]] * spaces]
    model = graph_of(shape, groups, bias, [f"s{i}" for i in range(spaces)] if free else sizes, around=zeros, **told)
    done: Rewritten = rewrite(model, {"conv": operator}, layout)
    assert done.operators == ("conv",)
    assert not done.float_products
    least, most, middle = (-128, 127, 0) if zero is None else (0, 255, zero)
    rounded = (torch.round(x / 0.02) + middle).clamp(least, most).double() - middle
    rounded = nn.functional.pad(nn.functional.pad(rounded, list(around or (0, 0)) * spaces), list(padding) * spaces)
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[spaces - 1]
    sums = convolve(rounded, codes.double(), stride=stride, dilation=dilation, groups=groups)
    exact = sums * 0.02 * operator.scale.double().reshape(-1, *[1] * spaces)
    expected = exact if bias is None else exact + bias.double().reshape(-1, *[1] * spaces)
    found = memory_session(ir.to_proto(model).SerializeToString()).run(None, {"x": x.numpy()})[0]
    assert found.shape == expected.shape
    size = float(exact.abs().max()) + (0 if bias is None else float(bias.abs().max()))
    assert float((torch.from_numpy(np.array(found)) - expected).abs().max()) <= 2e-6 * max(size, 1e-6)


@pytest.mark.parametrize(
    ("layout", "channels", "copied"),
    [("ort-s8", 31, False), ("ort-s8", 32, True), ("ort-u8", 32, False), ("ort-u8", 256, True), ("qdq", 256, False)],
)
def test_windows_are_copied_out_where_a_product_gains_more(
    layout: OnnxLayout, channels: int, copied: bool, tmp_path: Path
) -> None:
    shape = (5, channels, 2, 3)
    codes = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(3))
    operator = deployed(shape, codes, 1)
    model = graph_of(shape, 1, None, ["height", "width"], strides=[1, 1], pads=[0] * 4, dilations=[1, 1])
    rewrite(model, {"conv": operator}, layout)
    products = [node for node in model.graph if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == copied
    ir.save(model, tmp_path / "model.onnx")
    (read,) = OnnxOperators([tmp_path / "model.onnx"]).read("conv", operator.scheme)
    assert read.codes.equal(operator.codes)
    assert read.scale.equal(operator.scale)


_ANSWERED = """
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[2], session.run(None, {"x": numpy.load(sys.argv[3])})[0])
"""


@pytest.mark.parametrize(("layout", "bits", "exact"), [("ort-u8", 8, True), ("ort-s8", 7, True), ("ort-s8", 8, False)])
def test_without_vnni_a_product_is_what_the_layout_says(
    layout: OnnxLayout, bits: int, exact: bool, tmp_path: Path
) -> None:
    try:
        runtime = narrow_runtime(tmp_path)
    except AbsentError as error:
        pytest.skip(str(error))
    shape = (5, 256, 2, 2)
    largest = 2 ** (bits - 1) - 1
    operator = deployed(shape, torch.full(shape, largest), 1)
    model = graph_of(shape, 1, None, [6, 7], strides=[1, 1], pads=[0] * 4, dilations=[1, 1])
    rewrite(model, {"conv": operator}, layout)
    ir.save(model, tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", np.full((1, 256, 6, 7), 100, np.float32))
    places = [str(tmp_path / name) for name in ("model.onnx", "y.npy", "x.npy")]
    command = [sys.executable, "-c", _ANSWERED, *places]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(runtime)})
    expected = 127 * largest * 256 * 4 * 0.02 * operator.scale.double()[:, :, None].expand(5, 5, 6)[None]
    found = torch.from_numpy(np.load(tmp_path / "y.npy"))
    assert (difference(found, expected.float()) < CLOSE) == exact


@pytest.mark.parametrize(
    ("integers", "padding"),
    [
        (True, {"around": [0, 0, 1, 1, 0, 0, 1, 1], "mode": "reflect"}),
        (True, {"around": [0, 0, -1, 0, 0, 0, 2, 0], "value": 0.0}),
        (True, {"around": [0, 0, 2, 1, 0, 0, 0, 1], "auto_pad": "SAME_UPPER"}),
        (False, {"around": [0, 0, 1, 1, 0, 0, 1, 1], "value": 0.5}),
    ],
)
@pytest.mark.parametrize("layout", ["ort-u8", "qdq"])
def test_codes_are_padded_where_rounding_commutes_with_it(
    layout: OnnxLayout, integers: bool, padding: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(7)
    operator = deployed(SHAPE, torch.randint(-128, 128, SHAPE, generator=generator), 1)
    told: dict[str, Any] = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1]}
    if "auto_pad" in padding:
        del told["pads"]
    model = graph_of(SHAPE, 1, None, [9, 9], **padding, **told)
    done = rewrite(model, {"conv": operator}, layout)
    assert done.float_products == (() if integers else ("conv",))
    assert [node.op_type for node in model.graph].count("Pad") == 1
    x = torch.randn(2, 4, 9, 9, generator=generator)
    around = padding["around"]
    rounded = torch.round(x / 0.02).clamp(-128, 127).double() * 0.02
    ends = [n for axis in (3, 2) for n in (around[axis], around[axis + 4])]
    if padding.get("mode") == "reflect":
        rounded = nn.functional.pad(rounded, ends, mode="reflect")
    else:
        rounded = nn.functional.pad(rounded, ends, value=padding.get("value", 0.0))
    weight = operator.codes.reshape(SHAPE).double() * operator.scale.double()[:, :, None, None]
    expected = nn.functional.conv2d(rounded, weight, padding="same" if "auto_pad" in padding else 0)
    found = memory_session(ir.to_proto(model).SerializeToString()).run(None, {"x": x.numpy()})[0]
    assert difference(found, expected.float()) < CLOSE


def with_reader(
    model: Any, steps: list[float], *, kind: Any = np.int8, between: str | None = "Relu", output: bool = False
) -> Any:
    """The graph with operators behind its convolution that round its sum by these steps, behind another operation."""
    graph = model.graph
    last = graph.outputs[0]
    if not output:
        graph.outputs.clear()
    for number, step in enumerate(steps):
        nodes = [] if between is None else [ir.node(between, [last], name=f"between_{number}")]
        constants = []
        for leaf, value in (("scale", np.array(step, np.float32)), ("zero", np.array(0, kind))):
            constants.append(stored(f"reader_{number}_{leaf}", value))
            graph.register_initializer(constants[-1])
        codes = ir.node("QuantizeLinear", [nodes[0].outputs[0] if nodes else last, *constants], name=f"codes_{number}")
        values = ir.node("DequantizeLinear", [codes.outputs[0], *constants], name=f"values_{number}")
        for made in (*nodes, codes, values):
            made.outputs[0].name = f"{made.name}_value"
            graph.append(made)
        values.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        values.outputs[0].shape = last.shape
        graph.outputs.append(values.outputs[0])
    return model


def rounded_graph(bias: Tensor | None, steps: list[float], **reader: Any) -> tuple[Any, Rewritten]:
    """A convolution with readers before and after it is rewritten in ``qdq``."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-128, 128, SHAPE, generator=generator)
    model = with_reader(graph_of(SHAPE, 1, bias, [9, 9]), steps, **reader)
    return model, rewrite(model, {"conv": deployed(SHAPE, codes, 1)}, "qdq")


@pytest.mark.parametrize("between", ["Relu", None])
def test_a_sum_that_is_rounded_anyway_is_one_of_integers(between: str | None, tmp_path: Path) -> None:
    bias = torch.randn(6, generator=torch.Generator().manual_seed(1))
    model, done = rounded_graph(bias, [0.01], between=between)
    assert done.float_sums == ()
    (tmp_path / "out").mkdir()
    ir.save(model, tmp_path / "out/model.onnx")
    opened = session(tmp_path / "out/model.onnx")
    assert kinds(tmp_path / "out/model.onnx")["QLinearConv"] == 1
    x = torch.randn(8, 4, 9, 9, generator=torch.Generator().manual_seed(2)) * 1.2
    operator = deployed(SHAPE, torch.randint(-128, 128, SHAPE, generator=torch.Generator().manual_seed(3)), 1)
    rounded = torch.round(x / 0.02).clamp(-128, 127).double()
    weight = operator.codes.reshape(SHAPE).double() * operator.scale.double()[:, :, None, None]
    sums = nn.functional.conv2d(rounded * 0.02, weight, bias.double())
    expected = torch.round((sums if between is None else sums.relu()) / 0.01).clamp(-128, 127)
    for values in opened.run(None, {"x": x.numpy()}):
        steps = torch.from_numpy(np.array(values)).double() / 0.01 - expected
        # A bias in whole steps of the sum moves a sum over the middle between two codes now and then.
        assert float(steps.abs().max()) < 1.01
        assert float((steps.abs() > 0.5).double().mean()) < 5e-3


@pytest.mark.parametrize(
    ("steps", "reader"),
    [
        ([0.01, 0.02], {}),  # two readers that round otherwise
        ([0.01, 0.01], {}),  # two readers
        ([0.01], {"output": True}),  # an output of the graph
        ([0.01], {"between": "Sigmoid"}),  # rounding does not commute
        ([0.01], {"kind": np.uint8}),  # ONNX Runtime wants codes of one type
        ([], {"output": True}),
    ],
)
def test_other_sums_stay_as_they_are(steps: list[float], reader: dict[str, Any]) -> None:
    model, done = rounded_graph(torch.ones(6), steps, **reader)
    assert done.float_sums == ("conv",)
    assert "conv.output_scale" not in model.graph.initializers
    assert next(node for node in model.graph if node.op_type == "Conv").inputs[2].name == "bias"
