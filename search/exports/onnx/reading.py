"""The operators of an exported graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from alphasmith.objectives.errors import IntegrityError
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.exports.onnx._codes import WEIGHT, Form, read_codes
from alphasmith.search.exports.source import DeployedOperator


class OnnxOperators:
    """The integer operators of exported files.

    Args:
        files: ``.onnx`` files, with their weights inside or beside them.

    Raises:
        IntegrityError: One cannot be read.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._graphs = [_read(file) for file in files]

    def read(self, name: str, scheme: Scheme) -> list[DeployedOperator]:
        """An operator as every graph holds it that does.

        Args:
            name: Of its module.
            scheme: Its number formats.

        Raises:
            KeyError: No graph holds it, or not whole.
        """
        codes = f"{name}.{WEIGHT}"
        holding = [graph for graph in self._graphs if codes in graph.initializers]
        if not holding:
            raise KeyError(codes)
        return [_operator(graph, name, scheme) for graph in holding]


def _read(file: Path) -> ir.Graph:
    try:
        return ir.load(file).graph
    except Exception as error:  # protobuf raises errors of its own
        raise IntegrityError(f"{file} is no ONNX model") from error


def _operator(graph: ir.Graph, name: str, scheme: Scheme) -> DeployedOperator:
    found: dict[str, NDArray[Any]] = {}
    for leaf in (value for value in graph.initializers if value.startswith(f"{name}.")):
        stored = graph.initializers[leaf].const_value
        if stored is not None:
            found[leaf] = np.asarray(stored.numpy())
    form, groups = _use(graph.initializers[f"{name}.{WEIGHT}"])
    return read_codes(name, found, scheme, form, groups)


def _use(codes: ir.Value) -> tuple[Form, int]:
    """What becomes of a weight, and in how many groups."""
    if len(codes.shape or ()) == 2:
        return "product", 1
    open_: list[ir.Value] = [codes]
    for value in open_:
        for use in value.uses():
            if use.node.op_type in ("Conv", "ConvInteger"):
                return "convolution", 1
            if use.node.op_type in ("MatMulInteger", "MatMulIntegerToFloat"):
                return "windows", 1
            if use.node.op_type == "ConvTranspose":
                group: Mapping[str, ir.Attr] = use.node.attributes
                return "transposed convolution", group["group"].as_int() if "group" in group else 1
            open_ += use.node.outputs
    return "convolution", 1
