"""All that is used of Optuna and private to it: its tables and their models, its cache, what its samplers read of a study.

Tests name the versions that this was checked with, and hold the rows to what ``Study.add_trial`` writes.
Optuna itself is imported when it is needed: what only counts trials must not wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, Engine, String, Table, cast, column, func, insert, select, table
from sqlalchemy.exc import SQLAlchemyError

from alphasmith.objectives.text import one_line
from alphasmith.storage.database.connection import StorageError, driver_line
from alphasmith.storage.database.retries import retry_lost
from alphasmith.storage.database.tables import UtcDateTime

if TYPE_CHECKING:
    import optuna
    from optuna.exceptions import StorageInternalError
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

#: What is read of Optuna's tables, without its models.
STUDIES = table("studies", column("study_id"), column("study_name", String))
TRIALS = table(
    "trials",
    column("trial_id"),
    column("study_id"),
    column("number"),
    column("state"),
    column("datetime_start", UtcDateTime),
)
VALUES = table("trial_values", column("trial_id"), column("objective"), column("value"))
PARAMS = table(
    "trial_params", column("trial_id"), column("param_name"), column("param_value"), column("distribution_json")
)
ATTRIBUTES = table("trial_user_attributes", column("trial_id"), column("key"), column("value_json"))
HEARTBEATS = table("trial_heartbeats", column("trial_id"), column("heartbeat", UtcDateTime))

#: Trials with their studies.
STUDIED = TRIALS.join(STUDIES, TRIALS.c.study_id == STUDIES.c.study_id)
#: State of a trial as text: PostgreSQL has a type of its own for it, which is not compared with text.
STATE = cast(TRIALS.c.state, String(16))


def of_run(run_id: str) -> ColumnElement[bool]:
    """Condition of the studies of a run: their names begin with its id."""
    return STUDIES.c.study_name.startswith(f"{run_id}/", autoescape=True)


def optuna_migrations() -> Path:
    """Folder of the migrations of Optuna's tables."""
    return Path(_models().__file__).parent / "alembic"


def storage_trouble(error: StorageInternalError, storage: BaseStorage) -> str:
    """First line of what the database driver said to Optuna, without secrets of the address."""
    engine: Engine | None = getattr(getattr(storage, "_backend", storage), "engine", None)
    return one_line(error) if engine is None else driver_line(error.__cause__ or error, engine.url)


class StudyView:
    """A study as a sampler sees it: only trials that have every parameter of the space.

    The Gaussian process sampler reads each parameter of each finished trial and would stop at the identity trial.

    Args:
        study: The study.
        names: Parameters of the space.
    """

    def __init__(self, study: optuna.Study, names: frozenset[str]) -> None:
        self._study = study
        self._names = names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        trials = self._study._get_trials(*args, **kwargs)
        return [t for t in trials if not t.state.is_finished() or self._names <= t.params.keys()]

    def get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        """As ``Study.get_trials``."""
        return [t for t in self._study.get_trials(*args, **kwargs) if self._names <= t.params.keys()]


def begin_trial(study: optuna.Study, trial: FrozenTrial, *, first: int) -> tuple[int, dict[str, Any]]:
    """Add one running trial, see :func:`insert_trials`.

    Args:
        study: The study.
        trial: With parameters and attributes.
        first: Number that it must get.

    Returns:
        Optuna's id and the attributes of the trial with that number: another process may have added the very same.

    Raises:
        StorageError: The study does not hold exactly ``first`` trials, nor this one.
        StorageInternalError: The database refused the trial or was lost.
    """
    storage, study_id = study._storage, study._study_id
    insert_trials(storage, study_id, [trial], first=first)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, first)
    return trial_id, storage.get_trial(trial_id).user_attrs


def begun_trial(study: optuna.Study, trial_id: int) -> optuna.Trial:
    """A running trial of a study to be written to; nothing is proposed for it.

    Args:
        study: The study; its sampler is replaced.
        trial_id: Optuna's id of the trial.
    """
    import optuna

    study.sampler = optuna.samplers.RandomSampler(seed=0)  # asked for relative parameters, it proposes none
    return optuna.Trial(study, trial_id)


