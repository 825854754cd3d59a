"""How losses and ranges hold on rows that no search saw: synthetic layers, trained models, real models.

    python -m benchmarks.unseen_rows [SHARED_DATA] [--models ...] [--real ...] [--seeds ...] [--size ...] [--out]

SHARED_DATA is the folder with zoo.py and zoo_eval.py, see benchmarks/shared_models.py; --real names models of benchmarks/real_folders.py.
Rows used are those that were searched on (with those that judged, where the winner is fitted again to all of them), fresh rows are of the same
distribution: further rows of a layer, half of the held-out rows of a trained model, held-out rows of other data of a real one. Everything under
the ranges of the rows used. The reported loss is what the search says of the rows it searched on.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.judge.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.literals import RangeStatistic
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing, smoothing_scales
from alphasmith.search import search_site
from alphasmith.search.inputs.preparation import PreparedModel, prepare, survey
from alphasmith.search.inputs.task import load_task
from alphasmith.search.progress import Silent
from benchmarks.layers import KINDS, Size, layers, with_ranges_of
from benchmarks.real_folders import AbsentError, home_folder, model_folder
from benchmarks.real_runs import Request, configured
from benchmarks.searching import searched, settings
from benchmarks.shared_sites import ModelSite, halved, shared_sites
from benchmarks.timing import machine, median, parser, publish, table, torch_threads, with_threads

#: Seeds that no default was chosen on.
SEEDS = (301, 302, 303, 304)
#: Trained models whose static ranges once failed on other rows.
MODELS = ("dtln", "ad_autoencoder")
#: Set apart from the seed of a real model's calibration data.
_OTHER = 1000

Contestant = Literal["none, abs-max", "alpha 0.5, abs-max", "ours under abs-max", "ours, not fitted again", "ours"]
#: Range statistic of a search, and what its winner is called.
_RANGES: tuple[tuple[RangeStatistic, Contestant], ...] = (("absmax", "ours under abs-max"), ("tail", "ours"))
CONTESTANTS: tuple[Contestant, ...] = get_args(Contestant)
HEADER = (
    "rows of",
    "sites",
    "scales and range",
    "fresh / used, median",
    "worst",
    "above 1.3",
    "fresh / reported, median",
    "worst",
    "fresh, over alpha 0.5, geometric mean",
    "worst",
    "above none",
    "range / abs-max, median",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A site with rows that its search sees and rows that it does not.

    Attributes:
        data: Rows to search on.
        held_out: Rows that judge the winner.
        used: Rows that the deployed scales and range are of.
        fresh: Rows that nothing was fitted to, under no range yet.
        shiftable: Whether the input may be shifted.
        again: Whether the winner is fitted again to all rows used.
    """

    data: SiteData
    held_out: SiteData
    used: SiteData
    fresh: SiteData
    shiftable: bool = True
    again: bool = False


@dataclass(frozen=True, kw_only=True)
class Score:
    """Losses of one smoothing: on the rows used, on fresh ones, as reported (NaN: by nobody), and its range factor."""

    used: float
    fresh: float
    reported: float = math.nan
    factor: float = 1.0


def layer_cases(seed: int, size: Size) -> Iterator[Case]:
    """Synthetic layers, split as ``search_site`` with seed 0 splits them."""
    for layer in layers(seed, size=size):
        order = torch.randperm(layer.x.shape[0], generator=torch.Generator().manual_seed(0))
        cut = layer.x.shape[0] * 3 // 4
        data = linear_site_data(layer.x[order[:cut]], layer.w)
        yield Case(
            data=data,
            held_out=with_ranges_of(linear_site_data(layer.x[order[cut:]], layer.w), data),
            used=linear_site_data(layer.x, layer.w, name=layer.name),
            fresh=linear_site_data(layer.fresh, layer.w),
            again=True,
        )


def model_cases(sites: Sequence[ModelSite]) -> Iterator[Case]:
    """Sites of a trained model; one half of the held-out rows judges, the other is fresh."""
    for site in sites:
        judging, fresh = halved(site.held_out)
        yield Case(data=site.data, held_out=judging, used=site.data, fresh=fresh, shiftable=site.shiftable)


def real_cases(model: str, scheme: str, home: Path, *, short: bool) -> Iterator[Case]:
    """Sites of a real model; fresh rows are held-out rows of other data."""
    folder = model_folder(model, home)
    own, other = (_prepared(model, scheme, seed, home, folder, short=short) for seed in (0, _OTHER))
    found = own.survey.model
    weights = {**dict(found.named_parameters()), **dict(found.named_buffers())}
    weights = {name: value.detach() for name, value in weights.items()}
    for site in own.sites:
        if site.name in own.order and site.name in other.order:
            data = own.calibration.site_data(site, weights)
            held_out, fresh = (
                part.held_out.site_data(site, weights, ranges_from=own.calibration) for part in (own, other)
            )
            yield Case(data=data, held_out=held_out, used=data, fresh=fresh, shiftable=site.shiftable)


