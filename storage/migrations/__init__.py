"""Alembic environment of the tables of Alphasmith (its own version table, Optuna's tables untouched).

- ``env``: run our migrations on the connection that ``alphasmith.storage.database.connection`` hands over
- ``versions``: schema versions, oldest first
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from alphasmith.storage.database.tables import Base

__all__ = ["CONTEXT_OPTIONS", "HEAD", "VERSION_TABLE", "include_name"]

#: The newest revision. Alembic finds it too, but takes longer to import than `alphasmith list` may take.
HEAD = "0005"

#: Version table of our migrations. Optuna uses Alembic's default name; sharing it makes Optuna refuse the database.
VERSION_TABLE = "alphasmith_alembic_version"


def include_name(name: str | None, kind: str, _parents: MutableMapping[Any, Any]) -> bool:
    """Whether Alembic may look at a table: only at ours.

    Args:
        name: Name of the object.
        kind: ``table``, ``column``, ``index``, ...
        _parents: Names of what the object belongs to.
    """
    return kind != "table" or name in Base.metadata.tables


#: Options of every migration context, for upgrades and for the test that models and migrations agree.
CONTEXT_OPTIONS: Mapping[str, Any] = {
    "version_table": VERSION_TABLE,
    "include_name": include_name,
    "render_as_batch": True,  # SQLite alters a table by rebuilding it
    "compare_type": True,
}
