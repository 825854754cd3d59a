"""Sites of the trained models in the shared data folder, as the search sees them; see benchmarks/shared_models.py."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.calibration.site_data import SiteData, SitePart
from alphasmith.search import RunConfig
from alphasmith.search.inputs.preparation import PreparedModel, prepare, survey
from alphasmith.search.inputs.task import load_task
from alphasmith.search.progress import Silent

#: Models on which defaults were tuned; the others only report.
TUNING_MODELS = ("stories260k_outlier", "dtln_norm500h", "resnet20_cifar10", "retsim")
REPORTING_MODELS = (
    "stories260k",
    "kwt1",
    "rwkv5_730k",
    "charlstm_shakespeare",
    "dtln",
    "resnet8_cifar10",
    "resnet56_cifar10",
    "mobilenet_vww",
    "ad_autoencoder",
)


@dataclass(frozen=True, eq=False)
class ModelSite:
    """Rows to search on, held-out rows under their ranges, and whether the input may be shifted."""

    data: SiteData
    held_out: SiteData
    shiftable: bool


def shared_model(folder: Path) -> tuple[nn.Module, list[Any]]:
    """A model of the shared data folder, and its calibration batches."""
    if str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    zoo, zoo_eval = (importlib.import_module(name) for name in ("zoo", "zoo_eval"))
    model, _ = zoo.load_model(str(folder))
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return model, zoo_eval.calib_batches(str(folder))


def model_sites(model: nn.Module, batches: list[Any], *, rows: int = 1024, statistics: bool = False) -> list[ModelSite]:
    """Search data and held-out data of every site that can be smoothed, with pristine weights.

    The main job folds the winners of earlier sites into later weights; here every site stands alone, so that two searches
    of one site can be compared.

    Args:
        model: A float model.
        batches: Its calibration batches.
        rows: Rows kept per site and split.
        statistics: Collect every channel statistic, abs-max first; else abs-max alone.
    """
    collected = ("absmax", "percentile", "rms") if statistics else ("absmax",)
    config = RunConfig.build({"search": {"rows": rows, "statistic": collected}})
    task = load_task(config, model=model, batches=batches)
    return sites_of(prepare(config, task, survey(config, task), Silent()))


def sites_of(prepared: PreparedModel) -> list[ModelSite]:
    """Search data and held-out data of every site of a prepared run."""
    found = prepared.survey.model
    weights = {**dict(found.named_parameters()), **dict(found.named_buffers())}
    weights = {name: value.detach() for name, value in weights.items()}
    sites = [s for s in prepared.sites if s.name in prepared.order]
    return [
        ModelSite(
            prepared.calibration.site_data(site, weights),
            prepared.held_out.site_data(site, weights, ranges_from=prepared.calibration),
            site.shiftable,
        )
        for site in sites
    ]


def shared_sites(folder: Path, *, rows: int = 1024, statistics: bool = False) -> list[ModelSite]:
    """Search data and held-out data of every site of a model in the shared data folder, see :func:`model_sites`."""
    return model_sites(*shared_model(folder), rows=rows, statistics=statistics)


def halved(data: SiteData) -> tuple[SiteData, SiteData]:
    """Even and odd rows of a site: one half may judge winners, the other has then been seen by nothing."""
    return _every_second(data, 0), _every_second(data, 1)


def _every_second(data: SiteData, first: int) -> SiteData:
    def part(whole: SitePart) -> SitePart:
        rows = torch.arange(min(first, whole.x.shape[0] - 1), whole.x.shape[0], 2, device=whole.x.device)
        sample = None if whole.sample is None else whole.sample[rows]
        return replace(whole, x=whole.x[rows].contiguous(), sample=sample)

    return replace(data, parts=tuple(part(p) for p in data.parts))
