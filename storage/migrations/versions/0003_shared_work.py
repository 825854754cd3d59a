"""Work that several processes share: workers, tickets, attempts, results, stored artifacts; run status ``interrupted``; an id
of the database itself.

Old runs keep their meaning: no digest of the configuration, no artifact store, nobody who drives them. The new columns are
empty or have defaults in the database, so that a run of the previous version that is still going can finish. Trials of the
new kind ``reused`` begin at an earlier run's winner.
Revision 0003, after 0002.
"""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_OPTIONS = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
_RUN = "alphasmith_run"
_TRIAL = "alphasmith_trial_digest"
# 0001 left the prefix of the naming convention in its names twice.
_RUN_CHECK = f"ck_{_RUN}_ck_{_RUN}_status"
_TRIAL_CHECK = f"ck_{_TRIAL}_ck_{_TRIAL}_kind"
_OLD_STATUS = "status IN ('created', 'running', 'finished', 'failed')"
_STATUS = "status IN ('created', 'running', 'finished', 'failed', 'interrupted')"
_OLD_KINDS = "kind IN ('identity', 'alpha_0.5', 'best_single', 'noise_model', 'sampler', 'refined')"
_KINDS = "kind IN ('identity', 'alpha_0.5', 'best_single', 'noise_model', 'sampler', 'refined', 'reused')"


def upgrade() -> None:
    """Add the tables and columns, and widen what a status and a trial kind may be."""
    known = {column["name"] for column in sa.inspect(op.get_bind()).get_columns(_RUN)}
    for column in _run_columns():
        # MySQL cannot roll tables back: a migration that was killed half-way must be able to go on.
        if column.name not in known:
            op.add_column(_RUN, column)
    _worker()
    _ticket()
    _attempt()
    _result()
    _stored_artifact()
    _database()
    _check(_RUN, _RUN_CHECK, _STATUS)
    _check(_TRIAL, _TRIAL_CHECK, _KINDS)


def downgrade() -> None:
    """Take them out again; trials of the new kind must be deleted first. Interrupted runs become failed ones."""
    op.execute(sa.text(f"UPDATE {_RUN} SET status = 'failed' WHERE status = 'interrupted'"))
    _check(_TRIAL, _TRIAL_CHECK, _OLD_KINDS)
    _check(_RUN, _RUN_CHECK, _OLD_STATUS)
    for name in ("database", "stored_artifact", "result", "attempt", "ticket", "worker"):
        op.drop_table(f"alphasmith_{name}")
    for column in _run_columns():
        op.drop_column(_RUN, column.name)


def _run_columns() -> list[sa.Column[object]]:
    return [
        sa.Column("config_digest", sa.String(64), nullable=False, server_default=""),
        sa.Column("artifacts", sa.String(512), nullable=False, server_default=""),
        sa.Column("driver", sa.String(512), nullable=True),
        sa.Column("driver_until", _time(), nullable=True),
    ]


