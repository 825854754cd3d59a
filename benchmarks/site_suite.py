"""How near the search lands to the per-channel limit, and in how many exact evaluations: synthetic layers and trained models.

    python -m benchmarks.site_suite [SHARED_DATA] [--schemes ...] [--models ...] [--threads N] [--out]

SHARED_DATA is the folder with zoo.py and zoo_eval.py, see benchmarks/shared_models.py; without it only synthetic layers run.
K = 8 groups with offsets, everything else as by default. All losses are held-out: fresh rows for synthetic layers, the held-out
split for models, both under the ranges of the rows searched on. The limit is judged on the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search import SiteResult
from benchmarks.layers import KINDS, REPORTING_SEEDS, layer_data, layers
from benchmarks.searching import searched, settings
from benchmarks.shared_sites import REPORTING_MODELS, TUNING_MODELS, ModelSite, shared_sites
from benchmarks.timing import machine, median, parser, publish, table, torch_threads, with_threads

HEADER = (
    "layers",
    "scheme",
    "sites",
    "loss / limit, median",
    "worst",
    "no limit",
    "exact evaluations, median",
    "most",
    "at or below best single",
    "seconds per site, median",
)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One site: held-out loss over limit (NaN: no limit was found), evaluations, seconds, whether the guard held."""

    ratio: float
    evaluations: int
    seconds: float
    kept: bool

    @classmethod
    def of(cls, result: SiteResult) -> Score:
        """The score of a search."""
        limit, loss = result.limit, result.held_out_loss
        ratio = math.nan if limit is None else 1.0 if loss == limit else loss / limit if limit else math.inf
        single = result.held_out.best_single
        return cls(
            ratio=ratio,
            evaluations=result.exact_evaluations,
            seconds=result.seconds,
            kept=single is None or loss <= single,
        )


def suite(sites: Sequence[ModelSite], scheme: Scheme) -> list[Score]:
    """Search every site."""
    config = settings(groups={"k": 8, "offsets": True})
    return [Score.of(searched(s.data, s.held_out, scheme, config, shiftable=s.shiftable)) for s in sites]


def row(name: str, scheme: Scheme, scores: list[Score]) -> tuple[str, ...]:
    """One line of the table."""
    ratios = [s.ratio for s in scores if not math.isnan(s.ratio)]
    return (
        name,
        scheme.name,
        str(len(scores)),
        f"{median(ratios):.3f}",
        f"{max(ratios, default=math.nan):.3f}",
        str(len(scores) - len(ratios)),
        f"{median([s.evaluations for s in scores]):.0f}",
        str(max((s.evaluations for s in scores), default=0)),
        f"{sum(s.kept for s in scores)}/{len(scores)}",
        f"{median([s.seconds for s in scores]):.2f}",
    )


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    arguments_of.add_argument("data", type=Path, nargs="?")
    arguments_of.add_argument("--schemes", nargs="*", default=["w8a8-channel-static", "w8a8-channel-token"])
    arguments_of.add_argument("--models", nargs="*", default=[*REPORTING_MODELS, *TUNING_MODELS])
    arguments_of.add_argument("--seeds", type=int, nargs="*", default=list(REPORTING_SEEDS))
    arguments = arguments_of.parse_args()
    with torch_threads(arguments.threads):
        where = machine()
        schemes = [Scheme.parse(name) for name in arguments.schemes]
        everything: dict[str, list[Score]] = {scheme.name: [] for scheme in schemes}
        rows: list[tuple[str, ...]] = []

        def add(name: str, sites: Sequence[ModelSite]) -> None:
            for scheme in schemes:
                scores = suite(sites, scheme)
                everything[scheme.name] += scores
                rows.append(row(name, scheme, scores))
                print(" | ".join(rows[-1]), flush=True)

        for kind in KINDS:
            add(
                f"{kind}, synthetic",
                [ModelSite(*layer_data(layers(seed, (kind,))[0]), True) for seed in arguments.seeds],
            )
        for name in arguments.models if arguments.data else ():
            add(f"{name}{' (tuned on)' if name in TUNING_MODELS else ''}", shared_sites(arguments.data / name))
        rows += [row("**all**", scheme, everything[scheme.name]) for scheme in schemes]
    publish("SITE_SUITE", f"{where}\n\n{table(HEADER, rows)}", arguments.out)


if __name__ == "__main__":
    main()
