"""Search smoothing coefficients for quantized neural networks, with every trial on record.

One layer: ``alphasmith.search_site(x, w, scheme="w8a8-channel-static")``. A whole model: ``alphasmith.run(config, model=...,
batches=...)``, gone on with by ``alphasmith.resume``; its output folder is read by ``load_smoothed`` and ``load_quantized``, and its
compressed model is trained further by ``alphasmith.finetune``. ``alphasmith.compress`` makes a model smaller by sparse, low-rank and
codebook forms together; ``alphasmith.export`` writes a result in a format that other software loads, ``alphasmith.recipe`` a script
for another tool's quantizer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alphasmith.search import (
        Classifier,
        CompressionResult,
        ExportResult,
        Generator,
        RunConfig,
        RunResult,
        SiteResult,
        TrainingResult,
        compress,
        export,
        finetune,
        load_compressed,
        load_quantized,
        load_smoothed,
        recipe,
        resume,
        run,
        search_site,
    )

    __version__: str

__all__ = [
    "Classifier",
    "CompressionResult",
    "ExportResult",
    "Generator",
    "RunConfig",
    "RunResult",
    "SiteResult",
    "TrainingResult",
    "__version__",
    "compress",
    "export",
    "finetune",
    "load_compressed",
    "load_quantized",
    "load_smoothed",
    "recipe",
    "resume",
    "run",
    "search_site",
]


if not TYPE_CHECKING:  # else any name would do

    def __getattr__(name: str) -> Any:
        # Imported when it is asked for (PEP 562): every `import alphasmith.x.y` runs this file.
        if name == "__version__":
            return import_module("importlib.metadata").version("alphasmith")
        if name in __all__:
            return getattr(import_module("alphasmith.search"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
