"""Which settings of the search earn their place: one changed at a time, on tuning data, judged on rows that no search saw.

    python -m benchmarks.defaults [SHARED_DATA] [--sites N] [--scheme ...] [--threads N] [--out]

SHARED_DATA: see benchmarks/shared_models.py; without it only synthetic layers run. Models' held-out rows are halved: one half judges
winners inside the search, the other is used here. For synthetic layers a quarter of the rows judges and fresh rows are used here.
Every loss is divided by that of the best single alpha of the first variant at the same site, so that variants can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.judge.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search import SiteResult
from benchmarks.layers import KINDS, TUNING_SEEDS, Layer, layers, with_ranges_of
from benchmarks.searching import searched, settings
from benchmarks.shared_sites import TUNING_MODELS, halved, shared_sites
from benchmarks.timing import machine, median, parser, publish, table, torch_threads, with_threads


@dataclass(frozen=True)
class Variant:
    """Defaults of the house but for these settings."""

    name: str
    groups: Mapping[str, Any]
    search: Mapping[str, Any]


VARIANTS = (
    Variant("defaults", {}, {}),
    Variant("K = 1", {"k": 1}, {}),
    Variant("K = 4", {"k": 4}, {}),
    Variant("K = 8", {"k": 8}, {}),
    Variant("K = 16", {"k": 16}, {}),
    Variant("K = auto", {"k": "auto"}, {}),
    Variant("without offsets", {"offsets": False}, {}),
    Variant("K = 8, without offsets", {"k": 8, "offsets": False}, {}),
    Variant("with betas", {"betas": True}, {}),
    Variant("no shift", {}, {"shift": "none"}),
    Variant("shift to the middle", {}, {"shift": ["none", "middle"]}),
    Variant("range abs-max only", {}, {"range": "absmax"}),
    Variant("range percentile only", {}, {"range": "percentile"}),
    Variant("range margin only", {}, {"range": "margin"}),
    Variant("statistic percentile", {}, {"statistic": "percentile"}),
    Variant("statistic RMS", {}, {"statistic": "rms"}),
    Variant("three statistics", {}, {"statistic": ["absmax", "percentile", "rms"]}),
    Variant("grouping by range", {"method": "range"}, {}),
    Variant("grouping by outliers", {"method": "multi_outlier"}, {}),
    Variant("k-means or outliers", {"method": ["kmeans", "multi_outlier"]}, {}),
    Variant("noise model off", {}, {"noise_model": False}),
)

HEADER = (
    "settings",
    "sites",
    "loss / best single, geometric mean",
    "worst",
    "best",
    "above best single by > 2%",
    "exact evaluations, median",
    "most",
    "seconds per site, median",
)


@dataclass(frozen=True, eq=False)
class Case:
    """One site: rows to search on, rows that judge the winner, rows that neither saw."""

    data: SiteData
    judge: SiteData
    test: SiteData
    shiftable: bool = True


def synthetic_case(layer: Layer) -> Case:
    """Three quarters, one quarter, and the fresh rows of a layer, all under the ranges of the first."""
    cut = layer.x.shape[0] * 3 // 4
    data, judge, test = (
        linear_site_data(x, layer.w, name=layer.name) for x in (layer.x[:cut], layer.x[cut:], layer.fresh)
    )
    return Case(with_statistics(data), with_ranges_of(judge, with_statistics(data)), with_ranges_of(test, data))


def with_statistics(data: SiteData) -> SiteData:
    """``data`` with every channel statistic a search may choose, as calibration would have collected them."""
    x = data.parts[0].x
    percentile = x.abs().quantile(0.999, dim=0)
    statistics = {**data.activation_statistics, "percentile": percentile, "rms": x.square().mean(dim=0).sqrt()}
    return replace(data, activation_statistics=statistics)


def cases(folder: Path | None, most: int) -> Iterator[Case]:
    """Synthetic layers of the tuning seeds, then at most ``most`` sites of every tuning model, evenly drawn."""
    for seed in TUNING_SEEDS[:2]:
        yield from map(synthetic_case, layers(seed, KINDS))
    for name in TUNING_MODELS if folder else ():
        sites = shared_sites(Path(str(folder)) / name, statistics=True)
        for site in sites[:: max(1, -(-len(sites) // most))]:
            yield Case(site.data, *halved(site.held_out), shiftable=site.shiftable)


@dataclass(frozen=True)
class Score:
    """Loss over the reference's on rows never used, exact evaluations, seconds."""

    ratio: float
    evaluations: int
    seconds: float


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    arguments_of.add_argument("data", type=Path, nargs="?")
    arguments_of.add_argument("--sites", type=int, default=6, help="sites of every model")
    arguments_of.add_argument("--scheme", default="w8a8-channel-static")
    arguments_of.add_argument("--variants", nargs="*", default=[v.name for v in VARIANTS])
    arguments = arguments_of.parse_args()
    scheme = Scheme.parse(arguments.scheme)
    variants = [v for v in VARIANTS if v.name == VARIANTS[0].name or v.name in arguments.variants]
    scores: dict[str, list[Score]] = {v.name: [] for v in variants}
    with torch_threads(arguments.threads):
        where = machine()
        for case in cases(arguments.data, arguments.sites):
            test = SiteObjective(case.test, scheme)
            reference = 0.0
            for variant in variants:
                config = settings(groups=variant.groups, search=variant.search)
                result: SiteResult = searched(case.data, case.judge, scheme, config, shiftable=case.shiftable)
                reference = reference or test.loss(result.best_single)
                ratio = test.loss(result.smoothing) / reference if reference else 1.0
                scores[variant.name].append(Score(ratio, result.exact_evaluations, result.seconds))
            print(case.data.name, {n: f"{s[-1].ratio:.3f}" for n, s in scores.items()}, flush=True)
    rows = [row(name, found) for name, found in scores.items()]
    publish("DEFAULTS", f"{where} Scheme {scheme.name}.\n\n{table(HEADER, rows)}", arguments.out)


def row(name: str, scores: list[Score]) -> tuple[str, ...]:
    """One line of the table."""
    ratios = [s.ratio for s in scores]
    positive = [r for r in ratios if r > 0]
    mean = math.exp(sum(map(math.log, positive)) / len(positive)) if positive else math.nan
    return (
        name,
        str(len(scores)),
        f"{mean:.4f}",
        f"{max(ratios):.3f}",
        f"{min(ratios):.3f}",
        str(sum(r > 1.02 for r in ratios)),
        f"{median([s.evaluations for s in scores]):.0f}",
        str(max(s.evaluations for s in scores)),
        f"{median([s.seconds for s in scores]):.2f}",
    )


if __name__ == "__main__":
    main()
