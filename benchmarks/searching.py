"""One search of one site with given settings, and what it cost in matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optuna
from torch.utils._python_dispatch import TorchDispatchMode

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search import RunConfig, SiteResult
from alphasmith.search.site.search import search_data
from alphasmith.search.site.settings import SiteSettings

#: Positions of the two factors among the arguments of every product that PyTorch dispatches.
_FACTORS = {"mm": 0, "bmm": 0, "_int_mm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}


class ProductCounter(TorchDispatchMode):
    """Counts the multiply-adds of all matrix products made inside the block, whoever makes them.

    Attributes:
        multiply_adds: Counted so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.multiply_adds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count ``func`` if it is a product, and do it."""
        first = _FACTORS.get(func.overloadpacket.__name__)
        if first is not None:
            left, right = args[first], args[first + 1]
            self.multiply_adds += left.numel() * (right.shape[-1] if right.dim() > 1 else 1)
        return func(*args, **(kwargs or {}))


def product_size(data: SiteData) -> int:
    """Multiply-adds of one product of a site's rows with its weights."""
    return sum(part.x.shape[0] * part.weight.numel() for part in data.parts)


def settings(*, groups: Mapping[str, Any] | None = None, search: Mapping[str, Any] | None = None) -> RunConfig:
    """Defaults of the house, changed in the sections given."""
    return RunConfig.build({"groups": dict(groups or {}), "search": dict(search or {})})


def searched(
    data: SiteData, held_out: SiteData, scheme: Scheme, config: RunConfig, *, shiftable: bool = True
) -> SiteResult:
    """Search one site in memory with the settings of ``config``."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it logs a line per study
    return search_data(
        data,
        held_out,
        SiteSettings(scheme=scheme, groups=config.groups, search=config.search, shiftable=shiftable),
    )


def thinned(data: SiteData, every: int) -> SiteData:
    """Every ``every``-th row of a site of linear operators."""
    parts = tuple(replace(part, x=part.x[::every].contiguous()) for part in data.parts)
    return replace(data, parts=parts)
