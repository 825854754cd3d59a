"""First tables: run, site, group, trial digest, artifact.

Written out in full, without importing the models, so that it always makes what it made on the day it was released.
Revision 0001, the first.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_OPTIONS = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
_LOSSES = ("identity", "alpha_half", "best_single", "best_single_alpha", "ours", "limit")


def upgrade() -> None:
    """Make the tables."""
    _table(
        "alphasmith_run",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(512), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", _text(), nullable=False),
        sa.Column("model_digest", sa.String(64), nullable=False),
        sa.Column("data_digest", sa.String(64), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("scheme", sa.String(64), nullable=False),
        sa.Column("hardware", sa.JSON(), nullable=False),
        sa.Column("scope", sa.String(16), nullable=False),
        sa.Column("versions", sa.JSON(), nullable=False),
        sa.Column("space_hash", sa.String(64), nullable=False),
        sa.Column("created", _time(), nullable=False),
        sa.Column("started", _time(), nullable=True),
        sa.Column("finished", _time(), nullable=True),
        sa.Column("folder", _text(), nullable=False),
        sa.CheckConstraint("status IN ('created', 'running', 'finished', 'failed')", name="ck_alphasmith_run_status"),
        sa.CheckConstraint("scope IN ('site', 'model')", name="ck_alphasmith_run_scope"),
        sa.PrimaryKeyConstraint("id", name="pk_alphasmith_run"),
    )
    _index("ix_alphasmith_run_created", "alphasmith_run", "created")
    _table(
        "alphasmith_site",
        sa.Column("id", sa.Integer(), nullable=False),
        _run("site"),
        sa.Column("name", sa.String(512), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("reason", _text(), nullable=False),
        sa.Column("channels", sa.Integer(), nullable=False),
        sa.Column("operators", sa.JSON(), nullable=False),
        sa.Column("study_name", sa.String(512), nullable=True),
        *(
            sa.Column(f"{rows}_{loss}", sa.Double(), nullable=True)
            for rows in ("search", "held_out")
            for loss in _LOSSES
        ),
        sa.Column("winner", sa.String(16), nullable=True),
        sa.Column("trials", sa.Integer(), nullable=False),
        sa.Column("exact_evaluations", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.CheckConstraint("mode IN ('fold', 'explicit', 'left')", name="ck_alphasmith_site_mode"),
        sa.PrimaryKeyConstraint("id", name="pk_alphasmith_site"),
        sa.UniqueConstraint("run_id", "name", name="uq_alphasmith_site_run_id_name"),
    )
    _table(
        "alphasmith_group",
        sa.Column("id", sa.Integer(), nullable=False),
        _run("group"),
        _site("group"),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("low", sa.Double(), nullable=False),
        sa.Column("high", sa.Double(), nullable=False),
        sa.Column("alpha", sa.Double(), nullable=True),
        sa.Column("magnitude", sa.Double(), nullable=False),
        sa.Column("explanation", _text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_alphasmith_group"),
    )
    _index("ix_alphasmith_group_run_id", "alphasmith_group", "run_id")
    _index("ix_alphasmith_group_site_id", "alphasmith_group", "site_id")
    _table(
        "alphasmith_trial_digest",
        sa.Column("id", sa.Integer(), nullable=False),
        _run("trial_digest"),
        _site("trial_digest"),
        sa.Column("study_name", sa.String(512), nullable=False),
        sa.Column("trial_number", sa.Integer(), nullable=False),
        sa.Column("params", sa.JSON(), nullable=False),
        sa.Column("params_hash", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", _text(), nullable=False),
        sa.CheckConstraint(
            "kind IN ('identity', 'alpha_0.5', 'best_single', 'noise_model', 'sampler')",
            name="ck_alphasmith_trial_digest_kind",
        ),
        sa.CheckConstraint("state IN ('complete', 'pruned', 'failed')", name="ck_alphasmith_trial_digest_state"),
        sa.CheckConstraint("state <> 'complete' OR loss IS NOT NULL", name="ck_alphasmith_trial_digest_loss"),
        sa.PrimaryKeyConstraint("id", name="pk_alphasmith_trial_digest"),
        sa.UniqueConstraint("study_name", "trial_number", name="uq_alphasmith_trial_digest_study_name_trial_number"),
    )
    _index("ix_alphasmith_trial_digest_params", "alphasmith_trial_digest", "study_name", "params_hash")
    _index("ix_alphasmith_trial_digest_run_id", "alphasmith_trial_digest", "run_id")
    _index("ix_alphasmith_trial_digest_site_id", "alphasmith_trial_digest", "site_id")
    _table(
        "alphasmith_artifact",
        sa.Column("id", sa.Integer(), nullable=False),
        _run("artifact"),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("path", sa.String(512), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_alphasmith_artifact"),
        sa.UniqueConstraint("run_id", "path", name="uq_alphasmith_artifact_run_id_path"),
    )


def downgrade() -> None:
    """Drop the tables, children first."""
    for name in ("artifact", "trial_digest", "group", "site", "run"):
        op.drop_table(f"alphasmith_{name}")


def _table(name: str, *parts: sa.Column[object] | sa.Constraint) -> None:
    # MySQL cannot roll tables back: a migration that was killed half-way must be able to go on.
    op.create_table(name, *parts, if_not_exists=True, **_OPTIONS)


def _index(name: str, table: str, *columns: str) -> None:
    if name not in {index["name"] for index in sa.inspect(op.get_bind()).get_indexes(table)}:
        op.create_index(name, table, list(columns))


def _run(owner: str) -> sa.Column[object]:
    key = sa.ForeignKey("alphasmith_run.id", name=f"fk_alphasmith_{owner}_run_id", ondelete="CASCADE")
    return sa.Column("run_id", sa.String(40), key, nullable=False)


def _site(owner: str) -> sa.Column[object]:
    key = sa.ForeignKey("alphasmith_site.id", name=f"fk_alphasmith_{owner}_site_id", ondelete="CASCADE")
    return sa.Column("site_id", sa.Integer(), key, nullable=True)


def _text() -> sa.types.TypeEngine[str]:
    return sa.Text().with_variant(mysql.LONGTEXT(), "mysql")


def _time() -> sa.DateTime:
    return sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql")
