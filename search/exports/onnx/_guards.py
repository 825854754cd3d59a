"""The one place that touches private names of ``torch.export``."""

from __future__ import annotations

import torch


def unguarded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without its checks of input sizes, which have no form in ONNX, and whose decomposition fails where an input is not used."""
    if hasattr(program, "_guards_code"):  # a torch without them checks nothing there
        setattr(program, "_guards_code", [])  # noqa: B010  no public name removes them
    return program
