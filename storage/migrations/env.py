"""Run our migrations on the connection that ``alphasmith.storage.database`` hands over; never on one of its own.

Executed by Alembic only. Optuna's tables stand in the same database: without the name filter, autogenerate would propose
to drop all of them (ecosystem.md section 7, rule 2).
"""

from __future__ import annotations

from typing import Any

from alembic import context

from alphasmith.storage.migrations import CONTEXT_OPTIONS
from alphasmith.storage.tables import Base

connection: Any = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    # SQLite can roll tables back, Alembic merely does not expect it; MySQL cannot.
    transactional_ddl=connection.dialect.name != "mysql",
    **CONTEXT_OPTIONS,
)
with context.begin_transaction():
    context.run_migrations()
