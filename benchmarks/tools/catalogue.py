"""The tools that are compared, with the settings that are theirs by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One way of one tool to choose scales.

    Attributes:
        name: What its rows are called.
        environment: Of which environment it is; several ways share one.
        adapter: Module of its adapter.
        settings: Beyond the tool's defaults.
    """

    name: str
    environment: str
    adapter: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def requirements(self) -> Path:
        """The file of what is installed for it."""
        return _FOLDER / "requirements" / f"{self.environment}.txt"

    @property
    def folder_name(self) -> str:
        """The name in letters that every file system takes."""
        return "".join(c if c.isalnum() else "_" for c in self.name.lower())


_COMPRESSOR = "benchmarks.tools.adapters.llm_compressor"

TOOLS = (
    Tool(
        name="Neural Compressor, auto alpha",
        environment="neural_compressor",
        adapter="benchmarks.tools.adapters.neural_compressor_auto",
    ),
    Tool(name="llm-compressor SmoothQuant 0.5", environment="llm_compressor", adapter=_COMPRESSOR),
    Tool(
        name="llm-compressor SmoothQuant 0.8",
        environment="llm_compressor",
        adapter=_COMPRESSOR,
        settings={"smoothing_strength": 0.8},
    ),
    Tool(
        name="torchao SmoothQuant 0.5",
        environment="torchao",
        adapter="benchmarks.tools.adapters.torchao_smoothquant",
    ),
)
