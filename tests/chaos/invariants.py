"""What must hold whatever happened, read with plain SQL past all of the product's own code.

Two kinds: what holds in *every* snapshot of the database, also while processes work and die (:func:`at_any_moment`), and what
holds once a run is finished (:func:`when_finished`). Both return sentences; none is good.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from sqlalchemy import Connection, NullPool, create_engine, text

from tests.chaos.subject import SITES

Row: TypeAlias = Mapping[str, Any]
#: Files whose bytes tell nothing about the result: they hold times, ids and places.
_STORIES = ("manifest.json", "report.html")
#: Fields of a site that say how long it took or how far a resumed search had to look again, not what was found.
_EFFORT = ("seconds", "exact_evaluations", "facts", "study")
#: Name of the study of formats, whose trials have two values and a plan where others have one and a proposer.
_FORMATS = "formats"


@dataclass(frozen=True)
class Outcome:
    """What a run found, without times, ids and places: equal for equal searches.

    Attributes:
        sites: Fields of every site, its groups, the groups of the model, and the front of formats.
        trials: Every trial: study, number, state, kind, params, loss.
        files: sha256 of the files of the output folder.
    """

    sites: tuple[str, ...]
    trials: tuple[str, ...]
    files: tuple[str, ...]

    def differs(self, other: Outcome) -> str:
        """Where it is not what ``other`` is; empty if it is the same."""
        for part in ("trials", "sites", "files"):
            mine, theirs = (Counter(getattr(one, part)) for one in (self, other))
            odd, missing = sorted(mine - theirs), sorted(theirs - mine)
            if odd or missing:
                return f"{part}: {len(odd)} differ, first {odd[:1]} in place of {missing[:1]}"
        return ""


class Snapshot:
    """The tables of one run at one moment.

    Attributes:
        run: Its row.
        tickets: Rows by site.
        attempts: Rows by ticket.

    Args:
        connection: Inside one transaction that sees one state.
        run_id: The run; None: the only one there is.
    """

    def __init__(self, connection: Connection, run_id: str | None = None) -> None:
        runs = _rows(connection, "SELECT * FROM alphasmith_run ORDER BY created")
        mine = [row for row in runs if run_id in (None, row["id"])]
        if len(mine) != 1:
            raise AssertionError(f"{len(mine)} runs where one was expected")
        self.run = mine[0]
        self.id = str(self.run["id"])
        own = {"id": self.id}

        def of(table: str) -> list[Row]:
            return _rows(connection, f"SELECT * FROM alphasmith_{table} WHERE run_id = :id", **own)

        self.tickets = {str(row["site"]): row for row in of("ticket")}
        self.ticket_count = len(of("ticket"))
        self.attempts: dict[Any, list[Row]] = defaultdict(list)
        for row in of("attempt"):
            self.attempts[row["ticket_id"]].append(row)
        self.results, self.stored, self.workers = of("result"), of("stored_artifact"), of("worker")
        self.sites = [json.loads(row["entry"]) for row in of("site")]
        prefix = {"prefix": f"{self.id}/%"}
        self.trials = _rows(
            connection,
            "SELECT t.trial_id, s.study_name, t.number, t.state FROM trials t JOIN studies s ON s.study_id = t.study_id "
            "WHERE s.study_name LIKE :prefix",
            **prefix,
        )
        inside = (
            "WHERE trial_id IN (SELECT t.trial_id FROM trials t JOIN studies s ON s.study_id = t.study_id "
            "WHERE s.study_name LIKE :prefix)"
        )
        self.values = _by_trial(_rows(connection, f"SELECT * FROM trial_values {inside}", **prefix))
        self.params = _by_trial(_rows(connection, f"SELECT * FROM trial_params {inside}", **prefix))
        told = _by_trial(_rows(connection, f"SELECT * FROM trial_user_attributes {inside}", **prefix))
        #: Trial -> who proposed it, how long it took, why it failed.
        self.told = {trial: {row["key"]: _json(row["value_json"]) for row in rows} for trial, rows in told.items()}

    @property
    def done(self) -> int:
        """Sites that are done."""
        return sum(row["state"] == "done" for row in self.tickets.values())


@contextmanager
def snapshot(url: str, run_id: str | None = None) -> Iterator[Snapshot]:
    """Read one run at one moment."""
    with _reading(url) as connection:
        yield Snapshot(connection, run_id)


def count(url: str, query: str) -> int:
    """One number from the database; 0 while it has no tables or cannot be reached."""
    try:
        with _reading(url) as connection:
            return int(connection.execute(text(query)).scalar() or 0)
    except Exception:  # noqa: BLE001  a server that is down, a file that is not there yet: nothing to count
        return 0


def run_ids(url: str) -> list[str]:
    """Runs on record; empty while there is no database."""
    try:
        with _reading(url) as connection:
            return [str(row["id"]) for row in _rows(connection, "SELECT id FROM alphasmith_run")]
    except Exception:  # noqa: BLE001  as above
        return []


def at_any_moment(s: Snapshot) -> list[str]:
    """What is wrong in a snapshot, whoever works or died at that moment."""
    return [*_tickets(s), *_trials(s), *_counts(s)]


def when_finished(url: str, *, expected: Outcome | None, bad_candidates: bool = False) -> list[str]:
    """What is wrong with a run that ought to be finished and whole.

    Args:
        url: Its database; it holds no other run.
        expected: What the undisturbed run found; None: it may find something else.
        bad_candidates: Whether trials may have failed.
    """
    with snapshot(url) as s:
        wrong = at_any_moment(s)
        run = s.run
        if run["status"] != "finished" or run["reason"] or run["driver"] is not None:
            wrong.append(f"run is {run['status']} ({run['reason']!r}), driver {run['driver']}")
            return wrong
        states = Counter(row["state"] for row in s.tickets.values())
        planned = SITES if run["scope"] == "site" else 0
        if states != Counter({"done": planned} if planned else {}):
            wrong.append(f"tickets of a finished run: {dict(states)}")
        if {row["kind"] for row in s.stored} - {"result"}:
            wrong.append("calibration rows or weights of a finished run are still kept")
        if not bad_candidates and any(row["state"] == "FAIL" for row in s.trials):
            wrong.append("a trial failed although no candidate was bad")
        wrong += [*_output(s), *_objects(s)]
        if expected is not None and (odd := outcome(s).differs(expected)):
            wrong.append(f"not what the undisturbed run found: {odd}")
    return wrong


def outcome(s: Snapshot) -> Outcome:
    """What a finished run found."""
    sites = [json.dumps({k: v for k, v in site.items() if k not in _EFFORT}, sort_keys=True) for site in s.sites]
    if s.run["model_groups"]:
        sites.append(s.run["model_groups"])
    if chosen := _manifest(s).get("formats"):
        sites.append(json.dumps({k: v for k, v in chosen.items() if k not in _EFFORT}, sort_keys=True))
    trials = []
    for row in s.trials:
        trial, told = row["trial_id"], s.told.get(row["trial_id"], {})
        params = sorted((p["param_name"], p["param_value"], p["distribution_json"]) for p in s.params[trial])
        losses = [value["value"] for value in sorted(s.values[trial], key=lambda value: int(value["objective"]))]
        what = told.get("formats" if _of(row["study_name"]) == _FORMATS else "candidate")
        trials.append(json.dumps([_of(row["study_name"]), row["number"], row["state"], what, losses, params]))
    files = [f"{path} {sha256}" for path, sha256 in _written(s).items() if Path(path).name not in _STORIES]
    return Outcome(tuple(sorted(sites)), tuple(sorted(trials)), tuple(sorted(files)))


def _tickets(s: Snapshot) -> Iterator[str]:
    if len(s.tickets) != s.ticket_count:
        yield f"{s.ticket_count} tickets for {len(s.tickets)} sites"
    results = Counter(str(row["site"]) for row in s.results)
    by_site = {str(row["site"]): row for row in s.results}
    kept = {str(row["name"]): row for row in s.stored if row["kind"] == "result"}
    for site, ticket in s.tickets.items():
        name = f"ticket {site} ({ticket['state']})"
        attempts = sorted(s.attempts[ticket["id"]], key=lambda row: int(row["number"]))
        if [row["number"] for row in attempts] != list(range(1, ticket["attempts"] + 1)):
            yield f"{name}: {ticket['attempts']} attempts counted, numbers {[row['number'] for row in attempts]}"
        for state in ("running", "done"):
            last = [int(row["number"]) for row in attempts if row["state"] == state]
            if last != ([ticket["attempts"]] if ticket["state"] == state else []):
                yield f"{name}: attempts {last} are {state}"
        if (ticket["lease_until"] is not None) != (ticket["state"] == "running"):
            yield f"{name}: lease until {ticket['lease_until']}"
        open_ = sum(s.tickets[other]["state"] != "done" for other in _json(ticket["depends_on"]))
        if ticket["blocked"] != open_:
            yield f"{name}: blocked by {ticket['blocked']}, but {open_} of the sites it waits for are not done"
        if results[site] != (ticket["state"] == "done"):
            yield f"{name}: {results[site]} accepted results"
        elif results[site]:
            result, artifact = by_site[site], kept.get(site)
            if (result["attempt"], result["worker"]) != (ticket["attempts"], ticket["worker"]):
                yield f"{name}: result of attempt {result['attempt']} by {result['worker']}"
            if artifact is None or artifact["artifact_id"] != result["artifact_id"]:
                yield f"{name}: its object is not on record"
    for site in results.keys() - s.tickets.keys():
        yield f"result of {site}, which is no ticket"


def _trials(s: Snapshot) -> Iterator[str]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for row in s.trials:
        numbers[str(row["study_name"])].append(int(row["number"]))
        name = f"trial {row['number']} of {_of(row['study_name'])}"
        if row["state"] not in ("COMPLETE", "PRUNED", "FAIL"):
            yield f"{name} is {row['state']}"
        if row["state"] == "COMPLETE":
            values = [value["value"] for value in s.values[row["trial_id"]]]
            wanted = 2 if _of(row["study_name"]) == _FORMATS else 1
            if len(values) != wanted or not all(value is not None and math.isfinite(value) for value in values):
                yield f"{name} is complete with values {values}"
    for study, found in numbers.items():
        if sorted(found) != list(range(len(found))):
            yield f"study {_of(study)} has trials {sorted(found)}"


def _counts(s: Snapshot) -> Iterator[str]:
    per_study = Counter(str(row["study_name"]) for row in s.trials)
    for row in s.trials:
        name, told = f"trial {row['number']} of {_of(row['study_name'])}", s.told.get(row["trial_id"], {})
        if not {_FORMATS if _of(row["study_name"]) == _FORMATS else "candidate", "seconds"} <= told.keys():
            yield f"{name} does not say who proposed it and how long it took"
        if row["state"] == "FAIL" and not told.get("reason"):
            yield f"{name} failed without a reason"
    for site, ticket in s.tickets.items():
        if ticket["state"] == "done" and not per_study[f"{s.id}/{site}"]:
            yield f"site {site} is done without a trial"
    for site in s.sites:
        if site["study"] and site["trials"] != per_study[site["study"]]:
            yield f"site {site['name']} counts {site['trials']} trials, {per_study[site['study']]} are in its study"


def _written(s: Snapshot) -> dict[str, str]:
    """Files that the manifest names, with their sha256; none where there is no manifest."""
    return {entry["path"]: entry["sha256"] for entry in _manifest(s).get("artifacts", [])}


def _manifest(s: Snapshot) -> Mapping[str, Any]:
    """What the output folder says of itself; empty where there is none."""
    manifest = Path(s.run["folder"]) / "manifest.json"
    read: Mapping[str, Any] = json.loads(manifest.read_text()) if manifest.is_file() else {}
    return read


def _output(s: Snapshot) -> Iterator[str]:
    folder = Path(s.run["folder"])
    if left := sorted(path.name for path in folder.parent.glob(f"{folder.name}.partial-*")):
        yield f"partial output folders were left: {left}"
    recorded = _written(s)
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    if {*recorded, "manifest.json"} != found.keys():
        yield f"files in the manifest and on disk differ: {sorted({*recorded, 'manifest.json'} ^ found.keys())}"
    for name in recorded.keys() & found.keys():
        if hashlib.sha256(found[name].read_bytes()).hexdigest() != recorded[name]:
            yield f"{name} is not as it was written"
    if (told := _manifest(s).get("run", {}).get("id")) != s.id:
        yield f"the folder's manifest is that of run {told}"


def _objects(s: Snapshot) -> Iterator[str]:
    store = Path(s.run["artifacts"])
    for row in s.results:
        path = next(iter(store.rglob(row["artifact_id"])), None)
        if path is None:
            yield f"the object of {row['site']} is gone"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != row["sha256"]:
            yield f"the object of {row['site']} is damaged"


def read(url: str, query: str) -> list[Row]:
    """Rows of a query; none while the database cannot be read."""
    try:
        with _reading(url) as connection:
            return _rows(connection, query)
    except FileNotFoundError:
        return []


@contextmanager
def _reading(url: str) -> Iterator[Connection]:
    backend = urlsplit(url).scheme.partition("+")[0]
    if backend == "sqlite":
        file = url.removeprefix("sqlite:///")
        if not Path(file).exists():
            raise FileNotFoundError(file)
        engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": 60})
    else:
        psycopg = url.replace("postgresql:", "postgresql+psycopg:", 1)
        engine = create_engine(psycopg, poolclass=NullPool, isolation_level="REPEATABLE READ")
    try:
        with engine.connect() as connection:
            if backend == "sqlite":
                connection.exec_driver_sql("BEGIN")
            yield connection
    finally:
        engine.dispose()


def _rows(connection: Connection, query: str, **values: Any) -> list[Row]:
    return [dict(row) for row in connection.execute(text(query), values).mappings()]


def _by_trial(rows: Sequence[Row]) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["trial_id"]].append(row)
    return found


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _of(study: Any) -> str:
    return str(study).partition("/")[2]
