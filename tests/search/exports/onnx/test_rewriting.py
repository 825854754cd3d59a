"""Integers put into a marked graph: the products that ONNX Runtime then computes, for any codes, and the way back to the codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.calibration.weight_matrix import from_matrix, matrix_shape
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import OnnxLayout
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.exports.source import DeployedOperator

ir = pytest.importorskip("onnx_ir", reason="needs pip install 'alphasmith[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install 'alphasmith[onnx]'")

from alphasmith.search.exports.onnx._codes import OperatorConstants, Weight, read_codes
from alphasmith.search.exports.onnx._graph import GraphWriter
from alphasmith.search.exports.onnx._layouts import check_scheme
from alphasmith.search.exports.onnx.rewriting import rewrite

NAME = "block.fc"
LAYOUTS: tuple[OnnxLayout, ...] = ("ort-u8", "qdq")


def deployed(
    codes: torch.Tensor, *, zero: int | None = None, per_channel: bool = True, seed: int = 0
) -> DeployedOperator:
    """An operator with these codes (O, D)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(codes.shape[0], 1, generator=generator) * 0.01 + 1e-4
    kind = "w8a8" if zero is None else "w8au8"
    return DeployedOperator(
        name=NAME,
        kind="linear",
        transposed=False,
        scheme=Scheme.parse(f"{kind}-{'channel' if per_channel else 'tensor'}-static"),
        codes=codes.to(torch.int8),
        scale=rows if per_channel else rows[0, 0],
        input_scale=torch.tensor(0.02),
        input_zero=None if zero is None else torch.tensor(zero, dtype=torch.uint8),
        explicit=False,
    )


def product_graph(operator: DeployedOperator, rank: int, bias: np.ndarray[Any, Any] | None) -> Any:
    """A marked linear layer as the exporter writes it."""
    outputs, channels = operator.codes.shape
    told = {"operator": NAME, "transposed": 0, "groups": 1}
    free = [f"axis_{place}" for place in range(rank - 1)]
    typed = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape([*free, channels]), type=typed)
    mark = ir.node("Input", [x], told, domain="alphasmith", name="input")
    weight = ir.node("Weight", [], told, domain="alphasmith", name="weight")
    weight.outputs[0].shape = ir.Shape([outputs, channels])
    turned = ir.node("Transpose", [weight.outputs[0]], {"perm": [1, 0]}, name="turned")
    nodes = [mark, weight, turned, ir.node("MatMul", [mark.outputs[0], turned.outputs[0]], name="product")]
    initializers = []
    if bias is not None:
        added = ir.Value(name="bias", shape=ir.Shape([outputs]), type=typed, const_value=ir.tensor(bias, name="bias"))
        initializers.append(added)
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], added], name="sum"))
    for node in nodes:
        node.outputs[0].name = f"{node.name}_value"
        if node.op_type in ("MatMul", "Add"):
            node.outputs[0].shape = ir.Shape([*free, outputs])
            node.outputs[0].type = typed
    graph = ir.Graph(
        [x], [nodes[-1].outputs[0]], nodes=nodes, initializers=initializers, opset_imports={"": 20, "alphasmith": 1}
    )
    return ir.Model(graph, ir_version=10)


