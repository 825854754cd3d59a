"""Layers made like those of the table of other tools: the best fresh-row loss of any method, ours, and the products each took.

    python -m benchmarks.peers [--seeds ...] [--threads N] [--out]

The methods of other tools that did best in that table are run here by our implementation on our layers: a 21-point grid of one
alpha, coordinate search over K = 3 and K = 8 groups, and OS+ (shift and threshold). Every method chooses on the 4096 rows of a
layer; its choice is scored on 4096 fresh rows under the ranges of the former. Ours divides its rows once more, three quarters to
search on and one quarter to judge on. Products are all matrix products that were really made, reference and judging included, in
units of one product of all 4096 rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing, group_scales
from alphasmith.search import search_site
from benchmarks.grid_methods import coordinate_search, single_alpha_grid, threshold_search
from benchmarks.layers import PEER_SIZE, REPORTING_SEEDS, TUNING_SEEDS, Layer, layer_data, layers
from benchmarks.searching import ProductCounter, product_size
from benchmarks.timing import machine, median, parser, publish, table, torch_threads, with_threads

SCHEMES = tuple(
    Scheme.parse(f"w8a8-{name}") for name in ("channel-static", "channel-token", "tensor-static", "tensor-token")
)
OURS = "ours, K = 8"

#: Fresh-row values of the table of other tools, x 1e5, by column of ``SCHEMES``: quoted, not measured here.
QUOTED = {
    "no smoothing": (158.3, 42.6, 197.5, 81.9),
    "alpha 0.5": (19.3, 3.77, 47.9, 32.2),
    "21-point grid": (11.1, 3.20, 47.9, 27.7),
    "best of all tools": (9.08, 2.70, 39.2, 20.8),
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """Relative losses on the rows used and on fresh ones, matrix products, seconds."""

    used: float
    fresh: float
    products: float
    seconds: float


def scored(choose: Callable[[], Smoothing], judge: SiteObjective, fresh: SiteObjective, product: int) -> Score:
    """Run a method and score its choice."""
    start = time.perf_counter()
    with ProductCounter() as counter:
        smoothing = choose()
    seconds = time.perf_counter() - start
    return Score(
        used=judge.loss(smoothing),
        fresh=fresh.loss(smoothing),
        products=counter.multiply_adds / product,
        seconds=seconds,
    )


def methods(layer: Layer, data: SiteData, scheme: Scheme, seed: int) -> dict[str, Callable[[], Smoothing]]:
    """Every method by name, as something to run."""
    return {
        "21-point grid": lambda: single_alpha_grid(data, scheme, 21).smoothing,
        "coordinate search, K = 3": lambda: coordinate_search(data, scheme, 3).smoothing,
        "coordinate search, K = 8": lambda: coordinate_search(data, scheme, 8).smoothing,
        "OS+ threshold with shift": lambda: threshold_search(data, scheme).smoothing,
        OURS: lambda: search_site(layer.x, layer.w, scheme=scheme, groups=8, seed=seed).smoothing,
    }


def of_layer(layer: Layer, scheme: Scheme, seed: int) -> dict[str, Score]:
    """All methods on one layer."""
    data, fresh_data = layer_data(layer)
    judge, fresh = SiteObjective(data, scheme), SiteObjective(fresh_data, scheme)
    return {
        name: scored(choose, judge, fresh, product_size(data))
        for name, choose in methods(layer, data, scheme, seed).items()
    }


def plain_losses(layer: Layer, scheme: Scheme) -> tuple[float, float, float]:
    """Fresh-row losses of no smoothing, alpha 0.5 and the 21-point grid on one layer."""
    data, fresh_data = layer_data(layer)
    fresh = SiteObjective(fresh_data, scheme)
    half = group_scales(
        data.activation_statistic, data.weight_absmax, (0.5,), torch.zeros(data.channels, dtype=torch.int64)
    )
    tried = (
        Smoothing(scales=torch.ones(data.channels)),
        Smoothing(scales=half),
        single_alpha_grid(data, scheme, 21).smoothing,
    )
    none, alpha_half, grid = (fresh.loss(smoothing) for smoothing in tried)
    return none, alpha_half, grid


def likeness() -> str:
    """How near the layers are to that of the earlier comparison: plain methods on the tuning seeds, beside its values."""
    found = {
        scheme: [plain_losses(layers(seed, ("peer",), size=PEER_SIZE)[0], scheme) for seed in TUNING_SEEDS]
        for scheme in SCHEMES
    }
    rows = []
    for method, name in enumerate(list(QUOTED)[:3]):
        values = [median([losses[method] for losses in found[scheme]]) * 1e5 for scheme in SCHEMES]
        pairs = zip(values, QUOTED[name], strict=True)
        rows.append((name, *(f"{value:.3g} ({quoted:g})" for value, quoted in pairs)))
    return table(("loss x 1e5 on fresh rows (quoted)", *(s.name for s in SCHEMES)), rows)


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    arguments_of.add_argument("--seeds", type=int, nargs="*", default=list(REPORTING_SEEDS))
    arguments = arguments_of.parse_args()
    found: dict[str, list[dict[str, Score]]] = {scheme.name: [] for scheme in SCHEMES}
    with torch_threads(arguments.threads):
        where = machine()
        publish("PEER_LAYERS", likeness(), arguments.out)
        for seed in arguments.seeds:
            (layer,) = layers(seed, ("peer",), size=PEER_SIZE)
            for scheme in SCHEMES:
                scores = of_layer(layer, scheme, seed)
                found[scheme.name].append(scores)
                print(layer.name, scheme.name, {n: f"{s.fresh * 1e5:.2f}" for n, s in scores.items()}, flush=True)
    rows: list[tuple[str, ...]] = []
    for method in next(iter(found.values()))[0]:
        cells = []
        for runs in found.values():
            used, fresh = (median([getattr(r[method], part) for r in runs]) * 1e5 for part in ("used", "fresh"))
            cells.append(f"{used:.2f} / {fresh:.2f}")
        everything = [runs[method] for by_layer in found.values() for runs in by_layer]
        products = [s.products for s in everything]
        rows.append(
            (
                method,
                *cells,
                f"{median(products):.1f}",
                f"{max(products):.1f}",
                f"{median([s.seconds for s in everything]):.2f}",
            )
        )
    ratios = {
        name: [r[OURS].fresh / min(s.fresh for n, s in r.items() if n != OURS) for r in runs]
        for name, runs in found.items()
    }
    rows.append(("ours / best other, median", *(f"{median(r):.3f}" for r in ratios.values()), "", "", ""))
    rows.append(("ours / best other, worst", *(f"{max(r):.3f}" for r in ratios.values()), "", "", ""))
    rows += [(f"_quoted: {name}_", *(f"{v:g}" for v in values), "", "", "") for name, values in QUOTED.items()]
    header = (
        f"loss x 1e5, used / fresh rows, median of {len(arguments.seeds)} layers",
        *(s.name for s in SCHEMES),
        "products, median",
        "most",
        "seconds, median",
    )
    publish("PEERS", f"{where}\n\n{table(header, rows)}", arguments.out)


if __name__ == "__main__":
    main()
