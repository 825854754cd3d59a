"""Marked operators of a traced graph in the nodes of a layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from alphasmith.objectives.literals import OnnxLayout
from alphasmith.search.exports.onnx._codes import Form, OperatorConstants, Weight
from alphasmith.search.exports.onnx._graph import MICROSOFT, GraphWriter, replace
from alphasmith.search.exports.onnx._layouts import check_scheme
from alphasmith.search.exports.onnx._products import Codes, Products
from alphasmith.search.exports.onnx._rounded_sums import round_sum
from alphasmith.search.exports.onnx._tracing import DOMAIN
from alphasmith.search.exports.onnx.convolutions import (
    Convolutions,
    channels_first,
    copied_windows,
    padded,
    padding_of,
    side_by_side,
    windows,
    worth_copying,
)
from alphasmith.search.exports.source import DeployedOperator


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """What became of a graph.

    Attributes:
        operators: Names of those whose integers it holds.
        float_products: Of these, the ones whose product is a float one of dequantized values, since the layout has none for it.
        float_sums: Convolutions of ``qdq`` that ONNX Runtime computes in float, since nothing rounds their sum; other readers of QDQ
            models, such as OpenVINO, find integers in them.
    """

    operators: tuple[str, ...]
    float_products: tuple[str, ...]
    float_sums: tuple[str, ...]


def rewrite(model: ir.Model, operators: Mapping[str, DeployedOperator], layout: OnnxLayout) -> Rewritten:
    """Put integers into a traced graph.

    Args:
        model: With marked operators; changed in place.
        operators: By name.
        layout: Of the export.

    Raises:
        InputError: A scheme that the layout lacks.
    """
    work = _Rewriting(model.graph, operators, layout)
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == "Input":
            work.round_input(node)
    for node in list(model.graph):
        if node.op_type in ("MatMul", "Gemm", "Conv") and node.graph is not None:
            work.rewrite_product(node)
    for node in list(model.graph):
        if node.domain == DOMAIN:
            work.dequantize(node)
    float_sums = work.round_sums()
    model.opset_imports.pop(DOMAIN, None)
    if layout != "qdq":
        model.opset_imports[MICROSOFT] = 1
    return Rewritten(
        operators=tuple(dict.fromkeys(work.used)),
        float_products=tuple(dict.fromkeys(work.floating)),
        float_sums=tuple(dict.fromkeys(float_sums)),
    )


class _Rewriting:
    def __init__(self, graph: ir.Graph, operators: Mapping[str, DeployedOperator], layout: OnnxLayout) -> None:
        self._operators = operators
        self._layout = layout
        self._writer = GraphWriter(graph)
        self._products = Products(self._writer, layout)
        self._convolutions = Convolutions(self._writer, layout)
        self._inputs: dict[ir.Value, tuple[Codes, str]] = {}
        self._between: list[tuple[ir.Node, DeployedOperator]] = []
        self.used: list[str] = []
        self.floating: list[str] = []

    def round_input(self, node: ir.Node) -> None:
        """Put the codes of an input in front of the node that marks it."""
        operator = self._operators[_name(node)]
        check_scheme(operator.scheme, self._layout, operator.name)
        # Of the weight only the operator counts here.
        constants = self._constants(operator, (), "product", 1)
        x = node.inputs[0]
        rank = len(node.outputs[0].shape or ())
        axes = tuple(range(1, rank)) if operator.kind == "conv" else (-1,)
        if x is not None:
            codes = self._products.rounded(node, x, operator, constants, axes)
            self._inputs[node.outputs[0]] = (codes, operator.name)

    def rewrite_product(self, node: ir.Node) -> None:
        """Replace a float product or convolution of a marked input and a marked weight."""
        mark, turned = _weight_of(node.inputs[1])
        padding = padding_of(node) if node.op_type == "Conv" else None
        x = node.inputs[0] if padding is None else padding.inputs[0]
        found = self._inputs.get(x) if x is not None else None
        if found is None or mark is None or found[1] != _name(mark):
            return
        operator = self._operators[found[1]]
        shape = _shape(mark)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if node.op_type == "Conv":
            if turned or (bias is not None and bias.const_value is None):
                return
            if padding is None and side_by_side(node, shape):
                value = self._product_of_windows(node, found[0], shape, bias, operator)
            else:
                codes = found[0]
                if padding is not None:
                    codes = padded(self._writer, node, codes, padding, operator.name)
                if worth_copying(node, shape, self._layout):
                    value = self._product_of_copies(node, codes, shape, bias, operator)
                else:
                    value = self._convolution(node, codes, mark, bias, operator)
        else:
            turned ^= node.op_type == "Gemm" and bool(_integer(node, "transB"))
            # The stored matrix is (C, O): that of a float weight stored (in, out) as it is, else turned.
            if turned == bool(mark.attributes["transposed"].as_int()) or not _plain_gemm(node):
                return
            constants = self._constants(operator, shape, "product", 1, self._copy(operator))
            last = node
            if bias is None and node.op_type == "MatMul":
                bias, last = _added_bias(node)
            value = self._products.product(last, found[0], bias, operator, constants)
            if last is not node:
                replace(last, value)
                node.graph.remove(node, safe=True)
                self._forget(mark, operator)
                return
        replace(node, value)
        if padding is not None and not padding.outputs[0].uses() and not padding.outputs[0].is_graph_output():
            padding.graph.remove(padding, safe=True)
        self._forget(mark, operator)

    def _convolution(
        self, node: ir.Node, x: Codes, mark: ir.Node, bias: ir.Value | None, operator: DeployedOperator
    ) -> ir.Value:
        groups = mark.attributes["groups"].as_int()
        constants = self._constants(operator, _shape(mark), "convolution", groups, self._copy(operator))
        value = self._convolutions.convolution(node, x, bias, operator, constants)
        made = value.producer()
        if self._layout == "qdq" and made is not None:
            self._between.append((made, operator))
        return value

    def _product_of_copies(
        self, node: ir.Node, x: Codes, shape: tuple[int, ...], bias: ir.Value | None, operator: DeployedOperator
    ) -> ir.Value:
        rows = copied_windows(self._writer, node, x, shape, f"{operator.name}.windows")
        constants = self._constants(operator, shape, "windows", 1)
        product = self._products.product(node, rows, bias, operator, constants)
        return channels_first(self._writer, node, product, len(shape) - 2, operator.name)

    def _product_of_windows(
        self, node: ir.Node, x: Codes, shape: tuple[int, ...], bias: ir.Value | None, operator: DeployedOperator
    ) -> ir.Value:
        constants = self._constants(operator, shape, "product", 1, self._copy(operator))
        producer, source = x.codes.producer(), x.codes
        # In qdq the values are rearranged, not the codes: ONNX Runtime finds a product of integers where QuantizeLinear and
        # DequantizeLinear follow each other.
        values = None if self._layout != "qdq" or producer is None else producer.inputs[0]
        rows = windows(self._writer, node, values or source, shape, operator.name)
        codes = (
            dataclasses.replace(x, codes=rows)
            if values is None
            else self._products.rounded(node, rows, operator, constants, (-1,))
        )
        product = self._products.product(node, codes, bias, operator, constants)
        return channels_first(self._writer, node, product, len(shape) - 2, operator.name)

    def round_sums(self) -> list[str]:
        """Round sums of convolutions where that changes nothing; names of those whose sum stays float."""
        return [operator.name for node, operator in self._between if not round_sum(self._writer, node, operator)]

    def dequantize(self, node: ir.Node) -> None:
        """Replace what is left of a mark: dequantized values where something reads them, nothing else."""
        output = node.outputs[0]
        if not output.uses() and not output.is_graph_output():
            node.graph.remove(node, safe=True)
            return
        operator = self._operators[_name(node)]
        self.used.append(operator.name)
        self.floating.append(operator.name)
        if node.op_type == "Input":
            codes, _ = self._inputs[output]
            replace(node, self._products.dequantized(node, codes, operator))
        else:
            replace(node, self._dense(node, operator))

    def _dense(self, mark: ir.Node, operator: DeployedOperator) -> ir.Value:
        """A weight as the float operator has it."""
        shape, groups = _shape(mark), mark.attributes["groups"].as_int()
        transposed = bool(mark.attributes["transposed"].as_int())
        form: Form = "product"
        if len(shape) > 2:
            form = "transposed convolution" if transposed else "convolution"
        constants = self._constants(operator, shape, form, groups)
        node, name = self._writer.node, f"{operator.name}.weight"
        grouped = form == "transposed convolution" and groups > 1
        if form != "product" and not grouped:
            codes = [constants.weight(), constants.weight_scale(), constants.weight_zero(per_channel=True)]
            return node(mark, "DequantizeLinear", codes, name, axis=1 if transposed else 0)
        # Of DequantizeLinear and MatMul, ONNX Runtime makes a product with rounded activations. And of a transposed convolution in
        # groups, (C, O / groups, *kernel), no single axis has the output channels.
        to = int(ir.DataType.FLOAT)
        zero = node(mark, "Cast", [constants.weight_zero(per_channel=False)], f"{name}_zero", to=to)
        counts = node(
            mark, "Sub", [node(mark, "Cast", [constants.weight()], f"{name}_raised", to=to), zero], f"{name}_counts"
        )
        if not grouped:
            dense = node(mark, "Mul", [counts, constants.weight_scale()], name)
            return dense if transposed else node(mark, "Transpose", [dense], f"{name}_turned", perm=[1, 0])
        apart = self._writer.constant(f"{name}_groups", np.array([groups, shape[0] // groups, *shape[1:]], np.int64))
        whole = self._writer.constant(f"{name}_shape", np.array(shape, np.int64))
        scaled = [node(mark, "Reshape", [counts, apart], f"{name}_apart"), constants.scale_of_groups()]
        return node(mark, "Reshape", [node(mark, "Mul", scaled, f"{name}_scaled"), whole], name)

    def _constants(
        self, operator: DeployedOperator, shape: tuple[int, ...], form: Form, groups: int, copy: int = 0
    ) -> OperatorConstants:
        weight = Weight(operator=operator, shape=shape, form=form, groups=groups)
        return OperatorConstants(
            self._writer,
            weight,
            # Signed weights only make products faster: ONNX Runtime has no fast convolution for them.
            unsigned_weights=self._layout == "ort-u8"
            or (self._layout == "ort-s8" and form not in ("product", "windows")),
            unsigned_inputs=self._layout != "qdq",
            copy=copy,
        )

    def _copy(self, operator: DeployedOperator) -> int:
        """Which copy of its constants a call of an operator reads: ONNX Runtime raises signed codes in place, and only once."""
        return self.used.count(operator.name) if self._layout == "qdq" else 0

    def _forget(self, mark: ir.Node, operator: DeployedOperator) -> None:
        self.used.append(operator.name)
        for turned in [use.node for use in mark.outputs[0].uses()]:
            if turned.op_type == "Transpose" and not turned.outputs[0].uses():
                turned.graph.remove(turned, safe=True)


def _name(mark: ir.Node) -> str:
    return str(mark.attributes["operator"].as_string())


def _shape(mark: ir.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in mark.outputs[0].shape or ())


def _integer(node: ir.Node, attribute: str) -> int:
    found = node.attributes.get(attribute)
    return 0 if found is None else found.as_int()


def _plain_gemm(node: ir.Node) -> bool:
    """Whether a product adds its bias as it is, and reads its input as it is."""
    factors = [node.attributes.get(name) for name in ("alpha", "beta")]
    return not _integer(node, "transA") and all(factor is None or factor.as_float() == 1 for factor in factors)


def _weight_of(value: ir.Value | None) -> tuple[ir.Node | None, bool]:
    """The mark that a weight comes out of, and whether it was turned around on its way."""
    node = None if value is None else value.producer()
    turned = False
    if node is not None and node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]:
        source = node.inputs[0]
        node, turned = (None if source is None else source.producer()), True
    return (node, turned) if node is not None and node.domain == DOMAIN and node.op_type == "Weight" else (None, False)


def _added_bias(product: ir.Node) -> tuple[ir.Value | None, ir.Node]:
    """The vector that is added to a product and nothing else reads, and the node that adds it; None and the product: none."""
    uses = list(product.outputs[0].uses())
    if len(uses) == 1 and not product.outputs[0].is_graph_output() and uses[0].node.op_type == "Add":
        node = uses[0].node
        other = node.inputs[1 - uses[0].idx]
        columns = (product.outputs[0].shape or [None])[-1]
        if other is not None and other.const_value is not None and list(other.const_value.shape) == [columns]:
            return other, node
    return None, product
