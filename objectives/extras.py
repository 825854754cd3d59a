"""Packages that only some installations have: what each extra of the project brings."""

from __future__ import annotations

import importlib.util
from typing import Final, Literal

from alphasmith.objectives.errors import InputError

Extra = Literal["onnx", "ray", "s3", "serve"]

#: Modules of each extra, those that are told first in front. ``torch.onnx`` writes through the three of ``onnx``.
MODULES: Final[dict[Extra, tuple[str, ...]]] = {
    "onnx": ("onnx", "onnx_ir", "onnxscript"),
    "ray": ("ray",),
    "s3": ("boto3",),
    "serve": ("fastapi", "fastapi_offline", "prometheus_client", "python_multipart", "uvicorn"),
}


def require_extra(field: str, extra: Extra) -> None:
    """Refuse work that needs an extra where it is not installed; nothing of it is imported.

    Args:
        field: What asks for it: a configuration field, an option, a command.
        extra: Its name in ``pip install 'alphasmith[NAME]'``.

    Raises:
        InputError: Names the field, and the first module that is missing.
    """
    missing = [name for name in MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(field, f"{missing[0]} is not installed", f"pip install 'alphasmith[{extra}]'")
