"""The search of one site, wherever it runs: the one function every engine calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from alphasmith.objectives.calibration.site_data import to_device
from alphasmith.objectives.errors import AlphasmithError
from alphasmith.objectives.text import error_line, one_line
from alphasmith.search.engines.types import SearchEnd, SiteWork
from alphasmith.search.interruption import Interrupted
from alphasmith.search.site.search import search_data
from alphasmith.search.study.fault_isolation import free_memory, is_out_of_memory
from alphasmith.search.study.study_record import StudyLog

_LOGGER = logging.getLogger("alphasmith")
#: Buffers of a judge unless a budget is given, and by what they shrink where there is no memory for them [bytes].
_BUFFERS, _SHRINK = 2**29, 4


def perform(work: SiteWork, log: StudyLog, *, device: str | None, stop: Callable[[], bool]) -> SearchEnd:
    """Search one site; every outcome is returned, nothing is raised.

    Where memory runs out the search is made once more with smaller buffers; it goes on from the trials that were recorded.

    Args:
        work: What to search.
        log: Keeps the study.
        device: Torch device of the search; None: the CPU.
        stop: Asked before every batch of candidates whether to leave.
    """
    try:
        return _search(work, log, device, stop)
    except Interrupted:
        return SearchEnd(site=work.site, stopped=True)
    except AlphasmithError as error:
        return SearchEnd(site=work.site, reason=str(error))
    except Exception as error:
        if not is_out_of_memory(error):
            _LOGGER.exception("the search at site %s failed", work.site)
            return SearchEnd(site=work.site, reason=error_line(error))
    free_memory()
    budget = (work.settings.budget or _BUFFERS) // _SHRINK
    smaller = replace(work, settings=replace(work.settings, budget=budget))  # the log knows what was found meanwhile
    try:
        return _search(smaller, log, device, stop)
    except Interrupted:
        return SearchEnd(site=work.site, stopped=True)
    except Exception as error:  # noqa: BLE001  as above; this time it is final
        return SearchEnd(site=work.site, reason=f"out of memory, with smaller buffers too ({one_line(error)})")


def _search(work: SiteWork, log: StudyLog, device: str | None, stop: Callable[[], bool]) -> SearchEnd:
    data, held_out = (to_device(part, device or "cpu") for part in (work.data, work.held_out))
    result = search_data(data, held_out, work.settings, log=log, study_name=work.study_name, stop=stop)
    return SearchEnd(site=work.site, result=result.cpu())
