"""Settings of the search at a site."""

from __future__ import annotations

from dataclasses import dataclass

from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.config import GroupsConfig, SearchConfig
from alphasmith.search.study.candidates import Candidate


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """Settings of the search at one site; all but the last two are the same at every site of a run.

    Attributes:
        scheme: Quantization scheme.
        groups: Grouping and range settings.
        search: Trials, sampler, pruner, seed.
        rho: Scarcity of the target hardware (fA7).
        budget: Memory for the buffers of each judge [bytes]; None: 512 MiB, or what one candidate needs.
        shiftable: Whether the site's input may be shifted, see ``Site.shiftable``.
        reused: The winner of an earlier search at this site and scheme, to start from; left out where it does not fit.
    """

    scheme: Scheme
    groups: GroupsConfig
    search: SearchConfig
    rho: float = 0.0
    budget: int | None = None
    shiftable: bool = True
    reused: Candidate | None = None
