"""Trials recorded per second by one writer, beside Optuna's own ways into the same database.

    python -m benchmarks.storage_rates [--backends NAME ...] [--trials N] [--repeats N] [--out docs/scaling.md]

Every trial has 8 parameters, 2 user attributes and 3 intermediate values. ``insert_trials`` is what a run records with, in batches
of trials that were scored together; ``add_trial`` and ask/tell are Optuna's, timed in the same loop on the same database. Goals:
at one trial a batch 40 trials/s on SQLite and 15 on PostgreSQL.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage

from alphasmith.storage.database.connection import initialise, open_database, optuna_storage
from alphasmith.storage.database.optuna_private import insert_trials
from alphasmith.storage.runs.run_store import RunStore
from benchmarks.databases import BACKENDS, fresh_database
from benchmarks.timing import machine, median, parser, publish, table
from tests.support.stored_records import finished_trial, run_spec, site_record, space

BATCHES = (1, 4, 16, 64)
#: 4 groups with an alpha and an offset each.
_SPACE = space(4, shift=False)
#: Trials per second that one writer must reach at one trial a batch.
_GOALS = {"sqlite": 40.0, "postgresql": 15.0}
_TITLES = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "mysql": "MariaDB"}


@dataclass(frozen=True)
class Rate:
    """One way of recording: seconds per trial, one entry per repeat."""

    way: str
    seconds: tuple[float, ...]

    @property
    def trials_per_second(self) -> float:
        """Median over repeats."""
        return 1 / median(self.seconds)


def ask_and_tell(study: optuna.Study) -> None:
    """The same trial through Optuna's own interface, with the cheapest sampler."""
    trial = study.ask()
    for name, choice in _SPACE.items():
        if isinstance(choice, FloatDistribution):
            trial.suggest_float(name, choice.low, choice.high)
    for step in (1, 2, 3):
        trial.report(1e-3 / step, step)
    trial.set_user_attr("candidate", "sampler")
    trial.set_user_attr("seconds", 0.25)
    study.tell(trial, 1e-4)


def measure(storage: BaseStorage, *, trials: int, repeats: int) -> list[Rate]:
    """Every way of recording ``trials`` trials, in turn in each of ``repeats`` rounds."""
    generator = np.random.default_rng(0)

    def study() -> optuna.Study:
        return optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))

    def batched(size: int) -> float:
        made = [finished_trial(generator, _SPACE) for _ in range(max(trials, 4 * size))]
        study_id = storage.get_study_id_from_name(study().study_name)
        insert_trials(storage, study_id, made[:size])  # connections and prepared statements
        start = time.perf_counter()
        for first in range(0, len(made), size):
            insert_trials(storage, study_id, made[first : first + size])
        return (time.perf_counter() - start) / len(made)

    def one_by_one(record: Callable[[optuna.Study], None]) -> float:
        into = study()
        record(into)
        start = time.perf_counter()
        for _ in range(trials // 4):
            record(into)
        return (time.perf_counter() - start) / (trials // 4)

    ways: dict[str, Callable[[], float]] = {f"insert_trials, {n} a batch": partial(batched, n) for n in BATCHES}
    ways["Optuna add_trial"] = lambda: one_by_one(lambda into: into.add_trial(finished_trial(generator, _SPACE)))
    ways["Optuna ask, suggest, tell"] = lambda: one_by_one(ask_and_tell)
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, record in ways.items():
            taken[way].append(record())
    return [Rate(way, tuple(seconds)) for way, seconds in taken.items()]


def site_seconds(store: RunStore, *, repeats: int) -> float:
    """Median seconds to record one finished site with 4 groups."""
    run = store.create(run_spec("rates"))
    generator = np.random.default_rng(0)
    taken = []
    for position in range(10 * repeats):
        site = site_record(run.id, position, groups=4, trials=24, generator=generator)
        start = time.perf_counter()
        store.add_site(run.id, site)
        taken.append(time.perf_counter() - start)
    return median(taken)


def fsync_seconds(folder: Path, repeats: int = 50) -> float:
    """Median time of one fsync of 4 KiB in ``folder`` [s]; what a commit costs at least on this disk."""
    file, path = tempfile.mkstemp(dir=folder)
    taken = []
    try:
        for _ in range(repeats):
            os.write(file, bytes(4096))
            start = time.perf_counter()
            os.fsync(file)
            taken.append(time.perf_counter() - start)
    finally:
        os.close(file)
        os.unlink(path)
    return median(taken)


def verdict(backend: str, rates: Mapping[str, Rate]) -> str:
    """Whether the goal of a backend is met, in words; empty where there is none."""
    goal = _GOALS.get(backend)
    if goal is None:
        return ""
    reached = rates[f"insert_trials, {BATCHES[0]} a batch"].trials_per_second
    return f"{_TITLES[backend]}: {reached:.0f} trials/s at one a batch, goal {goal:.0f}: {'met' if reached >= goal else 'MISSED'}."


def arguments_of() -> argparse.ArgumentParser:
    """Command line."""
    made = parser(__doc__)
    made.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    made.add_argument("--trials", type=int, default=128, help="trials per way and repeat; a quarter for Optuna's own")
    made.add_argument("--repeats", type=int, default=3)
    return made


def main() -> None:
    arguments = arguments_of().parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    where = machine()
    disk = f"One fsync of 4 KiB: {1e3 * fsync_seconds(Path(tempfile.gettempdir())):.2f} ms."
    rows, verdicts = [], []
    for backend in arguments.backends:
        with fresh_database(backend) as url:
            if url is None:
                print(f"no {backend} server: left out")
                continue
            database = open_database(url)
            initialise(database)
            storage = optuna_storage(database)
            rates = measure(storage, trials=arguments.trials, repeats=arguments.repeats)
            site = site_seconds(RunStore(database), repeats=arguments.repeats)
            database.close()
        for rate in rates:
            times = rate.trials_per_second / rates[-1].trials_per_second
            span = f"{1 / max(rate.seconds):.0f} to {1 / min(rate.seconds):.0f}"
            rows.append((_TITLES[backend], rate.way, f"{rate.trials_per_second:.0f}", span, f"{times:.1f}"))
            print(" | ".join(rows[-1]), flush=True)
        rows.append((_TITLES[backend], "a finished site: 4 groups, 24 digests", f"{24 / site:.0f}", "", ""))
        verdicts.append(verdict(backend, {rate.way: rate for rate in rates}))
    header = ("database", "way", "trials/s", "over repeats", "times ask, suggest, tell")
    words = " ".join(filter(None, [where, disk, *verdicts]))
    publish("STORAGE_RATES", f"{words}\n\n{table(header, rows)}", arguments.out)


if __name__ == "__main__":
    main()
