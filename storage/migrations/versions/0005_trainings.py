"""Trainings of compressed models, beside the runs that made these.

Nothing that is there changes.
Revision 0005, after 0004.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_OPTIONS = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
_TABLE = "alphasmith_training"


def upgrade() -> None:
    """Add the table."""
    # MySQL cannot roll tables back: a migration that was killed half-way must be able to go on.
    run = sa.ForeignKey("alphasmith_run.id", name=op.f(f"fk_{_TABLE}_run_id"), ondelete="CASCADE")
    op.create_table(
        _TABLE,
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("run_id", sa.String(40), run, nullable=True),
        sa.Column("parent", sa.String(40), nullable=False),
        sa.Column("parent_digest", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", _text(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("config_digest", sa.String(64), nullable=False),
        sa.Column("data_digest", sa.String(64), nullable=False),
        sa.Column("created", _time(), nullable=False),
        sa.Column("finished", _time(), nullable=True),
        sa.Column("folder", _text(), nullable=False),
        sa.Column("entry", _text(), nullable=True),
        sa.CheckConstraint(
            "status IN ('running', 'finished', 'failed', 'interrupted')", name=op.f(f"ck_{_TABLE}_status")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{_TABLE}")),
        if_not_exists=True,
        **_OPTIONS,
    )
    name = f"ix_{_TABLE}_run_id"
    if name not in {index["name"] for index in sa.inspect(op.get_bind()).get_indexes(_TABLE)}:
        op.create_index(name, _TABLE, ["run_id"])


def downgrade() -> None:
    """Take it out again; folders of trained models stay."""
    op.drop_table(_TABLE)


def _text() -> sa.types.TypeEngine[str]:
    return sa.Text().with_variant(mysql.LONGTEXT(), "mysql")


def _time() -> sa.DateTime:
    return sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql")