def insert_trials(
    storage: BaseStorage,
    study_id: int,
    trials: Sequence[FrozenTrial],
    *,
    first: int | None = None,
    fence: Callable[[Connection], None] | None = None,
) -> None:
    """Add trials to a study, numbered on from those it holds: the rows of ``Study.add_trial``, in one transaction.

    Optuna has no bulk insert: its create_new_trial reads the trial back from the database before every value it writes. At 17
    parameters that takes 16 times the processor time of one insert here and 50 times that of many at once, and a search waits
    for it.

    With ``first``: all of them or none, and once only, however often the call is repeated; what the database lost is repeated
    here for a while (``retry_lost``). With ``fence``: all of them or none. With neither: all of them or, after an error, the
    first few.

    Unlike ``add_trial`` the distributions are not compared with those of earlier trials: keep the search space of a study
    frozen.

    Args:
        storage: Optuna storage; one that is not a relational database takes the trials one by one.
        study_id: Optuna's id of the study.
        trials: In the order of their numbers; finished ones, or such as begin with this (``RUNNING``). May be empty.
        first: Number that the first one must get; None: the next free one. Where the study holds the same trials under these
            numbers already, all is done: an earlier call was committed, only its answer was lost.
        fence: Checked first in the same transaction, see ``Board.fence``; what it raises is raised here, and nothing is
            written.

    Raises:
        ValueError: A trial is waiting; or a fence for a storage that is not a relational database.
        KeyError: There is no such study.
        StorageError: The study does not hold exactly ``first`` trials, nor these.
        StorageInternalError: The database refused the trials or was lost.
    """
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage
    from optuna.storages._cached_storage import _CachedStorage

    for trial in trials:
        if not trial.state.is_finished() and trial.state.name != "RUNNING":
            raise ValueError(f"trial of study {study_id} is {trial.state.name}, not finished")
    if not trials:
        return
    # Optuna's cache asks the database for trials newer than those it knows at every read, so it may be passed by.
    database = storage._backend if isinstance(storage, _CachedStorage) else storage
    if isinstance(database, RDBStorage):
        try:
            if first is None:
                # Not repeated: an insertion whose answer was lost would be made twice.
                _insert(database.engine, study_id, trials, None, fence)
            else:
                retry_lost(lambda: _insert(database.engine, study_id, trials, first, fence))
        except SQLAlchemyError as error:
            if first is not None or fence is not None:
                raise StorageInternalError("the trials were not recorded") from error
            # All is rolled back. Optuna tries again after a deadlock or a lost connection, else raises its own errors.
        else:
            return
    elif fence is not None:
        raise ValueError(f"a fence needs a relational database, not {type(database).__name__}")
    elif first is not None and first != storage.get_n_trials(study_id):
        raise StorageError(f"study {study_id} does not hold {first} trials")
    for trial in trials:
        storage.create_new_trial(study_id, template_trial=trial)


def _insert(
    engine: Engine,
    study_id: int,
    trials: Sequence[FrozenTrial],
    expected: int | None,
    fence: Callable[[Connection], None] | None,
) -> None:
    with engine.begin() as connection:
        _lock(connection, study_id)
        if fence is not None:
            fence(connection)
        models = _models()
        trial_rows: Table = models.TrialModel.__table__
        ours = trial_rows.c.study_id == study_id
        first = connection.execute(select(func.count(trial_rows.c.trial_id)).where(ours)).scalar_one()
        if expected is not None and first != expected:
            if first >= expected + len(trials) and _are_held(connection, study_id, trials, expected):
                return
            raise StorageError(f"study {study_id} holds {first} trials, not {expected}: another process writes to it")
        heads = [_head(study_id, number, trial) for number, trial in enumerate(trials, first)]
        connection.execute(insert(trial_rows), heads)
        new = select(trial_rows.c.trial_id).where(ours, trial_rows.c.number >= first).order_by(trial_rows.c.number)
        ids = connection.execute(new).scalars().all()
        parts: dict[Any, list[dict[str, Any]]] = {}
        for trial_id, trial in zip(ids, trials, strict=True):
            for model, row in _parts(trial):
                parts.setdefault(model, []).append({"trial_id": trial_id, **row})
        for model, rows in parts.items():
            connection.execute(insert(model.__table__), rows)


def _are_held(connection: Connection, study_id: int, trials: Sequence[FrozenTrial], first: int) -> bool:
    """Whether the study holds these trials, by state, parameters and values, under the numbers from ``first`` on."""
    models = _models()
    trial_rows: Table = models.TrialModel.__table__
    numbers = trial_rows.c.number.between(first, first + len(trials) - 1)
    heads = connection.execute(
        select(trial_rows.c.number, trial_rows.c.trial_id, trial_rows.c.state).where(
            trial_rows.c.study_id == study_id, numbers
        )
    ).all()
    if {number: state for number, _, state in heads} != {n: trial.state for n, trial in enumerate(trials, first)}:
        return False
    number_of = {trial_id: number for number, trial_id, _ in heads}
    for model, columns in (
        (models.TrialParamModel, ("param_name", "param_value")),
        (models.TrialValueModel, ("objective", "value", "value_type")),
    ):
        part: Table = model.__table__
        chosen = select(part.c.trial_id, *(part.c[name] for name in columns)).where(part.c.trial_id.in_(number_of))
        held = {(number_of[row[0]], *row[1:]) for row in connection.execute(chosen)}
        wanted = {
            (number, *(row[name] for name in columns))
            for number, trial in enumerate(trials, first)
            for kind, row in _parts(trial)
            if kind is model
        }
        if held != wanted:
            return False
    return True


def _lock(connection: Connection, study_id: int) -> None:
    """Keep others, Optuna among them, from numbering trials of the study until the transaction ends."""
    if connection.dialect.name == "sqlite":
        # SQLite locks no rows, and its transactions begin with the first write: too late, trials are counted before.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    studies: Table = _models().StudyModel.__table__
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
    from optuna.distributions import distribution_to_json

    models = _models()
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


def _models() -> Any:
    from optuna.storages._rdb import models

    return models
