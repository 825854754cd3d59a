"""The matrix (O, D) that an operator multiplies with its rows, out of its weight as it is stored, and back.

Shapes: O outputs; D = C linear inputs, or C / groups input channels of a convolution times its K kernel elements. A
transposed convolution is the plain one of its input with zeros between the positions, its kernel turned around.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from alphasmith.objectives.sites.types import OperatorKind


def matrix_shape(shape: Sequence[int], kind: OperatorKind, transposed: bool, groups: int) -> tuple[int, int]:
    """(O, D) of a weight.

    Args:
        shape: Of the weight as stored.
        kind: ``linear`` or ``conv``.
        transposed: The weight is stored (in, out).
        groups: Convolution groups.
    """
    kernel = math.prod(shape[2:])
    if not transposed:
        return shape[0], shape[1] * kernel
    return (shape[1], shape[0]) if kind == "linear" else (shape[1] * groups, shape[0] // groups * kernel)


def as_matrix(weight: Tensor, kind: OperatorKind, transposed: bool, groups: int) -> Tensor:
    """(O, D) of a weight; a view where there is one.

    Args:
        weight: As stored: (O, D), (O, C / groups, *kernel), or (C, O / groups, *kernel) and (D, O) when ``transposed``.
        kind: See :func:`matrix_shape`.
        transposed: See :func:`matrix_shape`.
        groups: See :func:`matrix_shape`.
    """
    if not transposed:
        return weight.flatten(1)
    if kind == "linear":
        return weight.t()
    outputs, inputs = matrix_shape(weight.shape, kind, transposed, groups)
    blocks = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return blocks.flip(tuple(range(3, blocks.dim()))).reshape(outputs, inputs)


def from_matrix(matrix: Tensor, shape: Sequence[int], kind: OperatorKind, transposed: bool, groups: int) -> Tensor:
    """The inverse of :func:`as_matrix`.

    Args:
        matrix: (O, D).
        shape: Of the weight as stored.
        kind: See :func:`matrix_shape`.
        transposed: See :func:`matrix_shape`.
        groups: See :func:`matrix_shape`.
    """
    if not transposed:
        return matrix.reshape(tuple(shape))
    if kind == "linear":
        return matrix.t()
    blocks = matrix.reshape(groups, shape[1], shape[0] // groups, *shape[2:])
    return blocks.flip(tuple(range(3, blocks.dim()))).transpose(1, 2).reshape(tuple(shape))
