"""The searches of the sites of a model, and what of its calibration candidates are built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch

from alphasmith.objectives.calibration.calibrate import weight_absmax
from alphasmith.objectives.calibration.producers import Producers
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing, smoothing_scales
from alphasmith.search.config import RunConfig
from alphasmith.search.devices import search_device
from alphasmith.search.engines.types import Engine
from alphasmith.search.inputs.preparation import PreparedModel
from alphasmith.search.model.search import ModelResult, SiteStatistics
from alphasmith.search.progress import Progress
from alphasmith.search.site.result import SiteResult
from alphasmith.search.site.settings import SiteSettings
from alphasmith.search.study.writer import Writer
from alphasmith.search.work.plan import plan_sites
from alphasmith.search.work.session import RunHandle
from alphasmith.search.work.site_results import SiteResults
from alphasmith.search.work.site_sources import PreparedSites
from alphasmith.search.work.site_stage import SiteStage


def search_sites(
    config: RunConfig,
    prepared: PreparedModel,
    handle: RunHandle,
    engine: Engine,
    writer: Writer,
    progress: Progress,
    stop: Callable[[], bool],
    *,
    first: int | None = None,
) -> dict[str, SiteResult]:
    """Search all sites of a model, one study each, with whoever else works on the run.

    Args:
        config: The run's configuration.
        prepared: Sites and calibration.
        handle: The run.
        engine: Searches.
        writer: The one thread that writes trials and results.
        progress: Receives stages and notes.
        stop: Polled; returns True to stop.
        first: Where these are sites of a part of the model: how many sites come before it. None: of all of it.

    Returns:
        Results by site, in search order.

    Raises:
        AlphasmithError: A site failed for good.
        Interrupted: ``stop`` said so.
    """
    source = PreparedSites(prepared, first=first or 0)
    shared = plan_sites(config, prepared, source, handle, progress, part=first is not None)
    settings = SiteSettings(
        scheme=config.scheme.build(),
        groups=config.groups,
        search=config.site_search,
        rho=prepared.survey.scarcity.rho,
        budget=_scratch(config, prepared),
    )
    if shared and not first:
        progress.note(f"more workers: alphasmith worker {handle.id} --storage {handle.storage}")
    stage = SiteStage(
        handle,
        source,
        settings,
        scheme=config.scheme.of,
        engine=engine,
        keeper=SiteResults(
            handle.board, handle.kept, scheme=lambda site: config.scheme.of(site).name, position=source.position
        ),
        writer=writer,
        progress=progress,
        stop=stop,
    )
    stage.run()
    return stage.results()


def _scratch(config: RunConfig, prepared: PreparedModel) -> int | None:
    """Memory for the buffers of one judge [bytes]; None: its own default.

    On a GPU half of what is free, shared by two judges. On the CPU, where a budget is given, what the plan leaves of it.
    """
    if search_device(config).type == "cuda":
        return int(torch.cuda.mem_get_info()[0]) // 4
    given = config.hardware.search_memory
    return None if given is None else max(prepared.plan.evaluator, given - prepared.plan.total)


def input_ranges(prepared: PreparedModel) -> dict[str, ChannelRange]:
    """Site -> calibrated range of every channel, for every site with data."""
    return {name: prepared.calibration.input_range(name) for name in prepared.calibration.sites}


def skip_patterns(config: RunConfig, prepared: PreparedModel) -> tuple[str, ...]:
    """Operators to leave in float: those the user names, and those no calibration row reached."""
    missing = (
        operator.name
        for site in prepared.sites
        if site.name not in prepared.calibration.sites
        for operator in site.operators
        if not operator.stacked  # nothing is calibrated for these: their weights alone are quantized
    )
    return (*config.sites.skip, *missing)


def fewer_groups(k: int | Literal["auto"], results: Mapping[str, SiteResult | ModelResult]) -> tuple[str, ...]:
    """One line on where there are fewer groups than asked for; none where there are as many."""
    if k == "auto":
        return ()
    fewer = {name: len(r.ranges) for name, r in results.items() if len(r.ranges) < k}
    if not fewer:
        return ()
    first, groups = next(iter(fewer.items()))
    more = f" and fewer than {k} at {len(fewer) - 1} more sites" if len(fewer) > 1 else ""
    return (f"groups.k = {k} is reduced to {groups} at {first}{more}: the magnitudes of the channels support no more",)


def statistics_of(prepared: PreparedModel) -> dict[str, SiteStatistics]:
    """Site -> what its scales are made from, in forward order."""
    by_name: dict[str, Site] = {s.name: s for s in prepared.sites}
    parameters = {n: p.detach() for n, p in prepared.survey.model.named_parameters()}
    parameters |= dict(prepared.survey.model.named_buffers())
    producers = Producers(prepared.sites, parameters, prepared.calibration, prepared.skip)
    return {
        name: SiteStatistics(
            activation=prepared.calibration.activation_statistic(name),
            weight=weight_absmax(by_name[name], parameters),
            ties=by_name[name].ties.cpu(),
            producer=producers.peaks(by_name[name]),
        )
        for name in sorted(prepared.order, key=[s.name for s in prepared.sites].index)
    }


def single_alpha(statistics: Mapping[str, SiteStatistics], alpha: float) -> dict[str, Smoothing]:
    """The smoothings of all sites under one alpha."""
    return {
        n: Smoothing(scales=smoothing_scales(s.activation, s.weight, alpha, ties=s.ties, producer=s.producer))
        for n, s in statistics.items()
    }
