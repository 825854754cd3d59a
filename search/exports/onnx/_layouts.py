"""Which schemes a layout holds."""

from __future__ import annotations

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import OnnxLayout
from alphasmith.objectives.quantization.scheme import Scheme


def check_scheme(scheme: Scheme, layout: OnnxLayout, operator: str) -> None:
    """Refuse a scheme that a layout has no nodes for.

    Args:
        scheme: Of an operator.
        layout: See :func:`~alphasmith.search.exports.export.export`.
        operator: Name, for the error.

    Raises:
        InputError: Field ``--format``.
    """
    refusal = ""
    if scheme.weights not in ("int8", "int7"):
        refusal = "weights are held with 8 bits, as integers"
    elif scheme.weight_granularity == "group":
        refusal = "weights are held per tensor or per channel"
    elif scheme.activations not in ("int8", "uint8"):
        refusal = "activations are held with 8 bits, as integers"
    elif scheme.asymmetric and not scheme.static:
        refusal = "a zero point found at run time has no place"
    elif layout == "qdq" and not scheme.static:
        refusal = "QuantizeLinear takes a scale that is known beforehand"
    if refusal:
        other = "--layout ort-u8, or " if not scheme.static and layout == "qdq" and not scheme.is_float else ""
        raise InputError(
            "--format",
            f"onnx in layout {layout} cannot hold {scheme.name} ({operator}): {refusal}",
            f"give {other}a run with scheme w8a8-channel-static",
        )
