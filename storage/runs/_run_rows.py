"""Runs as records, row by row: a row of another shape is told of, and stands in nobody's way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.text import error_line, one_line
from alphasmith.storage.database.retries import is_lost
from alphasmith.storage.database.tables import RunRow
from alphasmith.storage.runs.records import RunRecord, UnreadableRun

_RECORD = TypeAdapter(RunRecord)
_COLUMNS = tuple(item.name for item in fields(RunRecord))


def record_of(row: RunRow) -> RunRecord:
    """The run of a row.

    Raises:
        InputError: A column holds something else than a record.
    """
    try:
        return _RECORD.validate_python({name: getattr(row, name) for name in _COLUMNS})
    except (ValidationError, AlphasmithError, RecursionError) as error:
        raise _unreadable(row.id, _reason(error)) from error


def read_run(session: Session, run_id: str) -> RunRecord:
    """The run of that id, which is there.

    Raises:
        InputError: Its row cannot be read.
    """
    found = _looked_at(session, run_id)
    if isinstance(found, UnreadableRun):
        raise _unreadable(found.id, found.reason)
    return found


def read_runs(session: Session, *where: ColumnElement[bool]) -> list[RunRecord | UnreadableRun]:
    """The runs for which all conditions hold, newest first, those that cannot be read in their places."""
    order = (RunRow.created.desc(), RunRow.id.desc())
    try:
        return [record_of(row) for row in session.scalars(select(RunRow).where(*where).order_by(*order))]
    except Exception as error:  # whatever a driver or a column's type raises on a value that is none of its own
        if isinstance(error, SQLAlchemyError) and is_lost(error):
            raise
    ids: Sequence[Any] = session.scalars(select(RunRow.id).where(*where).order_by(*order)).all()
    return [_looked_at(session, run_id) for run_id in ids]


def _looked_at(session: Session, run_id: Any) -> RunRecord | UnreadableRun:
    try:
        row = session.get(RunRow, run_id)
        if row is None:
            return UnreadableRun(id=str(run_id), reason="its id is no text")
        return record_of(row)
    except Exception as error:  # as in ``read_runs``
        if isinstance(error, SQLAlchemyError) and is_lost(error):
            raise
        told = error.problem if isinstance(error, InputError) else _reason(error)
        return UnreadableRun(id=str(run_id), reason=told.removeprefix(f"{run_id} cannot be read: "))


def _unreadable(run_id: str, reason: str) -> InputError:
    return InputError("RUN", f"{run_id} cannot be read: {reason}", "repair its row, or restore a backup")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        return one_line(f"{first['loc'][0] if first['loc'] else 'row'}: {first['msg'].lower()}", 160)
    return error_line((isinstance(error, DBAPIError) and error.orig) or error, 160)
