"""Databases and output folders of earlier schemas: read, brought up to date, and refused where they cannot be.

``data/schema_NNNN.sqlite`` is the database of a real run of that schema (three sites, four trials each; from 0002 on also a
refinement of four trials; in 0003 a run over the whole model and one that was left half-way as well), and
``data/run_version_N`` the output folder of the first of them without the report; only names of folders and of the host were
shortened.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from optuna.distributions import BaseDistribution, FloatDistribution
from sqlalchemy import Connection, MetaData, event, inspect, text
from sqlalchemy.exc import IntegrityError, OperationalError

from alphasmith.objectives.errors import InputError
from alphasmith.storage.database import connection as room
from alphasmith.storage.database.connection import Database, initialise, open_database, open_existing, optuna_storage
from alphasmith.storage.database.tables import Base, DatabaseRow
from alphasmith.storage.migrations import CONTEXT_OPTIONS, HEAD, VERSION_TABLE
from alphasmith.storage.output.manifest import read_manifest
from alphasmith.storage.runs.entries import Group, SearchFacts, SiteRecord
from alphasmith.storage.runs.records import TrialRecord
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.runs.trainings import TrainingSpec, TrainingStore

DATA = Path(__file__).parents[1] / "data"
RUN = {
    "id": "r-old",
    "name": "old",
    "status": "finished",
    "reason": "",
    "model_digest": "",
    "data_digest": "",
    "config": '{"groups": {"k": 2}}',
    "scheme": "w8a8-channel-static",
    "hardware": "{}",
    "scope": "site",
    "versions": "{}",
    "space_hash": "",
    "created": "2026-01-31 12:00:00.123456",
    "folder": "out",
}
SITE = (
    {
        "id": 7,
        "run_id": "r-old",
        "name": "fc1",
        "position": 0,
        "mode": "fold",
        "reason": "",
        "channels": 4,
        "operators": '["fc1"]',
        "study_name": "r-old/fc1",
        "winner": "sampler",
        "trials": 1,
        "exact_evaluations": 3,
        "seconds": 0.5,
    }
    | {f"{rows}_ours": 2.5e-4 for rows in ("search", "held_out")}
    | {f"{rows}_best_single_alpha": 0.5 for rows in ("search", "held_out")}
)
GROUP = {
    "run_id": "r-old",
    "site_id": 7,
    "position": 0,
    "size": 4,
    "low": 0.1,
    "high": 0.5,
    "alpha": 0.25,
    "magnitude": 1.5,
    "explanation": "small",
}
TRIAL = {
    "run_id": "r-old",
    "site_id": 7,
    "study_name": "r-old/fc1",
    "trial_number": 0,
    "params": '{"alpha_0": 0.25}',
    "params_hash": "0" * 64,
    "kind": "sampler",
    "loss": 2.5e-4,
    "seconds": 0.01,
    "state": "complete",
    "reason": "",
}
ROWS: dict[str, dict[str, Any]] = {
    "alphasmith_run": RUN,
    "alphasmith_site": SITE,
    "alphasmith_group": GROUP,
    "alphasmith_trial_digest": TRIAL,
}


#: Every schema there was before, with the tables it had.
EARLIER = ("0001", "0002", "0003")


@pytest.fixture(params=EARLIER)
def schema(request: pytest.FixtureRequest) -> str:
    """An earlier schema."""
    return str(request.param)


@pytest.fixture
def copied(schema: str, tmp_path: Path) -> str:
    """Address of a copy of the committed database of that schema."""
    shutil.copy(DATA / f"schema_{schema}.sqlite", tmp_path / "runs.db")
    return f"sqlite:///{tmp_path / 'runs.db'}"


@pytest.fixture
def old(address: str) -> Iterator[Database]:
    """A database on every backend with the first schema and a row in each of its tables; whatever was there is gone."""
    opened = open_database(address)
    set_back(opened, "0001")
    yield opened
    opened.close()


@pytest.fixture
def previous(address: str) -> Iterator[Database]:
    """The same with the schema before the last."""
    opened = open_database(address)
    set_back(opened, EARLIER[-1])
    yield opened
    opened.close()


def set_back(opened: Database, schema: str) -> None:
    """Put an earlier schema and the rows of the first into a database."""
    initialise(opened)
    storage = optuna_storage(opened)
    for name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)
    with opened.engine.begin() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            table.drop(connection)
        connection.execute(text(f"DROP TABLE {VERSION_TABLE}"))
    to_revision(opened, schema)
    insert(opened, ROWS)


def to_revision(database: Database, revision: str, *, down: bool = False) -> None:
    """What ``initialise`` does, to any revision."""
    config = Config()
    config.set_main_option("script_location", str(Path(room.__file__).parents[1] / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection = database.engine.connect()
    with connection:
        if database.backend == "sqlite":
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")  # dropping a rebuilt table would empty its children
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        (command.downgrade if down else command.upgrade)(config, revision)
        connection.commit()
        connection.invalidate()


def insert(database: Database, rows: dict[str, dict[str, Any]]) -> None:
    """Rows as an Alphasmith of the first schema writes them: without the columns it does not know."""
    with database.engine.begin() as connection:
        for table, row in rows.items():
            names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
            connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"), row)


def differences(connection: Connection) -> list[Any]:
    found: list[Any] = compare_metadata(
        MigrationContext.configure(connection, opts=dict(CONTEXT_OPTIONS)), Base.metadata
    )
    return found


def revision(database: Database) -> str:
    with database.engine.connect() as connection:
        return str(connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar())


#: Tables that a later schema replaced.
REPLACED = {
    VERSION_TABLE,
    *(f"alphasmith_{name}" for name in ("site", "group", "trial_digest", "artifact")),
}
GROUP_NAMES = tuple("position" if name == "index" else name for name in Group.model_fields)


#: What a site of the first schema is since there are columns for it.
NEWER_SITE = {
    "share": None,
    "share_measured": None,
    "shift": False,
    "range_statistic": "absmax",
    "range_factor": 1.0,
    "grouping": "",
    "statistic": "",
    "kind": "",
}


def contents(address: str) -> dict[str, list[Any]]:
    """Every row of every table, as the database itself gives it."""
    opened = open_database(address)
    tables = MetaData()
    tables.reflect(opened.engine)
    with opened.engine.connect() as connection:
        found = {t.name: list(connection.execute(t.select()).mappings().all()) for t in tables.sorted_tables}
    opened.close()
    return found


def in_row(group: Group) -> dict[str, Any]:
    """A group as a row of the table that groups had."""
    return dict(zip(GROUP_NAMES, dict(group).values(), strict=True))


def told(site: SiteRecord) -> dict[str, Any]:
    """A site as a row of the table that sites had, without groups and facts."""
    named = {"operators": list(site.operators), "study_name": site.study}
    if site.losses is not None:
        named |= {f"{split}_{name}": value for split, losses in site.losses for name, value in losses}
    return {k: v for k, v in site if k not in ("operators", "study", "losses", "groups", "facts")} | named


class TestCommittedDatabase:
    def test_it_is_of_that_schema(self, copied: str, schema: str) -> None:
        opened = open_database(copied)
        assert revision(opened) == schema
        catalogue = inspect(opened.engine)
        assert ("shift" in {column["name"] for column in catalogue.get_columns("alphasmith_site")}) == (schema > "0001")
        assert catalogue.has_table("alphasmith_ticket") == (schema > "0002")
        opened.close()

    def test_reading_it_brings_it_up_to_date_and_keeps_every_row(self, copied: str) -> None:
        held = contents(copied)
        opened = open_existing(copied)
        kept = contents(copied)
        with opened.engine.connect() as connection:
            assert differences(connection) == []
            for name in held.keys() - REPLACED:
                assert [{key: new[key] for key in was} for was, new in zip(held[name], kept[name], strict=True)] == [
                    dict(row) for row in held[name]
                ]
            assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        opened.close()

    def test_every_number_is_kept(self, copied: str) -> None:
        held = contents(copied)
        opened = open_existing(copied)
        store = RunStore(opened)
        groups = held["alphasmith_group"]
        for run in held["alphasmith_run"]:
            sites = [row for row in held["alphasmith_site"] if row["run_id"] == run["id"]]
            records = store.sites(run["id"])
            assert [r.name for r in records] == [row["name"] for row in sorted(sites, key=lambda row: row["position"])]
            for row in sites:
                (record,) = (r for r in records if r.name == row["name"])
                assert told(record) == NEWER_SITE | {name: row[name] for name in told(record) if name in row}
                assert record.facts == (None if row.get("facts") is None else SearchFacts(**row["facts"]))
                mine = [g for g in groups if g["site_id"] == row["id"]]
                assert [in_row(g) for g in record.groups] == [{k: g.get(k) for k in GROUP_NAMES} for g in mine]
            mine = [g for g in groups if (g["run_id"], g["site_id"]) == (run["id"], None)]
            assert [in_row(g) for g in store.groups(run["id"])] == [{k: g.get(k) for k in GROUP_NAMES} for g in mine]
            trials = {(t.study_name, t.number): t for t in store.trials(run["id"])}
            digests = [row for row in held["alphasmith_trial_digest"] if row["run_id"] == run["id"]]
            # A site that was not done has trials in Optuna's tables already.
            assert len(digests) == sum(
                trial.site in {r.name for r in records} | {"model", "refinement"} for trial in trials.values()
            )
            for row in digests:
                trial = trials[row["study_name"], row["trial_number"]]
                names = ("kind", "state", "loss", "seconds", "reason")
                assert {name: getattr(trial, name) for name in names} == {name: row[name] for name in names}
                assert trial.params.items() <= row["params"].items()
                left = row["params"].keys() - trial.params.keys()
                assert left <= {"shift", "range", "grouping", "statistic"}, "only a choice without a choice is left out"
        opened.close()

    def test_its_records_say_what_they_said(self, copied: str, schema: str) -> None:
        opened = open_existing(copied)
        store = RunStore(opened)
        runs = {run.folder: run for run in store.runs()}
        assert {run.folder: run.status for run in runs.values()} == (
            {"out": "finished"} if schema < "0003" else {"out": "finished", "whole": "finished", "left": "interrupted"}
        )
        run = runs["out"]
        assert (run.artifacts, run.driver) == ("" if schema < "0003" else "runs.db.artifacts", None)
        assert (run.config_digest == "") == (schema < "0003")
        assert (run.refinement is None) == (schema == "0001")
        sites = store.sites(run.id)
        assert {site.name for site in sites} == {"fc1", "fc2", "head"}
        if schema == "0001":
            assert {(s.shift, s.range_statistic, s.range_factor, s.grouping, s.statistic, s.facts) for s in sites} == {
                (False, "absmax", 1.0, "", "", None)
            }
            assert {(g.beta, g.offset) for site in sites for g in site.groups} == {(None, None)}
        else:
            assert {(s.grouping, s.statistic, s.facts is None) for s in sites} == {("kmeans", "absmax", False)}
        trials = store.trials(run.id)
        assert len(trials) == (12 if schema == "0001" else 16)
        assert {trial.kind for trial in trials} >= {"identity", "alpha_0.5", "best_single"}
        study = optuna.load_study(study_name=str(sites[0].study), storage=optuna_storage(opened))
        assert len(study.trials) == 4
        store.delete(run.id)
        for other in runs.values():
            if other.id != run.id:
                store.delete(other.id)
        with opened.engine.connect() as connection:
            for table in Base.metadata.tables.values():
                # What belongs to runs goes with them; the database keeps its own id.
                rows = connection.execute(table.select()).all()
                assert len(rows) == (table.name == DatabaseRow.__tablename__)
        opened.close()

    def test_two_readers_may_come_at_once(self, copied: str) -> None:
        failures: list[BaseException] = []

        def read() -> None:
            try:
                open_existing(copied).close()
            except InputError as error:
                failures.append(error)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    def test_a_newer_one_is_refused_in_one_line(self, copied: str) -> None:
        opened = open_existing(copied)
        with opened.engine.begin() as connection:
            connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
        opened.close()
        with pytest.raises(InputError, match="newer Alphasmith") as caught:
            open_existing(copied)
        assert "\n" not in str(caught.value)


class TestCommittedDatabaseOfOneRecord:
    """Schema 0004, since which a site is one record: nothing but a table is added."""

    def test_every_row_stays_and_there_is_room_for_trainings(self, tmp_path: Path) -> None:
        shutil.copy(DATA / "schema_0004.sqlite", tmp_path / "runs.db")
        address = f"sqlite:///{tmp_path / 'runs.db'}"
        opened = open_database(address)
        assert revision(opened) == "0004"
        assert not inspect(opened.engine).has_table("alphasmith_training")
        opened.close()
        held = contents(address)
        opened = open_existing(address)
        assert revision(opened) == HEAD
        kept = contents(address)
        assert {name: kept[name] for name in held.keys() - {VERSION_TABLE}} == {
            name: rows for name, rows in held.items() if name != VERSION_TABLE
        }
        with opened.engine.connect() as connection:
            assert differences(connection) == []
        (run,) = RunStore(opened).runs()
        assert (run.status, len(RunStore(opened).sites(run.id))) == ("finished", 3)
        spec = TrainingSpec(
            parent=run.id, parent_digest="", config={}, config_digest="", data_digest="", folder="trained"
        )
        assert TrainingStore(opened).create(spec).run_id == run.id
        opened.close()


class TestEveryBackend:
    def test_rows_of_the_first_schema_survive(self, old: Database) -> None:
        initialise(old)
        assert revision(old) == HEAD
        store = RunStore(old)
        run = store.get("r-old")
        assert (run.config, run.refinement, run.created.microsecond) == ({"groups": {"k": 2}}, None, 123456)
        (site,) = store.sites("r-old")
        assert site.losses is not None
        assert (site.losses.held_out.ours, site.winner, site.operators) == (2.5e-4, "sampler", ("fc1",))
        assert (site.shift, site.range_statistic, site.range_factor, site.facts) == (False, "absmax", 1.0, None)
        (group,) = site.groups
        assert (group.alpha, group.beta, group.offset) == (0.25, None, None)
        (trial,) = store.trials("r-old")
        assert trial == TrialRecord(
            study_name="r-old/fc1", number=0, kind="sampler", params={"alpha_0": 0.25}, state="complete", loss=2.5e-4,
            seconds=0.01,
        )  # fmt: skip
        study = optuna.load_study(study_name="r-old/fc1", storage=optuna_storage(old))
        assert (study.best_value, study.best_params) == (2.5e-4, {"alpha_0": 0.25})
        with old.engine.connect() as connection:
            assert differences(connection) == []

    def test_trials_that_optuna_lost_are_handed_over_whole(self, previous: Database) -> None:
        digests = [
            TRIAL
            | {"trial_number": 1, "kind": "reused", "params": '{"alpha_0": 0.5, "shift": "mean", "forced": true}'},
            TRIAL
            | {"trial_number": 2, "kind": "refined", "state": "failed", "loss": None, "reason": "the loss is nan"},
            TRIAL | {"study_name": "r-old/model", "site_id": None, "state": "pruned", "loss": None, "params": "{}"},
        ]
        for row in digests:
            insert(previous, {"alphasmith_trial_digest": row})
        initialise(previous)
        found = RunStore(previous).trials("r-old")
        assert [(t.site, t.number, t.kind, t.state, t.loss, t.reason) for t in found] == [
            ("fc1", 0, "sampler", "complete", 2.5e-4, ""),
            ("fc1", 1, "reused", "complete", 2.5e-4, ""),
            ("fc1", 2, "refined", "failed", None, "the loss is nan"),
            ("model", 0, "sampler", "pruned", None, ""),
        ]
        assert found[1].params == {"alpha_0": 0.5, "shift": "mean", "forced": True}
        assert {trial.seconds for trial in found} == {0.01}
        study = optuna.load_study(study_name="r-old/model", storage=optuna_storage(previous))
        study.add_trial(optuna.trial.create_trial(value=1.0))
        assert [trial.number for trial in study.trials] == [0, 1]

    def test_what_optuna_holds_without_a_word_is_told(self, previous: Database) -> None:
        storage = optuna_storage(previous)
        study = optuna.create_study(study_name="r-old/fc1", storage=storage)
        limits: dict[str, BaseDistribution] = {"alpha_0": FloatDistribution(0, 1)}
        study.add_trial(optuna.trial.create_trial(value=2.5e-4, params={"alpha_0": 0.25}, distributions=limits))
        initialise(previous)
        (trial,) = RunStore(previous).trials("r-old")
        assert (trial.kind, trial.loss, trial.seconds, trial.params) == ("sampler", 2.5e-4, 0.01, {"alpha_0": 0.25})
        assert len(optuna.load_study(study_name="r-old/fc1", storage=optuna_storage(previous)).trials) == 1

    def test_nothing_is_done_while_an_earlier_version_drives_a_run(self, previous: Database) -> None:
        with previous.engine.begin() as connection:
            until = datetime.now(UTC).replace(tzinfo=None) + timedelta(hours=1)
            connection.execute(text("UPDATE alphasmith_run SET driver = 'me', driver_until = :until"), {"until": until})
        with pytest.raises(InputError, match="r-old goes on under an earlier Alphasmith"):
            initialise(previous)
        assert revision(previous) == "0003"
        initialise(previous, force=True)
        assert RunStore(previous).get("r-old").driver == "me"

    def test_rows_of_the_previous_schema_survive(self, previous: Database) -> None:
        with previous.engine.begin() as connection:
            connection.execute(text("UPDATE alphasmith_site SET facts = '{\"k_tried\": [2]}', range_factor = 0.9"))
            connection.execute(text("UPDATE alphasmith_group SET beta = 0.75"))
        insert(previous, {"alphasmith_group": GROUP | {"site_id": None, "size": 9}})
        initialise(previous)
        store = RunStore(previous)
        (site,) = store.sites("r-old")
        assert (site.facts, site.range_factor, site.groups[0].beta) == (SearchFacts(k_tried=(2,)), 0.9, 0.75)
        assert [group.size for group in store.groups("r-old")] == [9]
        late = RUN | {"id": "r-late", "status": "interrupted"}
        insert(previous, {"alphasmith_run": late})
        assert (store.get("r-late").status, store.get("r-late").config_digest) == ("interrupted", "")
        with pytest.raises((IntegrityError, OperationalError), match=r"(?i)constraint"):
            insert(previous, {"alphasmith_run": RUN | {"id": "r-odd", "status": "invented"}})
        with previous.engine.connect() as connection:
            assert differences(connection) == []

    def test_checks_still_hold_and_the_version_before_reads_an_old_writer(self, old: Database) -> None:
        to_revision(old, EARLIER[-1])
        insert(old, {"alphasmith_run": RUN | {"id": "r-late"}, "alphasmith_site": SITE | {"id": 8, "run_id": "r-late"}})
        for wrong in ({"kind": "invented"}, {"state": "lost"}, {"loss": None}):
            with pytest.raises((IntegrityError, OperationalError), match=r"(?i)constraint"):
                insert(old, {"alphasmith_trial_digest": TRIAL | {"trial_number": 1} | wrong})
        insert(old, {"alphasmith_trial_digest": TRIAL | {"trial_number": 1, "kind": "refined"}})
        initialise(old)
        (site,) = RunStore(old).sites("r-late")
        assert (site.shift, site.range_statistic, site.range_factor, site.grouping) == (False, "absmax", 1.0, "")
        assert [trial.kind for trial in RunStore(old).trials("r-old")] == ["sampler", "refined"]

    @pytest.mark.parametrize(
        ("last", "left"),
        [
            ("refined'", "0001"),
            ("alphasmith_result", "0002"),
            ("reused", "0002"),
            ("model_groups", "0003"),
            ("UPDATE alphasmith_site SET entry", "0003"),
            ("alphasmith_artifact", "0003"),
            ("held_out_limit", "0003"),
        ],
    )
    def test_an_interrupted_upgrade_goes_on(self, old: Database, last: str, left: str) -> None:
        def interrupt(_c: Any, _cursor: Any, statement: str, _p: Any, _x: Any, _m: bool) -> None:
            if last in statement:
                raise KeyboardInterrupt

        event.listen(old.engine, "before_cursor_execute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            initialise(old)
        event.remove(old.engine, "before_cursor_execute", interrupt)
        # MySQL keeps what came before; the others take all of it back.
        assert revision(old) == (left if old.backend == "mysql" else "0001")
        initialise(old)
        with old.engine.connect() as connection:
            assert differences(connection) == []
        (site,) = RunStore(old).sites("r-old")
        assert (site.winner, [group.alpha for group in site.groups]) == ("sampler", [0.25])
        assert len(RunStore(old).trials("r-old")) == 1

    def test_the_version_before_can_be_taken_back(self, old: Database) -> None:
        to_revision(old, EARLIER[-1])
        to_revision(old, "0001", down=True)
        assert revision(old) == "0001"
        insert(old, {"alphasmith_trial_digest": TRIAL | {"trial_number": 1}})
        initialise(old)
        assert len(RunStore(old).trials("r-old")) == 2


def _as_written(read: Any, written: Any) -> Any:
    """What was read, without the keys that were not written."""
    if isinstance(written, dict):
        return {key: _as_written(read[key], value) for key, value in written.items()}
    if isinstance(written, list):
        return [_as_written(one, other) for one, other in zip(read, written, strict=True)]
    return read


class TestCommittedFolder:
    @pytest.mark.parametrize(("name", "sites", "groups"), [("run_version_2", 6, 0), ("run_version_2_model", 0, 2)])
    def test_a_manifest_of_the_second_version_says_what_it_said(self, name: str, sites: int, groups: int) -> None:
        written = json.loads((DATA / name / "manifest.json").read_text(encoding="utf-8"))
        assert written.pop("schema_version") == 2
        manifest = read_manifest(DATA / name)
        read = json.loads(manifest.to_json())
        # What later versions added stands at its default.
        assert [site["position"] for site in read["sites"]] == [0, 1, 2]
        assert [site["kind"] for site in read["sites"]] == ["", "", ""]
        assert read["conventions"]["clamp_max"] is None
        assert _as_written(read, written) == written
        assert (sum(len(site.groups) for site in manifest.sites), len(manifest.groups)) == (sites, groups)

    def test_a_manifest_of_the_first_version_is_read_with_defaults(self) -> None:
        manifest = read_manifest(DATA / "run_version_1")
        assert '"schema_version": 1' in (DATA / "run_version_1" / "manifest.json").read_text(encoding="utf-8")
        assert manifest.refinement is None
        assert [site.name for site in manifest.sites] == ["fc1", "fc2", "head"]
        for site in manifest.sites:
            assert (site.shift, site.range_statistic, site.range_factor, site.facts) == (False, "absmax", 1.0, None)
            assert {(group.beta, group.offset) for group in site.groups} == {(None, None)}