def _prepared(model: str, scheme: str, seed: int, home: Path, folder: Path, *, short: bool) -> PreparedModel:
    request = Request(model=model, scheme=scheme, seed=seed, short=short, sweep=False, home=home)
    with tempfile.TemporaryDirectory() as work:
        config, batches = configured(request, folder, Path(work))
        task = load_task(config, batches=batches)
        return prepare(config, task, survey(config, task), Silent())


def scores(case: Case, scheme: Scheme) -> dict[Contestant, Score]:
    """Search a site, and judge what was found and what is commonly done."""
    used = SiteObjective(case.used, scheme)
    fresh = SiteObjective(with_ranges_of(case.fresh, case.used), scheme)
    before = SiteObjective(case.data, scheme)
    before_fresh = SiteObjective(with_ranges_of(case.fresh, case.data), scheme)

    def score(smoothing: Smoothing, reported: float = math.nan, *, again: bool = True) -> Score:
        judges = (used, fresh) if again else (before, before_fresh)
        losses = [judge.loss(smoothing) for judge in judges]
        return Score(used=losses[0], fresh=losses[1], reported=reported, factor=smoothing.range_factor)

    a, w = case.used.activation_statistic, case.used.weight_absmax
    half = smoothing_scales(a, w, 0.5, case.used.ties, producer=case.used.producer_absmax)
    found: dict[Contestant, Score] = {
        "none, abs-max": score(Smoothing(scales=torch.ones_like(a))),
        "alpha 0.5, abs-max": score(Smoothing(scales=half)),
    }
    for statistic, contestant in _RANGES:
        config = settings(search={"range": statistic})
        if case.again:
            part = case.used.parts[0]
            result = search_site(part.x, part.weight, scheme=scheme, settings=config)
        else:
            result = searched(case.data, case.held_out, scheme, config, shiftable=case.shiftable)
        found[contestant] = score(result.smoothing, result.loss)
    if case.again:
        result = searched(case.data, case.held_out, scheme, settings())
        found["ours, not fitted again"] = score(result.smoothing, result.loss, again=False)
    return found


def rows(name: str, found: Sequence[dict[Contestant, Score]]) -> list[tuple[str, ...]]:
    """Lines of the table, one for each contestant."""
    lines: list[tuple[str, ...]] = []
    for contestant in CONTESTANTS:
        pairs = [(s[contestant], s["none, abs-max"], s["alpha 0.5, abs-max"]) for s in found if contestant in s]
        ratios = [_ratio(own.fresh, own.used) for own, _, _ in pairs]
        if not ratios:
            continue
        told = [_ratio(own.fresh, own.reported) for own, _, _ in pairs if not math.isnan(own.reported)]
        common = [_ratio(own.fresh, half.fresh) for own, _, half in pairs]
        lines.append(
            (
                name,
                str(len(pairs)),
                contestant,
                f"{median(ratios):.3f}",
                f"{max(ratios):.2f}",
                str(sum(r > 1.3 for r in ratios)),
                f"{median(told):.3f}" if told else "",
                f"{max(told):.2f}" if told else "",
                f"{math.exp(sum(map(math.log, common)) / len(common)):.3f}",
                f"{max(common):.2f}",
                str(sum(own.fresh > none.fresh for own, none, _ in pairs)),
                f"{median([own.factor for own, _, _ in pairs]):.2f}",
            )
        )
    return lines


def _ratio(loss: float, other: float) -> float:
    return 1.0 if loss == other else loss / other if other else math.inf


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    arguments_of.add_argument("data", type=Path, nargs="?")
    arguments_of.add_argument("--scheme", default="w8a8-channel-static")
    arguments_of.add_argument("--models", nargs="*", default=list(MODELS))
    arguments_of.add_argument("--real", nargs="*", default=[])
    arguments_of.add_argument("--short", action="store_true", help="less calibration data of real models")
    arguments_of.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    arguments_of.add_argument("--size", type=int, nargs=3, default=[1024, 384, 384], help="rows, channels, outputs")
    arguments_of.add_argument("--home", type=Path, default=home_folder(), help="where real models are kept")
    arguments = arguments_of.parse_args()
    scheme = Scheme.parse(arguments.scheme)
    lines: list[tuple[str, ...]] = []
    with torch_threads(arguments.threads):
        where = machine()

        def add(name: str, cases: Iterator[Case]) -> None:
            made = rows(name, [scores(case, scheme) for case in cases])
            print("\n".join(" | ".join(line) for line in made), flush=True)
            lines.extend(made)

        if arguments.seeds:
            size = Size(*arguments.size)
            add(f"{len(KINDS)} synthetic layers", (c for seed in arguments.seeds for c in layer_cases(seed, size)))
        for name in arguments.models if arguments.data else ():
            add(name, model_cases(shared_sites(arguments.data / name)))
        for name in arguments.real:
            try:
                add(name, real_cases(name, scheme.name, arguments.home, short=arguments.short))
            except AbsentError as error:
                print(f"{name} left out: {error}")
    publish("UNSEEN_ROWS", f"{where} Scheme {scheme.name}.\n\n{table(HEADER, lines)}", arguments.out)


if __name__ == "__main__":
    main()
