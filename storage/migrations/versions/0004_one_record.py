"""One record of a site, and of a trial: a site with its groups is one JSON text, trials stand in Optuna's tables only.

Every number is kept. Trials of ours that Optuna's tables do not hold, or hold without their kind, seconds or reason, are put
there first. A choice that a run left no choice of (``shift`` with one value, say) was among the parameters of our copy and is
not among Optuna's; the configuration of the run names it. Files of an output folder stand in its manifest. A process of the
previous version cannot go on with these tables, so nothing is done while one drives a run.
Revision 0004, after 0003.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import mysql

from alphasmith.objectives.errors import InputError

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_RUN, _SITE, _GROUP = "alphasmith_run", "alphasmith_site", "alphasmith_group"
_TRIAL, _ARTIFACT = "alphasmith_trial_digest", "alphasmith_artifact"
# 0001 left the prefix of the naming convention in its names twice.
_CHECK = f"ck_{_SITE}_ck_{_SITE}_mode"
_LOSSES = ("identity", "alpha_half", "best_single", "best_single_alpha", "ours", "limit")
_PLAIN = (
    *("name", "position", "mode", "reason", "channels", "winner", "trials", "exact_evaluations", "seconds"),
    *("range_statistic", "range_factor", "grouping", "statistic"),
)
#: Columns of a site that its entry replaces.
_GONE = (
    *(name for name in _PLAIN if name not in ("name", "position")),
    *("operators", "study_name", "shift", "facts"),
    *(f"{split}_{loss}" for split in ("search", "held_out") for loss in _LOSSES),
)
_IN_GROUP = ("size", "low", "high", "alpha", "magnitude", "explanation", "beta", "offset")
_STATES = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
_ATTRIBUTES = {"kind": "candidate", "seconds": "seconds", "reason": "reason"}


def upgrade() -> None:
    """Hand trials over to Optuna's tables, write the entries, then drop what they replace."""
    bind = op.get_bind()
    if not context.config.attributes.get("force"):
        _refuse_live(bind)
    # MySQL cannot roll tables back: a migration that was killed half-way must be able to go on.
    tables = set(sa.inspect(bind).get_table_names())
    if _TRIAL in tables:
        _hand_over_trials(bind)
    for table, column in ((_SITE, "entry"), (_RUN, "model_groups")):
        if column not in _columns(table):
            op.add_column(table, sa.Column(column, _text(), nullable=True))
    if _GROUP in tables:
        _write_entries(bind)
    for table in (_TRIAL, _GROUP, _ARTIFACT):
        op.drop_table(table, if_exists=True)
    known = {check["name"] for check in sa.inspect(bind).get_check_constraints(_SITE)}
    left = [name for name in _GONE if name in _columns(_SITE)]
    with op.batch_alter_table(_SITE) as batch:  # SQLite changes a table by rebuilding it
        batch.alter_column("entry", existing_type=_text(), nullable=False)
        if _CHECK in known:
            batch.drop_constraint(op.f(_CHECK), type_="check")
        for name in left:
            batch.drop_column(name)