def _worker() -> None:
    _table(
        "alphasmith_worker",
        sa.Column("id", sa.String(512), nullable=False),
        _run("worker"),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("host", sa.String(512), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("engine", sa.String(512), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("joined", _time(), nullable=False),
        sa.Column("heartbeat", _time(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alphasmith_worker")),
    )
    _index("ix_alphasmith_worker_run_id", "alphasmith_worker", "run_id")


def _ticket() -> None:
    _table(
        "alphasmith_ticket",
        sa.Column("id", sa.Integer(), nullable=False),
        _run("ticket"),
        sa.Column("site", sa.String(512), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("depends_on", sa.JSON(), nullable=False),
        sa.Column("blocked", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("reused", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(512), nullable=True),
        sa.Column("lease_until", _time(), nullable=True),
        sa.Column("started", _time(), nullable=True),
        sa.Column("ended", _time(), nullable=True),
        sa.Column("reason", _text(), nullable=False),
        sa.CheckConstraint(
            "state IN ('waiting', 'running', 'done', 'failed')", name=op.f("ck_alphasmith_ticket_state")
        ),
        sa.CheckConstraint(
            "state <> 'running' OR (worker IS NOT NULL AND lease_until IS NOT NULL)",
            name=op.f("ck_alphasmith_ticket_lease"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alphasmith_ticket")),
        sa.UniqueConstraint("run_id", "site", name=op.f("uq_alphasmith_ticket_run_id_site")),
    )
    _index("ix_alphasmith_ticket_state", "alphasmith_ticket", "run_id", "state", "position")


def _attempt() -> None:
    key = sa.ForeignKey("alphasmith_ticket.id", name=op.f("fk_alphasmith_attempt_ticket_id"), ondelete="CASCADE")
    _table(
        "alphasmith_attempt",
        sa.Column("id", sa.Integer(), nullable=False),
        _run("attempt"),
        sa.Column("ticket_id", sa.Integer(), key, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(512), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("started", _time(), nullable=False),
        sa.Column("ended", _time(), nullable=True),
        sa.Column("reason", _text(), nullable=False),
        sa.CheckConstraint(
            "state IN ('running', 'done', 'failed', 'lost', 'returned')", name=op.f("ck_alphasmith_attempt_state")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alphasmith_attempt")),
        sa.UniqueConstraint("ticket_id", "number", name=op.f("uq_alphasmith_attempt_ticket_id_number")),
    )
    _index("ix_alphasmith_attempt_run_id", "alphasmith_attempt", "run_id")


def _result() -> None:
    _table(
        "alphasmith_result",
        sa.Column("id", sa.Integer(), nullable=False),
        _run("result"),
        sa.Column("site", sa.String(512), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(512), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("scheme", sa.String(64), nullable=False),
        sa.Column("winner", sa.JSON(), nullable=False),
        sa.Column("loss", sa.Double(), nullable=False),
        sa.Column("artifact_id", sa.String(128), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("accepted", _time(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alphasmith_result")),
        sa.UniqueConstraint("run_id", "site", name=op.f("uq_alphasmith_result_run_id_site")),
    )
    _index("ix_alphasmith_result_digest", "alphasmith_result", "digest", "scheme")


def _stored_artifact() -> None:
    _table(
        "alphasmith_stored_artifact",
        sa.Column("id", sa.Integer(), nullable=False),
        _run("stored_artifact"),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("name", sa.String(512), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("artifact_id", sa.String(128), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created", _time(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alphasmith_stored_artifact")),
        sa.UniqueConstraint("run_id", "kind", "name", name=op.f("uq_alphasmith_stored_artifact_run_id_kind_name")),
    )
    _index("ix_alphasmith_stored_artifact_key", "alphasmith_stored_artifact", "kind", "key")


def _database() -> None:
    _table(
        "alphasmith_database",
        sa.Column("id", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alphasmith_database")),
    )
    ids = sa.table("alphasmith_database", sa.column("id"))
    if op.get_bind().execute(sa.select(ids.c.id)).first() is None:
        op.get_bind().execute(sa.insert(ids).values(id=uuid.uuid4().hex))


def _check(table: str, name: str, condition: str) -> None:
    known = {check["name"] for check in sa.inspect(op.get_bind()).get_check_constraints(table)}
    with op.batch_alter_table(table) as batch:  # SQLite changes a check by rebuilding the table
        if name in known:
            batch.drop_constraint(op.f(name), type_="check")
        batch.create_check_constraint(op.f(name), condition)


def _table(name: str, *parts: sa.Column[object] | sa.Constraint) -> None:
    op.create_table(name, *parts, if_not_exists=True, **_OPTIONS)


def _index(name: str, table: str, *columns: str) -> None:
    if name not in {index["name"] for index in sa.inspect(op.get_bind()).get_indexes(table)}:
        op.create_index(name, table, list(columns))


def _run(owner: str) -> sa.Column[object]:
    key = sa.ForeignKey("alphasmith_run.id", name=op.f(f"fk_alphasmith_{owner}_run_id"), ondelete="CASCADE")
    return sa.Column("run_id", sa.String(40), key, nullable=False)


def _text() -> sa.types.TypeEngine[str]:
    return sa.Text().with_variant(mysql.LONGTEXT(), "mysql")


def _time() -> sa.DateTime:
    return sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql")
