"""What is tried, where, and in which order: configuration, hardware, ranges, studies, the run and its command line."""

from __future__ import annotations

from alphasmith.search.config import RunConfig
from alphasmith.search.pipeline import run
from alphasmith.search.recorder import RunResult
from alphasmith.search.reload import load_quantized, load_smoothed
from alphasmith.search.site_result import SiteResult
from alphasmith.search.site_search import search_site

__all__ = ["RunConfig", "RunResult", "SiteResult", "load_quantized", "load_smoothed", "run", "search_site"]