def answer(model: Any, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact on processors without VNNI, too
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@hypothesis.settings(deadline=None, max_examples=40)
@given(
    layout=st.sampled_from(LAYOUTS),
    outputs=st.integers(1, 9),
    channels=st.integers(1, 70),
    rank=st.integers(2, 4),
    zero=st.sampled_from((None, 0, 77, 255)),
    per_channel=st.booleans(),
    biased=st.booleans(),
    extreme=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_products_are_those_of_the_integers(
    layout: OnnxLayout,
    outputs: int,
    channels: int,
    rank: int,
    zero: int | None,
    per_channel: bool,
    biased: bool,
    extreme: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (outputs, channels), generator=generator)
    shape = (*[2] * (rank - 1), channels)
    x = torch.randn(shape, generator=generator) * 1.5
    if extreme:  # where 16 bits are not enough for two products
        codes, x = torch.full_like(codes, 127), torch.full_like(x, 100.0)
    operator = deployed(codes, zero=zero, per_channel=per_channel, seed=seed % 1000)
    bias = torch.randn(outputs, generator=generator).numpy() if biased else None
    model = product_graph(operator, rank, bias)
    assert rewrite(model, {NAME: operator}, layout).operators == (NAME,)
    least, most, middle = (-128, 127, 0) if zero is None else (0, 255, zero)
    rounded = (torch.round(x / 0.02) + middle).clamp(least, most).to(torch.int64) - middle
    exact = (rounded @ codes.t()).double() * 0.02 * operator.scale.double().reshape(-1 if per_channel else ())
    expected = exact.numpy() + (0 if bias is None else bias)
    found = answer(model, x.numpy())
    assert found.shape == expected.shape
    size = float(np.abs(exact.numpy()).max()) + (0 if bias is None else float(np.abs(bias).max()))
    assert float(np.abs(found - expected).max()) <= 2e-6 * max(size, 1e-6)


@hypothesis.settings(deadline=None)
@given(
    form=st.sampled_from(("product", "convolution", "transposed convolution")),
    unsigned=st.booleans(),
    unsigned_inputs=st.booleans(),
    groups=st.integers(1, 3),
    zero=st.sampled_from((None, 3)),
    per_channel=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_codes_come_back(
    form: Any, unsigned: bool, unsigned_inputs: bool, groups: int, zero: int | None, per_channel: bool, seed: int
) -> None:
    kind: Any = "linear" if form == "product" else "conv"
    transposed = form == "transposed convolution"
    groups = 1 if kind == "linear" else groups
    shape = (4, 6) if kind == "linear" else (2 * groups, 3 * groups, 2, 3) if transposed else (2 * groups, 3, 2, 3)
    size = matrix_shape(shape, kind, transposed, groups)
    codes = torch.randint(-128, 128, size, generator=torch.Generator().manual_seed(seed))
    operator = deployed(codes, zero=zero, per_channel=per_channel)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20})
    constants = OperatorConstants(
        GraphWriter(graph),
        Weight(operator=operator, shape=shape, form=form, groups=groups),
        unsigned_weights=unsigned,
        unsigned_inputs=unsigned_inputs,
    )
    stored = constants.weight().const_value
    # Made when it is written, and not kept: a graph of a large model holds no weight.
    assert isinstance(stored, ir.LazyTensor)
    assert stored.numpy() is not stored.numpy()
    if form != "product":
        raised = torch.from_numpy(np.array(stored.numpy())).to(torch.int16) - (128 if unsigned else 0)
        assert torch.equal(raised, from_matrix(codes.to(torch.int16), shape, kind, transposed, groups))
    for made in (constants.weight_scale(), constants.input_scale(), constants.input_zero()):
        assert made.const_value is not None
    known = {
        name: np.asarray(value.const_value.numpy()) for name, value in graph.initializers.items() if value.const_value
    }
    assert read_codes(NAME, known, operator.scheme, form, groups).digest == operator.digest


def test_a_weight_that_is_read_otherwise_is_a_float_one() -> None:
    operator = deployed(torch.arange(12).reshape(3, 4))
    model = product_graph(operator, 2, None)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    doubled = ir.node("Mul", [product.inputs[0], product.inputs[0]], name="squared")
    model.graph.insert_before(product, doubled)
    product.replace_input_with(0, doubled.outputs[0])
    for layout in LAYOUTS:
        again = ir.from_proto(ir.to_proto(model))
        done = rewrite(again, {NAME: operator}, layout)
        assert done.float_products == (NAME,)
        x = np.array([[0.02, -0.04, 0, 0.06]], np.float32)
        dense = (operator.codes.double() * operator.scale.double()).numpy()
        np.testing.assert_allclose(answer(again, x), np.square(x) @ dense.T, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        ("w4a16-g8", "ort-u8"),
        ("w4a8-channel-static", "ort-u8"),
        ("w8a8-g64-token", "ort-u8"),
        ("w8ai16-channel-static", "qdq"),
        ("wfp8afp8-channel-static", "qdq"),
        ("w8au8-channel-token", "ort-u8"),
        ("w8a8-channel-token", "qdq"),
    ],
)
def test_schemes_that_a_layout_lacks_are_named(scheme: str, layout: OnnxLayout) -> None:
    with pytest.raises(InputError, match=rf"layout {layout} cannot hold {scheme} \(a\.b\)"):
        check_scheme(Scheme.parse(scheme), layout, "a.b")


def test_what_rounds_alike_is_rounded_once() -> None:
    operator = deployed(torch.ones(3, 4))
    twin = replace(operator, name="block.other")
    model = product_graph(operator, 2, None)
    x = model.graph.inputs[0]
    told = {"operator": twin.name, "transposed": 0, "groups": 1}
    mark = ir.node("Input", [x], told, domain="alphasmith", name="input_2")
    weight = ir.node("Weight", [], told, domain="alphasmith", name="weight_2")
    weight.outputs[0].shape = ir.Shape([3, 4])
    product = ir.node("Gemm", [mark.outputs[0], weight.outputs[0]], {"transB": 1}, name="product_2")
    product.outputs[0].shape = ir.Shape(["axis_0", 3])
    for node in (mark, weight, product):
        node.outputs[0].name = f"{node.name}_value"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.append(node)
    model.graph.outputs.append(product.outputs[0])
    rewrite(model, {NAME: operator, twin.name: twin}, "ort-u8")
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "MatMulIntegerToFloat", "MatMulIntegerToFloat"]
