"""The study over settings: judged on samples of its own, recorded like every study here, never repeated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.training.settings import TrainingSettings
from alphasmith.search import finetune
from alphasmith.search.interruption import Interrupted
from alphasmith.search.training._study import SettingsSpace
from alphasmith.search.training.finetune import resume_training
from alphasmith.storage.database.connection import opened, optuna_storage
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.runs.trainings import TrainingStore
from alphasmith.storage.upkeep.check import violations
from alphasmith.storage.upkeep.delete import delete_run
from tests.support.run_cases import TRIAL_SECONDS, rows
from tests.support.training_cases import wanted


def stopping(after: int) -> Callable[[], bool]:
    polls = 0

    def stop() -> bool:
        nonlocal polls
        polls += 1
        return polls > after

    return stop


def of_training(run: Path) -> list[tuple[Any, ...]]:
    return [row for row in rows(run / "runs.db", TRIAL_SECONDS) if str(row[0]).startswith("t-")]


def test_a_study_chooses_settings_and_goes_on_where_it_stood(run: Path) -> None:
    config = wanted(run, {"study": 3})
    with pytest.raises(Interrupted):
        finetune(run / "out", config, stop=stopping(20))
    before = of_training(run)
    assert 1 <= len(before) < 3
    (left,) = [row for row in run.iterdir() if ".partial-" in row.name]
    assert [path.name for path in left.iterdir()] == [f"trial-{len(before)}"]
    with opened(str(config["storage"])) as database:
        (record,) = TrainingStore(database).listing()
    done = resume_training(record.id, storage=str(config["storage"]))
    after = of_training(run)
    assert len(after) == 3
    assert after[: len(before)] == before, "no trial is made twice"
    entry = done.manifest.training
    assert entry is not None
    assert entry.study is not None
    assert entry.study.trials == 3
    assert entry.settings["learning_rate"] == entry.study.chosen["learning_rate"]
    undisturbed = finetune(run / "out", wanted(run, {"study": 3, "out": run / "undisturbed"}))
    assert done.manifest.without_times() == undisturbed.manifest.without_times()
    with opened(str(config["storage"])) as database:
        study = optuna.load_study(study_name=entry.study.study, storage=optuna_storage(database))
        assert study.best_trial.number == entry.study.best_trial
        assert study.best_value == entry.study.loss
        assert study.trials[0].user_attrs["candidate"] == "given"
        assert study.metric_names == ["held-out loss against the labels"]
        storage = optuna_storage(database)
        shown = storage.get_study_system_attrs(storage.get_study_id_from_name(entry.study.study))
        assert "Settings of a training" in str(shown)
        assert violations(database) == []
        (row,) = RunStore(database).runs()
        delete_run(database, row.id)
        assert optuna.get_all_study_names(optuna_storage(database)) == []


def test_what_chose_the_settings_does_not_decide_what_is_kept(run: Path) -> None:
    result = finetune(run / "out", wanted(run, {"study": 2}))
    entry = result.manifest.training
    assert entry is not None
    assert len(entry.held_out) == 12, "half of those held out"
    single = finetune(run / "out", wanted(run))
    assert single.manifest.training is not None
    assert set(entry.held_out) < set(single.manifest.training.held_out)
    assert entry.trained == single.manifest.training.trained


def test_a_study_in_which_everything_diverges_leaves_nothing(run: Path) -> None:
    from alphasmith.objectives.errors import AlphasmithError

    training = {"learning_rate": 1e30, "warm_up": 0.0}
    with pytest.raises(AlphasmithError, match="every trial failed") as caught:
        finetune(run / "out", wanted(run, {"study": 2, "training": training}))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)
    assert not [path for path in run.iterdir() if ".partial-" in path.name or path.name.startswith("t-")]


def test_a_space_holds_the_settings_that_were_given() -> None:
    given = TrainingSettings(learning_rate=1e-3, loss="mse", distill=0.95, steps=1)
    space = SettingsSpace(given=given, losses=("cross_entropy", "mse"), distilled=True, steps=1)
    params = space.params(space.first())
    assert params == {"learning_rate": 1e-3, "loss": "mse", "distill": 0.95, "steps": 1}
    held = space.holding(params)
    assert all(held[name]._contains(held[name].to_internal_repr(value)) for name, value in params.items())
    assert space.candidate("given", params) == space.first()
    alone = SettingsSpace(given=given, losses=("mse",), distilled=False, steps=8)
    assert alone.params(alone.first()) == {"learning_rate": 1e-3, "steps": 8}
    assert alone.first().distill == 0.0
