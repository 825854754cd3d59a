"""What is tried, where, and in which order: configuration, hardware, ranges, studies, the run and its command line."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alphasmith.search.config import RunConfig
    from alphasmith.search.pipeline import resume, run
    from alphasmith.search.recorder import RunResult
    from alphasmith.search.reload import load_quantized, load_smoothed
    from alphasmith.search.site_result import SiteResult
    from alphasmith.search.site_search import search_site

__all__ = [
    "RunConfig",
    "RunResult",
    "SiteResult",
    "load_quantized",
    "load_smoothed",
    "resume",
    "run",
    "search_site",
]

#: Where each name is. Imported when it is asked for: `alphasmith list` must not wait for torch, a worker not for transformers.
_HOMES = {
    "RunConfig": "config",
    "RunResult": "recorder",
    "SiteResult": "site_result",
    "load_quantized": "reload",
    "load_smoothed": "reload",
    "resume": "pipeline",
    "run": "pipeline",
    "search_site": "site_search",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
