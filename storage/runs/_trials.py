"""Trials of a run, read from Optuna's tables: those that have ended and say who proposed them."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

from sqlalchemy import ColumnClause, TableClause, func, select
from sqlalchemy.orm import Session

from alphasmith.objectives.reading import parse_json, refusing
from alphasmith.storage.database.optuna_private import (
    ATTRIBUTES,
    PARAMS,
    STATE,
    STUDIED,
    STUDIES,
    TRIALS,
    VALUES,
    of_run,
)
from alphasmith.storage.runs.records import TrialRecord, TrialState

_RESTORE = "restore a backup"
_STATES: dict[str, TrialState] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
#: What the refinement calls its candidates that a site's search has no word for.
_KINDS = {"ours": "refined", "proposal": "refined"}


def read_trials(session: Session, run_id: str, *, study_name: str | None = None) -> list[TrialRecord]:
    """Trials of a run by study and number.

    Args:
        session: Open.
        run_id: The run.
        study_name: Only those of this study.
    """
    from optuna.distributions import json_to_distribution  # only here: counting must not wait for Optuna

    distribution = cache(json_to_distribution)  # thousands of trials share a few texts
    mine = of_run(run_id) if study_name is None else of_run(run_id) & (STUDIES.c.study_name == study_name)

    def rows(part: TableClause, *columns: ColumnClause[Any]) -> Any:
        joined = STUDIED.join(part, part.c.trial_id == TRIALS.c.trial_id)
        return session.execute(select(TRIALS.c.trial_id, *columns).select_from(joined).where(mine))

    told: dict[int, dict[str, Any]] = defaultdict(dict)
    for trial, key, value in rows(ATTRIBUTES, ATTRIBUTES.c.key, ATTRIBUTES.c.value_json):
        what = f"attribute {key!r} of trial {trial}"
        told[trial][key] = parse_json(value, field="RUN", what=what, remedy=_RESTORE)
    params: dict[int, dict[str, Any]] = defaultdict(dict)
    columns = (PARAMS.c.param_name, PARAMS.c.param_value, PARAMS.c.distribution_json)
    for trial, name, value, text in rows(PARAMS, *columns).all():
        with refusing("RUN", f"parameter {name!r} of trial {trial} cannot be read", _RESTORE):
            params[trial][name] = distribution(text).to_external_repr(value)
    losses = dict(rows(VALUES, VALUES.c.value).all())
    heads = select(TRIALS.c.trial_id, STUDIES.c.study_name, TRIALS.c.number, STATE).select_from(STUDIED)
    found = session.execute(heads.where(mine)).all()
    with refusing("RUN", f"trials of {run_id} cannot be read", _RESTORE):
        return sorted(
            (
                TrialRecord(
                    study_name=study,
                    number=number,
                    kind=_KINDS.get(told[trial]["candidate"], told[trial]["candidate"]),
                    params=params[trial],
                    state=_STATES[state],
                    loss=losses[trial] if state == "COMPLETE" else None,
                    seconds=float(told[trial].get("seconds", 0.0)),
                    reason=str(told[trial].get("reason", "")),
                )
                for trial, study, number, state in found
                if state in _STATES and "candidate" in told[trial]
            ),
            key=lambda trial: (trial.study_name, trial.number),
        )


def count_trials(session: Session, run_id: str) -> dict[TrialState, int]:
    """Number of ended trials of a run by state; states without trials are left out."""
    query = select(STATE, func.count()).select_from(STUDIED).where(of_run(run_id)).group_by(STATE)
    return {_STATES[state]: int(count) for state, count in session.execute(query) if state in _STATES}
