"""Nodes and initializers put into a traced graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

#: Of operators that ONNX Runtime has beyond the standard.
MICROSOFT = "com.microsoft"


class GraphWriter:
    """Puts nodes in front of one that they are to replace; a constant is stored once under a name.

    Args:
        graph: Changed in place.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._used: dict[str, int] = {}

    def constant(self, name: str, value: NDArray[Any]) -> ir.Value:
        """An initializer; the one that is there where the name was given before.

        Args:
            name: Unique in the graph.
            value: Any shape, () too.
        """
        known = self.graph.initializers.get(name)
        if known is not None:
            return known
        return self._initializer(name, ir.tensor(np.ascontiguousarray(value).reshape(value.shape), name=name))

    def late_constant(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], value: Callable[[], NDArray[Any]]
    ) -> ir.Value:
        """As :meth:`constant`, of a large value that is made each time it is read, and not kept: a graph holds none of it.

        Args:
            name: Unique in the graph.
            dtype: Of the value.
            shape: Of the value.
            value: Makes it.
        """
        known = self.graph.initializers.get(name)
        if known is not None:
            return known

        def made() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(value()), name=name)

        return self._initializer(name, ir.LazyTensor(made, dtype, ir.Shape(shape), name=name))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        made = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(made)
        return made

    def node(
        self,
        before: ir.Node,
        operation: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        dtype: ir.DataType | None = None,
        **attributes: float | str | Sequence[int],
    ) -> ir.Value:
        """The output of a new node.

        Args:
            before: What it is put in front of.
            operation: Type of the node.
            inputs: None: an optional one that is left out.
            name: Of the node and its output, made unique by a number.
            domain: Of the operation; empty: standard ONNX.
            dtype: Of the output; None: float32.
            attributes: Of the node.
        """
        count = self._used.get(name, 0)
        self._used[name] = count + 1
        full = f"{name}_{count}" if count else name
        typed: Mapping[str, Any] = attributes
        made = ir.node(operation, inputs, attributes=typed, domain=domain, name=full)
        output = made.outputs[0]
        output.name = full
        output.type = ir.TensorType(dtype or ir.DataType.FLOAT)
        self.graph.insert_before(before, made)
        return output


def replace(old: ir.Node, value: ir.Value) -> None:
    """Let a value stand for the only output of a node, and take the node away.

    Args:
        old: In a graph.
        value: Of another node.
    """
    output = old.outputs[0]
    value.shape = output.shape
    if output.is_graph_output():
        # An output of a graph keeps its name.
        output.name, value.name = f"{output.name}_before", output.name
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    old.graph.remove(old, safe=True)
