"""How soon the search is as good as a grid: seconds to the final loss of single-alpha grids and of coordinate search.

    python -m benchmarks.grids [--sizes ...] [--kinds ...] [--threads 1 2] [--out]

Every method scores its candidates on the same rows with the same exact evaluator, one thread setting at a time, and its clock holds
the float reference product. Ours is timed from the start of the search to the first moment at which its best loss on all search
rows is at or below the grid's final loss: noise model, proposals, Optuna and judging on subsets included. "Without shift" keeps to
what the grids may do too (no shift, abs-max ranges). "One fp32 product each" is what the grid costs where every candidate is a fresh
copy, a requantization and an fp32 product, as in other tools: evaluations times the measured seconds of one such candidate.

A second table says what the noise model buys: the same search without it, until it is within 1 % of the same final loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search import RunConfig, SiteResult
from benchmarks.grid_methods import Outcome, coordinate_search, plain_seconds, single_alpha_grid
from benchmarks.layers import REPORTING_SEEDS, Size, layer_data, layers
from benchmarks.searching import searched, settings, thinned
from benchmarks.timing import machine, median, parser, publish, table, torch_threads

#: Largest number of trials given to the search without its noise model.
_TRIALS_WITHOUT = 120
_REPEATS = 3


@dataclass(frozen=True)
class Method:
    """A grid, how often it is timed, and the ratio to be reached against it."""

    name: str
    run: Callable[[SiteData, Scheme], Outcome]
    repeats: int
    target: int


METHODS = (
    Method("11-point grid", lambda data, scheme: single_alpha_grid(data, scheme, 11), _REPEATS, 5),
    Method("21-point grid", lambda data, scheme: single_alpha_grid(data, scheme, 21), _REPEATS, 10),
    Method("69-point grid", lambda data, scheme: single_alpha_grid(data, scheme, 69), _REPEATS, 30),
    Method("coordinate search, K = 3", lambda data, scheme: coordinate_search(data, scheme, 3), 1, 60),
    Method("coordinate search, K = 8", lambda data, scheme: coordinate_search(data, scheme, 8), 1, 150),
)
WITH_SHIFT = settings(groups={"k": 8})
WITHOUT_SHIFT = settings(groups={"k": 8}, search={"shift": "none", "range": "absmax"})
WITHOUT_NOISE_MODEL = settings(
    groups={"k": 8},
    search={"noise_model": False, "trials": _TRIALS_WITHOUT, "patience": _TRIALS_WITHOUT, "tolerance": 0.0},
)


@dataclass(frozen=True, kw_only=True)
class Race:
    """One grid against ours on one layer; seconds are NaN where ours never got there."""

    method: Method
    outcome: Outcome
    seconds: float
    ours: float
    without_shift: float
    plain: float


@dataclass(frozen=True, kw_only=True)
class Purchase:
    """Trials and seconds to within 1 % of the final loss with the noise model; ``excess``: final loss without it over that."""

    trials_with: int
    seconds_with: float
    trials_without: int | None
    seconds_without: float
    excess: float


def first_time(result: SiteResult, loss: float) -> float:
    """Seconds after which the best loss of a search was at or below ``loss``; NaN: never."""
    return next((seconds for seconds, found in result.trace if found <= loss * (1 + 1e-9)), math.nan)


def first_trial(result: SiteResult, loss: float) -> int | None:
    """Trials made when the best loss was at or below ``loss``; None: never."""
    found = (r.number + 1 for r in result.results if r.loss is not None and r.loss <= loss * (1 + 1e-9))
    return next(found, None)


def compete(data: SiteData, held_out: SiteData, scheme: Scheme) -> tuple[list[Race], Purchase]:
    """All grids, ours with and without shift, and ours without noise model, on one layer."""

    def ours(config: RunConfig, repeats: int = _REPEATS) -> list[SiteResult]:
        return [searched(data, held_out, scheme, config) for _ in range(repeats)]

    def reached(results: Sequence[SiteResult], loss: float) -> float:
        return median([first_time(r, loss) for r in results])

    with_shift, without_shift = ours(WITH_SHIFT), ours(WITHOUT_SHIFT)
    races = []
    for method in METHODS:
        outcomes = [method.run(data, scheme) for _ in range(method.repeats)]
        last = outcomes[-1]
        plain = plain_seconds(data, last.smoothing, scheme)
        races.append(
            Race(
                method=method,
                outcome=last,
                seconds=median([o.seconds for o in outcomes]),
                ours=reached(with_shift, last.loss),
                without_shift=reached(without_shift, last.loss),
                plain=plain * last.evaluations,
            )
        )
    goal = with_shift[0].loss * 1.01
    (blind,) = ours(WITHOUT_NOISE_MODEL, 1)
    purchase = Purchase(
        trials_with=first_trial(with_shift[0], goal) or len(with_shift[0].results),
        seconds_with=reached(with_shift, goal),
        trials_without=first_trial(blind, goal),
        seconds_without=first_time(blind, goal),
        excess=blind.loss / with_shift[0].loss,
    )
    return races, purchase


def race_row(where: tuple[str, str], races: Sequence[Race]) -> tuple[str, ...]:
    """One line of the table, medians over layers."""
    method = races[0].method
    ratios = [r.seconds / r.ours for r in races]
    return (
        *where,
        method.name,
        f"{median([r.outcome.evaluations for r in races]):.0f}",
        f"{median([r.seconds for r in races]):.3f}",
        f"{median([r.ours for r in races]):.4f}",
        f"{median(ratios):.1f}",
        f"{min(ratios):.1f}",
        str(method.target),
        f"{median([r.seconds / r.without_shift for r in races]):.1f}",
        f"{sum(not math.isnan(r.without_shift) for r in races)}/{len(races)}",
        f"{median([r.plain / r.ours for r in races]):.0f}",
    )


RACES = (
    "T x C x O",
    "threads",
    "method",
    "evaluations",
    "its seconds",
    "ours gets there in [s]",
    "ratio, median",
    "least",
    "asked for",
    "ratio without shift",
    "reached without shift",
    "ratio to one fp32 product each",
)
PURCHASES = (
    "T x C x O",
    "threads",
    "trials with the noise model",
    "seconds",
    "trials without",
    "seconds",
    "reached without",
    f"loss without after {_TRIALS_WITHOUT} trials, relative",
)


def purchase_row(where: tuple[str, str], found: Sequence[Purchase]) -> tuple[str, ...]:
    """One line of the second table, medians over layers."""
    trials = [p.trials_without for p in found if p.trials_without is not None]
    seconds = [p.seconds_without for p in found if p.trials_without is not None]
    return (
        *where,
        f"{median([p.trials_with for p in found]):.0f}",
        f"{median([p.seconds_with for p in found]):.3f}",
        f"{median(trials):.0f}",
        f"{median(seconds):.2f}",
        f"{len(trials)}/{len(found)}",
        f"{median([p.excess for p in found]):.3f}",
    )


def parse_size(text: str) -> Size:
    """``4096x768x768`` as rows, channels, outputs."""
    rows, channels, outputs = map(int, text.split("x"))
    return Size(rows, channels, outputs)


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    arguments_of.add_argument("--sizes", nargs="*", default=["1024x384x384", "4096x768x768"])
    arguments_of.add_argument("--kinds", nargs="*", default=["outliers", "correlated", "peer"])
    arguments_of.add_argument("--scheme", default="w8a8-channel-static")
    arguments = arguments_of.parse_args()
    scheme = Scheme.parse(arguments.scheme)
    where = machine()
    race_rows, purchase_rows = [], []
    for size in arguments.sizes:
        made = layers(REPORTING_SEEDS[0], arguments.kinds, size=parse_size(size))
        for threads in arguments.threads:
            with torch_threads(threads):
                found = [
                    compete(data, thinned(fresh, 3), scheme) for data, fresh in (layer_data(layer) for layer in made)
                ]
            place = (size, str(threads))
            for number in range(len(METHODS)):
                race_rows.append(race_row(place, [races[number] for races, _ in found]))
                print(" | ".join(race_rows[-1]), flush=True)
            purchase_rows.append(purchase_row(place, [purchase for _, purchase in found]))
            print(" | ".join(purchase_rows[-1]), flush=True)
    publish("GRIDS", f"{where} Scheme {scheme.name}.\n\n{table(RACES, race_rows)}", arguments.out)
    publish("NOISE_MODEL_OFF", table(PURCHASES, purchase_rows), arguments.out)


if __name__ == "__main__":
    main()
