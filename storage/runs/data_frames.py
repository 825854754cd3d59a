"""Records as pandas frames, for figures, tables and notebooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, get_args, get_origin

import pandas as pd

from alphasmith.storage.runs.entries import Group, Losses, Part, SiteRecord
from alphasmith.storage.runs.records import TrialRecord

_LOSSES = tuple(Losses.model_fields)
#: Fields that are called otherwise in tables: a site is named by what it is, a group by its label.
_CALLED = {"name": "site", "study": "study_name", "index": "group"}
_KINDS = {float: "float64", int: "int64", bool: "bool"}

#: What trials of the sweep of one alpha for the whole model name in place of a site; no module is called so.
ONE_ALPHA = "one alpha"
#: Likewise trials of the refinement at the model's output: of kinds of sites, then of single sites.
REFINEMENT_KINDS, REFINEMENT_SITES = "refinement: kinds", "refinement: sites"
#: All of these, whose losses are of the model's output; ``refinement`` is what earlier versions called theirs.
AT_OUTPUT = frozenset({ONE_ALPHA, REFINEMENT_KINDS, REFINEMENT_SITES, "refinement"})
#: Likewise trials of a study over the whole model.
WHOLE_MODEL = "model"


def sites_frame(sites: Iterable[SiteRecord]) -> pd.DataFrame:
    """One row per site, columns as :func:`site_rows`; NaN where a loss was not measured."""
    kinds = _kinds(SiteRecord) | {"groups": "int64", "coefficients": "int64"}
    kinds |= {f"{prefix}{name}": "float64" for prefix in ("", "search_") for name in _LOSSES}
    columns = list(site_rows([SiteRecord(name="?", position=0, mode="left", channels=0)])[0])
    return pd.DataFrame(site_rows(sites), columns=columns).astype(kinds)


def groups_frame(sites: Iterable[SiteRecord], model_groups: Iterable[Group] = ()) -> pd.DataFrame:
    """One row per group, columns as :func:`group_rows`; NaN for None."""
    columns = ["site", *(_CALLED.get(name, name) for name in Group.model_fields)]
    return pd.DataFrame(group_rows(sites, model_groups), columns=columns).astype(_kinds(Group))


def trials_frame(trials: Iterable[TrialRecord]) -> pd.DataFrame:
    """One row per trial: site, study_name, number, kind, state, loss (NaN when none), seconds, reason, then its parameters.

    The site of a trial over the whole model is ``model``, those of the sweep and the refinement are in :data:`AT_OUTPUT`.
    """
    columns = ["site", "study_name", "number", "kind", "state", "loss", "seconds", "reason"]
    listed = list(trials)
    names = sorted({name for trial in listed for name in trial.params})
    rows = [
        {
            **trial.params,
            **{name: getattr(trial, name) for name in columns},
        }
        for trial in listed
    ]
    frame = pd.DataFrame(rows, columns=[*columns, *(name for name in names if name not in columns)])
    return frame.astype({"number": "int64", "loss": "float64", "seconds": "float64"})


def site_rows(sites: Iterable[SiteRecord]) -> list[dict[str, Any]]:
    """One row per site, as plain JSON values.

    Columns: the fields of :class:`SiteRecord`, ``name`` as ``site`` and ``study`` as ``study_name``. In place of ``losses``: the
    held-out losses (identity, alpha_half, best_single, best_single_alpha, ours, limit; None where not measured), and the same
    on calibration rows with the prefix ``search_``; of ``groups`` their number K (0 in scope ``model`` and for sites left
    alone) and as ``coefficients`` how many of them differ in what was chosen (1: one alpha serves all; 0: identity won); in place of ``facts``: stopped (why the search ended; empty where nothing was searched).
    """
    return [_site_row(site) for site in sites]


def group_rows(sites: Iterable[SiteRecord], model_groups: Iterable[Group] = ()) -> list[dict[str, Any]]:
    """One row per group, as plain JSON values.

    Columns: site (empty for groups of the whole model), and the fields of :class:`Group`, ``index`` as ``group``.
    """
    owned = [("", group) for group in model_groups] + [(site.name, group) for site in sites for group in site.groups]
    return [{"site": site, **{_CALLED.get(name, name): value for name, value in group}} for site, group in owned]


def _site_row(site: SiteRecord) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in SiteRecord.model_fields:
        value = getattr(site, name)
        match name:
            case "losses":
                row |= {n: None if value is None else getattr(value.held_out, n) for n in _LOSSES}
                row |= {f"search_{n}": None if value is None else getattr(value.search, n) for n in _LOSSES}
            case "groups":
                row["groups"] = len(value)
                row["coefficients"] = len({(g.alpha, g.beta, g.offset) for g in value if g.alpha is not None})
            case "facts":
                row["stopped"] = "" if value is None else value.stopped
            case _:
                row[_CALLED.get(name, name)] = list(value) if isinstance(value, tuple) else value
    return row


def _kinds(part: type[Part]) -> dict[str, str]:
    """Column -> type in a frame, of the fields that are numbers or flags; a number that may be missing is a float."""
    found = {}
    for name, field in part.model_fields.items():
        inner: Any = next((kind for kind in get_args(field.annotation) if kind is not type(None)), field.annotation)
        plain = get_args(inner)[0] if get_origin(inner) is Annotated else inner
        if plain in _KINDS:
            found[_CALLED.get(name, name)] = _KINDS[plain]
    return found
