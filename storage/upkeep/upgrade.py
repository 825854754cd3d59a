"""Bringing both sets of tables up to date: a backup first, then Optuna's, then ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.text import counted, listed
from alphasmith.storage.database.connection import Database, StorageError, initialise
from alphasmith.storage.database.schema_lock import PATIENCE, schema_lock
from alphasmith.storage.queue.status import database_now, live_runs
from alphasmith.storage.upkeep.backup import back_up
from alphasmith.storage.upkeep.check import Heads, heads


@dataclass(frozen=True, kw_only=True)
class UpgradeReport:
    """What an upgrade did.

    Attributes:
        before: Revisions it found.
        after: Revisions now.
        backup: Copy of the database before it; None: none was made.
    """

    before: Heads
    after: Heads
    backup: Path | None


def upgrade(database: Database, *, backup: Path | None = None, force: bool = False) -> UpgradeReport:
    """Upgrade Optuna's tables and ours; nothing happens where both are up to date.

    Args:
        database: Open.
        backup: Where a copy goes first; None: SQLite into ``<file>.before-<revision>``, servers not at all.
        force: Upgrade even while runs go on; they may fail.

    Raises:
        InputError: Nothing of ours is in the database, a newer version made it, a run goes on, or the copy cannot be made.
        StorageError: The database refused; where it is SQLite or PostgreSQL, the failing step left no trace.
    """
    with schema_lock(database.engine, database.masked):
        before = heads(database)
        _refuse_foreign(database, before)
        if before.current and backup is None:
            return UpgradeReport(before=before, after=before, backup=None)
        if not force:
            _refuse_live(database)
        if backup is None and database.backend == "sqlite":
            backup = _free_name(Path(f"{database.engine.url.database}.before-{before.ours}"))
        if backup is not None:
            back_up(database, backup)
        if before.optuna != before.optuna_head:
            _upgrade_optuna(database)
    # Takes the lock itself; whoever came between has done the same.
    initialise(database, force=True)
    after = heads(database)
    if not after.current:
        raise StorageError(f"{database.masked}: schemas are {after.ours} and {after.optuna} after the upgrade")
    return UpgradeReport(before=before, after=after, backup=backup)


def _refuse_foreign(database: Database, found: Heads) -> None:
    if found.ours is None or found.optuna is None:
        raise InputError("storage", f"{database.masked} holds no runs", "run `alphasmith db init`, or name another")
    if found.ours not in found.ours_known:
        problem = f"{database.masked} was made by a newer Alphasmith (schema {found.ours})"
        raise InputError("storage", problem, "upgrade Alphasmith or use another database")
    if found.optuna not in found.optuna_known:
        problem = f"the Optuna tables of {database.masked} were made by a newer Optuna (schema {found.optuna})"
        raise InputError("storage", problem, "upgrade Optuna or use another database")


def _refuse_live(database: Database) -> None:
    live = live_runs(database, database_now(database))
    if live:
        told = listed([f"{run} by {who}" for run, who in sorted(live.items())], 3)
        problem = f"{counted(len(live), 'live run')} ({told})"
        raise InputError("storage", problem, "end them first, or take the risk with --force")


def _free_name(wanted: Path) -> Path:
    """The name, or with a number where an earlier upgrade left a copy of that name."""
    name, number = wanted, 1
    while name.exists():
        name, number = wanted.with_name(f"{wanted.name}.{number}"), number + 1
    return name


def _upgrade_optuna(database: Database) -> None:
    url = database.engine.url
    try:
        storage = RDBStorage(
            # Optuna runs the address through str.format.
            url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),
            engine_kwargs={"connect_args": {"timeout": PATIENCE}} if database.backend == "sqlite" else {},
            skip_compatibility_check=True,
            skip_table_creation=True,
        )
        try:
            with _quiet():
                storage.upgrade()
        finally:
            storage.engine.dispose()
    except (SQLAlchemyError, StorageInternalError) as error:
        raise StorageError(f"{database.masked}: Optuna's tables could not be upgraded") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's migrations set up logging anew, to the terminal, where nobody has: keep them from it."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
