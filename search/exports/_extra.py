"""Whether the packages of an extra are installed; free of them."""

from __future__ import annotations

from importlib.util import find_spec

from alphasmith.objectives.errors import InputError

#: What ``torch.onnx`` needs beside torch.
_ONNX = ("onnx", "onnx_ir", "onnxscript")


def require_onnx() -> None:
    """Refuse work with ONNX models where the extra is missing.

    Raises:
        InputError: Field ``--format``.
    """
    missing = [name for name in _ONNX if find_spec(name) is None]
    if missing:
        raise InputError("--format", f"{missing[0]} is not installed", "pip install 'alphasmith[onnx]'")
