"""What is tried, where, and in which order: configuration, hardware, ranges, studies, the run and its command line.

- ``budget``: what the formats of sites may cost
- ``checkpoints``: what a user does with an output folder: load, verify, undo
- ``cli``: the command line and its texts
- ``compression``: joint compression of a model
- ``config``: the configuration of a run: frozen, validated, read from TOML, keyword arguments or both
- ``devices``: what a search runs on: its device, and how many CPU threads a piece of work deserves
- ``engines``: where candidates are evaluated: in this process, in worker processes, on a Ray cluster
- ``exports``: formats that other tools read
- ``formats``: formats of sites under a budget: predicted, solved, measured, picked
- ``idle_threads``: how idle threads of the numeric libraries wait, settled before torch is imported
- ``inputs``: what a run works on: model and data, sites, hardware, calibration
- ``interruption``: interrupts: the first Ctrl-C stops a run in good order, the second one at once
- ``large_pages``: memory pages of large tensors, settled before torch is imported
- ``launch``: one run from first to last line: launch, go on, outcome, manifest, record
- ``model``: the model's output: whole-model search, refinement, variants
- ``processing``: the compressed model at work: media in, classes or text out
- ``progress``: progress of a run: bars on a terminal, plain lines elsewhere, nothing for scripts
- ``sections``: what every configuration is made of: sections that validate themselves, and the types of their fields
- ``site``: the search of one site: parametrizations, proposals, exact scores, result
- ``study``: one Optuna study of anything: candidates, space, sampler, record
- ``toml_values``: TOML files and ``section.field=value`` overrides as nested values that a configuration is made from
- ``training``: a compressed model trained further on labelled media
- ``work``: sites handed out: plan, sources, stage, accepted results, the session under a lease
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alphasmith.search.checkpoints.load import load_quantized, load_smoothed
    from alphasmith.search.compression.artifact import load_compressed
    from alphasmith.search.compression.compress import CompressionResult, compress
    from alphasmith.search.config import RunConfig
    from alphasmith.search.exports.export import ExportResult, export
    from alphasmith.search.exports.recipes.recipe import recipe
    from alphasmith.search.launch.pipeline import resume, run
    from alphasmith.search.launch.recorder import RunResult
    from alphasmith.search.processing.classifier import Classifier
    from alphasmith.search.processing.generator import Generator
    from alphasmith.search.site.result import SiteResult
    from alphasmith.search.site.search import search_site
    from alphasmith.search.training.finetune import TrainingResult, finetune

__all__ = [
    "Classifier",
    "CompressionResult",
    "ExportResult",
    "Generator",
    "RunConfig",
    "RunResult",
    "SiteResult",
    "TrainingResult",
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

#: Where each name is. Imported when it is asked for: `alphasmith list` must not wait for torch, a worker not for transformers.
_HOMES = {
    "Classifier": "processing.classifier",
    "CompressionResult": "compression.compress",
    "ExportResult": "exports.export",
    "Generator": "processing.generator",
    "RunConfig": "config",
    "RunResult": "launch.recorder",
    "SiteResult": "site.result",
    "TrainingResult": "training.finetune",
    "compress": "compression.compress",
    "export": "exports.export",
    "finetune": "training.finetune",
    "load_compressed": "compression.artifact",
    "load_quantized": "checkpoints.load",
    "load_smoothed": "checkpoints.load",
    "recipe": "exports.recipes.recipe",
    "resume": "launch.pipeline",
    "run": "launch.pipeline",
    "search_site": "site.search",
}


if not TYPE_CHECKING:  # else any name would do

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
