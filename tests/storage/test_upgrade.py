"""Databases and output folders of earlier schemas: read, brought up to date, and refused where they cannot be.

``data/schema_NNNN.sqlite`` is the database of a real run of that schema (three sites, four trials each; from 0002 on also a
refinement of four trials), and ``data/run_version_1`` the output folder of the first without the report; only the run's
folder name was shortened.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, MetaData, event, inspect, text
from sqlalchemy.exc import IntegrityError, OperationalError

from alphasmith.objectives.errors import InputError
from alphasmith.storage import database as room
from alphasmith.storage.database import Database, initialise, open_database, open_existing, optuna_storage
from alphasmith.storage.manifest import read_manifest
from alphasmith.storage.migrations import CONTEXT_OPTIONS, VERSION_TABLE
from alphasmith.storage.records import RunStore, SiteRecord, TrialDigest
from alphasmith.storage.tables import Base, DatabaseRow

DATA = Path(__file__).parent / "data"
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
EARLIER = ("0001", "0002")


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
    with opened.engine.begin() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            table.drop(connection)
        connection.execute(text(f"DROP TABLE {VERSION_TABLE}"))
    to_revision(opened, schema)
    insert(opened, ROWS)


def to_revision(database: Database, revision: str, *, down: bool = False) -> None:
    """What ``initialise`` does, to any revision."""
    config = Config()
    config.set_main_option("script_location", str(Path(room.__file__).parent / "migrations").replace("%", "%%"))
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


class TestCommittedDatabase:
    def test_it_is_of_that_schema(self, copied: str, schema: str) -> None:
        opened = open_database(copied)
        assert revision(opened) == schema
        catalogue = inspect(opened.engine)
        assert ("shift" in {column["name"] for column in catalogue.get_columns("alphasmith_site")}) == (schema > "0001")
        assert not catalogue.has_table("alphasmith_ticket")
        opened.close()

    def test_reading_it_brings_it_up_to_date_and_keeps_every_row(self, copied: str) -> None:
        opened = open_database(copied)
        before = MetaData()
        before.reflect(opened.engine)
        with opened.engine.connect() as connection:
            held = {t.name: connection.execute(t.select()).mappings().all() for t in before.sorted_tables}
        opened.close()
        opened = open_existing(copied)
        after = MetaData()
        after.reflect(opened.engine)
        with opened.engine.connect() as connection:
            assert differences(connection) == []
            for name, rows in held.items():
                if name == VERSION_TABLE:
                    continue
                kept = connection.execute(after.tables[name].select()).mappings().all()
                assert [{key: new[key] for key in was} for was, new in zip(rows, kept, strict=True)] == [
                    dict(row) for row in rows
                ]
            assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        opened.close()

    def test_its_records_say_what_they_said(self, copied: str, schema: str) -> None:
        opened = open_existing(copied)
        store = RunStore(opened)
        (run,) = store.runs()
        assert (run.status, run.folder, run.config_digest, run.artifacts, run.driver) == (
            "finished",
            "out",
            "",
            "",
            None,
        )
        assert (run.refinement is None) == (schema == "0001")
        sites = store.sites(run.id)
        assert [site.name for site in sites] == ["fc1", "fc2", "head"]
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
        assert store.find_trial(trials[1].study_name, trials[1].params_hash) is not None
        study = optuna.load_study(study_name=str(sites[0].study_name), storage=optuna_storage(opened))
        assert len(study.trials) == 4
        studies = [site.name for site in sites] + ([] if schema == "0001" else ["refinement"])
        assert store.delete(run.id) == tuple(f"{run.id}/{name}" for name in studies)
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


class TestEveryBackend:
    def test_rows_of_the_first_schema_survive(self, old: Database) -> None:
        initialise(old)
        assert revision(old) == "0003"
        store = RunStore(old)
        run = store.get("r-old")
        assert (run.config, run.refinement, run.created.microsecond) == ({"groups": {"k": 2}}, None, 123456)
        (site,) = store.sites("r-old")
        assert site.held_out is not None
        assert (site.held_out.ours, site.winner, site.operators) == (2.5e-4, "sampler", ("fc1",))
        assert (site.shift, site.range_statistic, site.range_factor, site.facts) == (False, "absmax", 1.0, None)
        (group,) = site.groups
        assert (group.alpha, group.beta, group.offset) == (0.25, None, None)
        (trial,) = store.trials("r-old")
        assert (trial.params, trial.kind) == ({"alpha_0": 0.25}, "sampler")
        with old.engine.connect() as connection:
            assert differences(connection) == []

    def test_what_the_new_columns_are_for(self, old: Database) -> None:
        initialise(old)
        store = RunStore(old)
        facts = {"stopped": "within 1 % of the limit", "noise_model": None, "k_tried": [1, 2]}
        (was,) = store.sites("r-old")
        site = SiteRecord(
            name="fc2", position=1, mode="explicit", channels=4, shift=True, range_statistic="margin", range_factor=1.1,
            grouping="kmeans", statistic="rms", facts=facts, winner="refined", groups=was.groups,
        )  # fmt: skip
        trial = TrialDigest.of(
            study_name="r-old/fc2", trial_number=0, kind="refined", state="complete", loss=0.5, seconds=0.1,
            params={"alpha_0": 0.5, "offset_0": -0.25, "shift": True, "range": "margin"},
        )  # fmt: skip
        store.add_site("r-old", site, [trial])
        assert store.sites("r-old")[1] == site
        assert store.trials("r-old", study_name="r-old/fc2") == [trial]

    def test_rows_of_the_previous_schema_survive_and_may_be_what_is_new(self, previous: Database) -> None:
        insert(previous, {"alphasmith_trial_digest": TRIAL | {"trial_number": 1, "kind": "refined"}})
        with previous.engine.begin() as connection:
            connection.execute(text("UPDATE alphasmith_site SET facts = '{\"k_tried\": [2]}', range_factor = 0.9"))
            connection.execute(text("UPDATE alphasmith_group SET beta = 0.75"))
        initialise(previous)
        store = RunStore(previous)
        (site,) = store.sites("r-old")
        assert (site.facts, site.range_factor, site.groups[0].beta) == ({"k_tried": [2]}, 0.9, 0.75)
        assert [trial.kind for trial in store.trials("r-old")] == ["sampler", "refined"]
        insert(previous, {"alphasmith_trial_digest": TRIAL | {"trial_number": 2, "kind": "reused"}})
        late = RUN | {"id": "r-late", "status": "interrupted"}
        insert(previous, {"alphasmith_run": late})
        assert (store.get("r-late").status, store.get("r-late").config_digest) == ("interrupted", "")
        with pytest.raises((IntegrityError, OperationalError), match=r"(?i)constraint"):
            insert(previous, {"alphasmith_run": RUN | {"id": "r-odd", "status": "invented"}})
        with previous.engine.connect() as connection:
            assert differences(connection) == []

    def test_checks_still_hold_and_an_old_writer_may_finish(self, old: Database) -> None:
        initialise(old)
        insert(old, {"alphasmith_run": RUN | {"id": "r-late"}, "alphasmith_site": SITE | {"id": 8, "run_id": "r-late"}})
        (site,) = RunStore(old).sites("r-late")
        assert (site.shift, site.range_statistic, site.range_factor, site.grouping) == (False, "absmax", 1.0, "")
        for wrong in ({"kind": "invented"}, {"state": "lost"}, {"loss": None}):
            with pytest.raises((IntegrityError, OperationalError), match=r"(?i)constraint"):
                insert(old, {"alphasmith_trial_digest": TRIAL | {"trial_number": 1} | wrong})
        insert(old, {"alphasmith_trial_digest": TRIAL | {"trial_number": 1, "kind": "refined"}})

    @pytest.mark.parametrize("last", ["refined'", "alphasmith_result", "reused"])
    def test_an_interrupted_upgrade_goes_on(self, old: Database, last: str) -> None:
        def interrupt(_c: Any, _cursor: Any, statement: str, _p: Any, _x: Any, _m: bool) -> None:
            if last in statement:
                raise KeyboardInterrupt

        event.listen(old.engine, "before_cursor_execute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            initialise(old)
        event.remove(old.engine, "before_cursor_execute", interrupt)
        # MySQL keeps what came before; the others take all of it back.
        assert revision(old) == ("0002" if old.backend == "mysql" and not last.startswith("refined") else "0001")
        initialise(old)
        with old.engine.connect() as connection:
            assert differences(connection) == []
        insert(old, {"alphasmith_trial_digest": TRIAL | {"trial_number": 1, "kind": "reused"}})
        assert len(RunStore(old).trials("r-old")) == 2

    def test_it_can_be_taken_back(self, old: Database) -> None:
        initialise(old)
        to_revision(old, "0001", down=True)
        assert revision(old) == "0001"
        insert(old, {"alphasmith_trial_digest": TRIAL | {"trial_number": 1}})
        initialise(old)
        assert len(RunStore(old).trials("r-old")) == 2


class TestCommittedFolder:
    def test_a_manifest_of_the_first_version_is_read_with_defaults(self) -> None:
        manifest = read_manifest(DATA / "run_version_1")
        assert '"schema_version": 1' in (DATA / "run_version_1" / "manifest.json").read_text(encoding="utf-8")
        assert manifest.refinement is None
        assert [site.name for site in manifest.sites] == ["fc1", "fc2", "head"]
        for site in manifest.sites:
            assert (site.shift, site.range_statistic, site.range_factor, site.facts) == (False, "absmax", 1.0, None)
            assert {(group.beta, group.offset) for group in site.groups} == {(None, None)}
