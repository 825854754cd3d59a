"""The one place that touches private names of ``torch.export``."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: Steps of a loop that a guard tells of. torch asks of every size whether it is 0 or 1, which a small example's often is.
_LEAST = 2


def unguarded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without its checks of input sizes, which have no form in ONNX, and whose decomposition fails where an input is not used."""
    if hasattr(program, "_guards_code"):  # a torch without them checks nothing there
        setattr(program, "_guards_code", [])  # noqa: B010  no public name removes them
    return program


def unrolled_axes(program: torch.export.ExportedProgram, inputs: Sequence[Tensor]) -> frozenset[tuple[int, int]]:
    """Axes that a program says may have any size, while it was traced for a number that follows from it: frames of a waveform, say.

    A loop over such a number has become as many steps. Guards tell: something computed from a size is a constant, and would not be of an
    input twice as long. Guards of reshaped axes (``size // (size // 4) == 4``) hold for that one, too.

    Args:
        program: Traced, with its guards; of one argument, a sequence of tensors.
        inputs: The tensors.

    Returns:
        Tensor and axis, by their places.
    """
    twice = [torch.empty([2 * size for size in tensor.shape], device="meta") for tensor in inputs]
    found = (axis for guard in getattr(program, "_guards_code", []) for axis in _held(guard, twice))
    return frozenset(found)


def _held(guard: str, inputs: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """The axes of a guard that holds a computed size to a number that it has not for these inputs."""
    try:
        told = ast.parse(guard.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError):  # deeper than Python reads: borders of paddings in a row
        return
    match told.body:
        case ast.Compare(left=side, ops=[ast.Eq()], comparators=[ast.Constant(value=int(number))]):
            pass
        case ast.Compare(left=ast.Constant(value=int(number)), ops=[ast.Eq()], comparators=[side]):
            pass
        case _:
            return
    if number < _LEAST:
        return
    # That a size leaves a remainder is true of many.
    if isinstance(side, ast.BinOp) and not isinstance(side.op, ast.Mod) and not _true(told, inputs):
        yield from _axes(side)


def _true(guard: ast.Expression, inputs: Sequence[Tensor]) -> bool:
    names = {"L": defaultdict(lambda: inputs), "max": max, "min": min, "__builtins__": {}}
    try:
        return bool(eval(compile(guard, "guard", "eval"), names))
    except (NameError, ArithmeticError):
        return True


def _axes(node: ast.expr) -> Iterator[tuple[int, int]]:
    """Every ``L['name'][tensor].size()[axis]`` in an expression."""
    for part in ast.walk(node):
        match part:
            case ast.Subscript(
                value=ast.Call(
                    func=ast.Attribute(attr="size", value=ast.Subscript(slice=ast.Constant(value=int(tensor))))
                ),
                slice=ast.Constant(value=int(axis)),
            ):
                yield tensor, axis
