"""The search of one site, wherever it runs: the one function every engine calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.objectives.site_data import to_device
from alphasmith.search.engines.types import Ended, SiteWork
from alphasmith.search.interruption import Interrupted
from alphasmith.search.site_search import search_data
from alphasmith.search.study_log import StudyLog
from alphasmith.search.survival import free_memory, is_out_of_memory

_LOGGER = logging.getLogger("alphasmith")
#: Buffers of a judge unless a budget is given, and by what they shrink where there is no memory for them [bytes].
_BUFFERS, _SHRINK = 2**29, 4


def perform(work: SiteWork, log: StudyLog, *, device: str | None, stop: Callable[[], bool]) -> Ended:
    """Search one site; whatever happens is told, nothing is raised.

    Where memory runs out the search is made once more with smaller buffers; it goes on from the trials that were told.

    Args:
        work: What to search.
        log: Keeps the study.
        device: Torch device of the search; None: the CPU.
        stop: Asked before every batch of candidates whether to leave.
    """
    try:
        return _search(work, log, device, stop)
    except Interrupted:
        return Ended(site=work.site, stopped=True)
    except AlphasmithError as error:
        return Ended(site=work.site, reason=str(error))
    except Exception as error:
        if not is_out_of_memory(error):
            _LOGGER.exception("the search at site %s failed", work.site)
            return Ended(site=work.site, reason=f"{type(error).__name__}: {' '.join(str(error).split())}")
    free_memory()
    smaller = replace(work, budget=(work.budget or _BUFFERS) // _SHRINK)  # the log knows what was found meanwhile
    try:
        return _search(smaller, log, device, stop)
    except Interrupted:
        return Ended(site=work.site, stopped=True)
    except Exception as error:  # noqa: BLE001  as above; this time it is final
        text = " ".join(str(error).split())
        return Ended(site=work.site, reason=f"out of memory, with smaller buffers too ({text})")


def _search(work: SiteWork, log: StudyLog, device: str | None, stop: Callable[[], bool]) -> Ended:
    data, held_out = (to_device(part, device or "cpu") for part in (work.data, work.held_out))
    result = search_data(
        data,
        held_out,
        scheme=work.scheme,
        groups=work.groups,
        search=work.search,
        rho=work.rho,
        log=log,
        study_name=work.study_name,
        shiftable=work.shiftable,
        budget=work.budget,
        reused=work.reused,
        stop=stop,
    )
    return Ended(site=work.site, result=result.cpu())
