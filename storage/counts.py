"""Counting in the database what would take seconds to read: trials of a run by state."""

from __future__ import annotations

from typing import cast

from sqlalchemy import func, select

from alphasmith.storage.database import Database
from alphasmith.storage.record_types import TrialState
from alphasmith.storage.tables import TrialDigestRow


def trial_counts(database: Database, run_id: str) -> dict[TrialState, int]:
    """Number of kept trials of a run by state; states without trials are left out. An unknown run has none.

    Args:
        database: An initialised database.
        run_id: Full id of the run.

    Raises:
        StorageError: The database refused or lost the operation.
    """
    state = TrialDigestRow.state
    query = select(state, func.count()).where(TrialDigestRow.run_id == run_id).group_by(state)
    with database.session() as session:
        return {cast(TrialState, name): int(count) for name, count in session.execute(query)}
