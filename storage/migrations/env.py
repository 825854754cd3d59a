"""Run our migrations on the connection that ``alphasmith.storage.database.connection`` hands over; never on a new one.

Executed by Alembic only. Optuna's tables stand in the same database: without the name filter, autogenerate would propose
to drop all of them.
"""

from __future__ import annotations

from typing import Any

from alembic import context

from alphasmith.storage.database.tables import Base
from alphasmith.storage.migrations import CONTEXT_OPTIONS

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
