"""Richer coefficients: betas, offsets, shifts and ranges of their own, how a search ended, refinement, trial kind ``refined``.

Old rows keep their meaning: no beta means 1 - alpha, no offset means none, no shift, and a range of abs-max. The new columns
have defaults in the database, so that a run of the previous version that is still going can finish.
Revision 0002, after 0001.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TRIAL = "alphasmith_trial_digest"
# 0001 left the prefix of the naming convention in its names twice.
_CHECK = f"ck_{_TRIAL}_ck_{_TRIAL}_kind"
_OLD_KINDS = "kind IN ('identity', 'alpha_0.5', 'best_single', 'noise_model', 'sampler')"
_KINDS = "kind IN ('identity', 'alpha_0.5', 'best_single', 'noise_model', 'sampler', 'refined')"


def upgrade() -> None:
    """Add the columns and widen the trial kinds."""
    for table, columns in _columns().items():
        known = {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)}
        for column in columns:
            # MySQL cannot roll tables back: a migration that was killed half-way must be able to go on.
            if column.name not in known:
                op.add_column(table, column)
    _check_kinds(_KINDS)


def downgrade() -> None:
    """Take them out again; trials of the new kind must be deleted first."""
    _check_kinds(_OLD_KINDS)
    for table, columns in _columns().items():
        for column in columns:
            op.drop_column(table, column.name)


def _columns() -> dict[str, list[sa.Column[object]]]:
    return {
        "alphasmith_run": [sa.Column("refinement", sa.JSON(none_as_null=True), nullable=True)],
        "alphasmith_site": [
            sa.Column("shift", sa.Boolean(), nullable=False, server_default=sa.false()),
            sa.Column("range_statistic", sa.String(16), nullable=False, server_default="absmax"),
            sa.Column("range_factor", sa.Double(), nullable=False, server_default="1"),
            sa.Column("grouping", sa.String(32), nullable=False, server_default=""),
            sa.Column("statistic", sa.String(16), nullable=False, server_default=""),
            sa.Column("facts", sa.JSON(none_as_null=True), nullable=True),
        ],
        "alphasmith_group": [
            sa.Column("beta", sa.Double(), nullable=True),
            sa.Column("offset", sa.Double(), nullable=True),
        ],
    }


def _check_kinds(kinds: str) -> None:
    known = {check["name"] for check in sa.inspect(op.get_bind()).get_check_constraints(_TRIAL)}
    with op.batch_alter_table(_TRIAL) as batch:  # SQLite changes a check by rebuilding the table
        if _CHECK in known:
            batch.drop_constraint(op.f(_CHECK), type_="check")
        batch.create_check_constraint(op.f(_CHECK), kinds)