def downgrade() -> None:
    """Not offered: `alphasmith db upgrade` leaves a copy of the database as it was.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError("restore the copy that the upgrade made")


def _refuse_live(bind: sa.Connection) -> None:
    run = sa.table(_RUN, sa.column("id"), sa.column("driver_until", sa.DateTime()))
    now = datetime.now(UTC).replace(tzinfo=None)
    found = bind.execute(sa.select(run.c.id).where(run.c.driver_until > now)).scalars().first()
    if found is not None:
        raise InputError(
            "storage", f"{found} goes on under an earlier Alphasmith", "end it first; it can be resumed with this one"
        )


def _hand_over_trials(bind: sa.Connection) -> None:
    ours = sa.table(
        _TRIAL,
        *(sa.column(n) for n in ("run_id", "study_name", "trial_number", "kind", "loss", "seconds", "state", "reason")),
        sa.column("params", sa.JSON()),
    )
    run = sa.table(_RUN, sa.column("id"), sa.column("created", sa.DateTime()))
    optuna = sa.MetaData()
    tables = {
        name: sa.Table(name, optuna, autoload_with=bind, resolve_fks=False)
        for name in ("studies", "study_directions", "trials", "trial_values", "trial_params", "trial_user_attributes")
    }
    studies, trials, attributes = tables["studies"].c, tables["trials"].c, tables["trial_user_attributes"].c
    study_ids = {name: number for number, name in bind.execute(sa.select(studies.study_id, studies.study_name))}
    held = {
        (study, number): trial
        for trial, study, number in bind.execute(sa.select(trials.trial_id, trials.study_id, trials.number))
    }
    wanted = attributes.key.in_(_ATTRIBUTES.values())
    told = {tuple(row) for row in bind.execute(sa.select(attributes.trial_id, attributes.key).where(wanted))}
    rows = bind.execute(sa.select(ours, run.c.created).join_from(ours, run, run.c.id == ours.c.run_id)).mappings().all()
    for row in rows:
        study = study_ids.get(row["study_name"])
        if study is None:
            study = _insert(bind, tables["studies"], study_name=row["study_name"])
            _insert(bind, tables["study_directions"], study_id=study, direction="MINIMIZE", objective=0)
            study_ids[row["study_name"]] = study
        trial = held.get((study, row["trial_number"]))
        if trial is None:
            trial = _insert_trial(bind, tables, study, row)
        for column, key in _ATTRIBUTES.items():
            if (trial, key) not in told and row[column] != "":
                _insert(
                    bind, tables["trial_user_attributes"], trial_id=trial, key=key, value_json=json.dumps(row[column])
                )


def _insert_trial(bind: sa.Connection, tables: dict[str, sa.Table], study: int, row: Any) -> int:
    trial = _insert(
        bind,
        tables["trials"],
        study_id=study,
        number=row["trial_number"],
        state=_STATES[row["state"]],
        datetime_start=row["created"],
        datetime_complete=row["created"],
    )
    if row["state"] == "complete":
        _insert(bind, tables["trial_values"], trial_id=trial, objective=0, value=row["loss"], value_type="FINITE")
    for name, value in row["params"].items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        kind, limits = (
            ("FloatDistribution", {"step": None, "low": value, "high": value, "log": False})
            if number
            else ("CategoricalDistribution", {"choices": [value]})
        )
        _insert(
            bind,
            tables["trial_params"],
            trial_id=trial,
            param_name=name,
            param_value=value if number else 0,
            distribution_json=json.dumps({"name": kind, "attributes": limits}),
        )
    return trial


def _write_entries(bind: sa.Connection) -> None:
    names = ("id", "run_id", "site_id", "position", *_IN_GROUP)
    group = sa.table(_GROUP, *(sa.column(name) for name in names))
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in bind.execute(sa.select(group).order_by(group.c.position)).mappings():
        owner = ("run", row["run_id"]) if row["site_id"] is None else ("site", row["site_id"])
        groups[owner].append({"index": row["position"]} | {name: row[name] for name in _IN_GROUP})
    site = sa.table(
        _SITE,
        *(sa.column(n) for n in ("id", *_GONE, "name", "position", "entry") if n not in ("operators", "facts")),
        sa.column("operators", sa.JSON()),
        sa.column("facts", sa.JSON(none_as_null=True)),
    )
    for row in bind.execute(sa.select(site)).mappings().all():
        entry = json.dumps(dict(_entry(row)) | {"groups": groups["site", row["id"]]})
        bind.execute(sa.update(site).where(site.c.id == row["id"]).values(entry=entry))
    run = sa.table(_RUN, sa.column("id"), sa.column("model_groups"))
    for (kind, owner), found in groups.items():
        if kind == "run":
            bind.execute(sa.update(run).where(run.c.id == owner).values(model_groups=json.dumps(found)))


def _entry(row: Any) -> Iterator[tuple[str, Any]]:
    yield from ((name, row[name]) for name in _PLAIN)
    yield from (("operators", row["operators"]), ("study", row["study_name"]), ("facts", row["facts"]))
    yield "shift", bool(row["shift"])
    splits = {
        split: {"alpha_0.5" if loss == "alpha_half" else loss: row[f"{split}_{loss}"] for loss in _LOSSES}
        for split in ("search", "held_out")
    }
    # The winner's loss is the one that every measured set has; a baseline may have failed.
    yield "losses", splits if all(losses["ours"] is not None for losses in splits.values()) else None


def _insert(bind: sa.Connection, table: sa.Table, **values: Any) -> int:
    key = bind.execute(sa.insert(table).values(**values)).inserted_primary_key
    return 0 if key is None else int(key[0])


def _columns(table: str) -> set[str]:
    return {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)}


def _text() -> sa.types.TypeEngine[str]:
    return sa.Text().with_variant(mysql.LONGTEXT(), "mysql")
