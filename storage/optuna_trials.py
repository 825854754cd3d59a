"""Finished trials into Optuna's tables, many at a time: the same rows as ``Study.add_trial``, in one transaction."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage

# Optuna has no bulk insert: its create_new_trial reads the trial back from the database before every value it writes. At 17
# parameters that takes 16 times the processor time of one insert here and 50 times that of many at once, and a search
# waits for it. Hence its tables are written to directly. They are private to Optuna: tests/storage/test_optuna_trials.py
# holds the rows to what add_trial writes, on every backend.
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy import Connection, Engine, Table, func, insert, select
from sqlalchemy.exc import SQLAlchemyError


def insert_trials(storage: BaseStorage, study_id: int, trials: Sequence[FrozenTrial]) -> None:
    """Add finished trials to a study, numbered on from those it holds: all of them or, after an error, the first few.

    Unlike ``add_trial`` the distributions are not compared with those of earlier trials: keep the search space of a study
    frozen.

    Args:
        storage: Optuna storage; one that is not a relational database takes the trials one by one.
        study_id: Optuna's id of the study.
        trials: In the order of their numbers; states ``COMPLETE``, ``PRUNED`` or ``FAIL``. May be empty.

    Raises:
        ValueError: A trial is not finished.
        KeyError: There is no such study.
        StorageInternalError: The database refused the trials or was lost.
    """
    for trial in trials:
        if not trial.state.is_finished():
            raise ValueError(f"trial of study {study_id} is {trial.state.name}, not finished")
    if not trials:
        return
    # Optuna's cache asks the database for trials newer than those it knows at every read, so it may be passed by.
    database = storage._backend if isinstance(storage, _CachedStorage) else storage
    if isinstance(database, RDBStorage):
        try:
            _insert(database.engine, study_id, trials)
        except SQLAlchemyError:
            # All is rolled back. Optuna tries again after a deadlock or a lost connection, else raises errors of its own.
            pass
        else:
            return
    for trial in trials:
        storage.create_new_trial(study_id, template_trial=trial)


def _insert(engine: Engine, study_id: int, trials: Sequence[FrozenTrial]) -> None:
    with engine.begin() as connection:
        _lock(connection, study_id)
        table: Table = models.TrialModel.__table__
        ours = table.c.study_id == study_id
        first = connection.execute(select(func.count(table.c.trial_id)).where(ours)).scalar_one()
        heads = [_head(study_id, number, trial) for number, trial in enumerate(trials, first)]
        connection.execute(insert(table), heads)
        new = select(table.c.trial_id).where(ours, table.c.number >= first).order_by(table.c.number)
        ids = connection.execute(new).scalars().all()
        parts: dict[Any, list[dict[str, Any]]] = {}
        for trial_id, trial in zip(ids, trials, strict=True):
            for model, row in _parts(trial):
                parts.setdefault(model, []).append({"trial_id": trial_id, **row})
        for model, rows in parts.items():
            connection.execute(insert(model.__table__), rows)


def _lock(connection: Connection, study_id: int) -> None:
    """Keep others, Optuna among them, from numbering trials of the study until the transaction ends."""
    if connection.dialect.name == "sqlite":
        # SQLite locks no rows, and its transactions begin with the first write: too late, trials are counted before.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    studies: Table = models.StudyModel.__table__
    row = select(studies.c.study_id).where(studies.c.study_id == study_id).with_for_update()
    if connection.execute(row).first() is None:
        raise KeyError(f"no study has the id {study_id}")


def _head(study_id: int, number: int, trial: FrozenTrial) -> dict[str, Any]:
    return {
        "study_id": study_id,
        "number": number,
        "state": trial.state,
        "datetime_start": _utc(trial.datetime_start),
        "datetime_complete": _utc(trial.datetime_complete),
    }


def _parts(trial: FrozenTrial) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Rows of the tables that refer to a trial, as (Optuna's model, columns without the trial's id)."""
    for objective, value in enumerate(trial.values or ()):
        stored, kind = models.TrialValueModel.value_to_stored_repr(value)
        yield models.TrialValueModel, {"objective": objective, "value": stored, "value_type": kind}
    for name, value in trial.params.items():
        distribution = trial.distributions[name]
        yield (
            models.TrialParamModel,
            {
                "param_name": name,
                "param_value": distribution.to_internal_repr(value),
                "distribution_json": distribution_to_json(distribution),
            },
        )
    for key, value in trial.user_attrs.items():
        yield models.TrialUserAttributeModel, {"key": key, "value_json": json.dumps(value)}
    for key, value in trial.system_attrs.items():
        yield models.TrialSystemAttributeModel, {"key": key, "value_json": json.dumps(value)}
    for step, value in trial.intermediate_values.items():
        stored, reached = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
        yield (
            models.TrialIntermediateValueModel,
            {"step": step, "intermediate_value": stored, "intermediate_value_type": reached},
        )


def _utc(moment: datetime | None) -> datetime | None:
    """Optuna's times are naive and local in a trial, naive and UTC in its tables."""
    return None if moment is None else moment.astimezone(UTC).replace(tzinfo=None)
