"""Trials counted by the database are those that were kept, on every backend."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from alphasmith.storage.counts import trial_counts
from alphasmith.storage.database import Database
from alphasmith.storage.records import RunStore
from benchmarks.records import digests, run_spec, study_trials


def test_counts_are_those_of_the_records(database: Database) -> None:
    store = RunStore(database)
    generator = np.random.default_rng(0)
    runs = [store.create(run_spec(name)).id for name in ("one", "other", "empty")]
    for run, count in zip(runs, (5, 3, 0), strict=True):
        kept = digests(f"{run}/site", study_trials(count, groups=2, generator=generator))
        store.add_trials(run, [replace(t, state="failed", loss=None, reason="NaN") for t in kept[:2]] + kept[2:])
    for run in runs:
        assert trial_counts(database, run) == Counter(trial.state for trial in store.trials(run))
    assert trial_counts(database, runs[0]) == {"failed": 2, "complete": 3}
    assert trial_counts(database, "r-unknown") == {}
