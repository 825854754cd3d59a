"""Where a run goes on, and what is seen to be wrong with places and engine before anything is computed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.search import RunConfig, resume
from alphasmith.search.interruption import Interrupted
from alphasmith.search.launch import recorder
from alphasmith.search.launch._lookup import writable_store
from alphasmith.search.progress import Silent
from alphasmith.search.work.site_sources import PublishedSites
from alphasmith.storage.artifacts._bucket import BucketBackend
from alphasmith.storage.artifacts.folder import FolderBackend
from alphasmith.storage.artifacts.run_artifacts import RunArtifacts
from alphasmith.storage.artifacts.store import ArtifactStore
from alphasmith.storage.database.connection import open_existing
from alphasmith.storage.output.reservation import Reservation, reservation_file
from alphasmith.storage.queue.board import Board
from alphasmith.storage.queue.records import WorkerRecord
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.upkeep.check import violations
from alphasmith.storage.upkeep.garbage import Removal, collect
from tests.support.run_cases import TRIAL_SECONDS, Mlp, launch, rows, seeded, settings, vectors
from tests.support.servers import empty_database


class Stages(Silent):
    """Remembers what was begun."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.names.append(name)


@pytest.fixture
def model() -> nn.Module:
    return seeded(Mlp)


def places(folder: Path) -> list[tuple[Any, ...]]:
    """Status, output folder and artifact store of every run on record."""
    return rows(folder / "runs.db", "SELECT status, folder, artifacts FROM alphasmith_run ORDER BY created")


def files(folder: Path) -> set[Path]:
    """Everything under a folder."""
    return set(folder.rglob("*"))


def leave_after_a_site(folder: Path, model: nn.Module, values: dict[str, Any] | None = None) -> None:
    """A run that is left once the result of a site is on record."""
    done = "SELECT COUNT(*) FROM alphasmith_result"
    with pytest.raises(Interrupted):
        launch(
            folder,
            model,
            vectors(),
            values,
            stop=lambda: (folder / "runs.db").exists() and rows(folder / "runs.db", done)[0][0] > 0,
        )


def refused(folder: Path, model: nn.Module, values: dict[str, Any], **keywords: Any) -> InputError:
    """A launch that is refused before it calibrates; nothing is left behind, and the records are as before."""
    before, known = files(folder), places(folder) if (folder / "runs.db").exists() else []
    stages = Stages()
    with pytest.raises(InputError) as caught:
        launch(folder, model, vectors(), values, progress=stages, **keywords)
    assert stages.names in ([], ["loading model and data"])
    new = {path.name for path in files(folder) - before if not path.name.startswith("runs.db")}
    assert (new, places(folder) if known else []) == (set(), known)
    assert known or not (folder / "runs.db").exists()
    return caught.value


# ------------------------------------------------------------------------------------------------- the output folder


@pytest.mark.parametrize("fresh", [False, True])
def test_a_finished_command_that_is_repeated_is_refused_at_once(fresh: bool, tmp_path: Path, model: nn.Module) -> None:
    first = launch(tmp_path, model, vectors())
    error = refused(tmp_path, model, {}, fresh=fresh)
    assert (error.field, error.remedy) == ("out", "choose another folder or remove it")
    assert error.problem == f"{tmp_path / 'out'} already exists and holds the result of run {first.id}"


class Elsewhere(Stages):
    """A progress that launches another run at a stage of this one, and remembers what became of it."""

    def __init__(self, at: str, other: Callable[[], object]) -> None:
        super().__init__()
        self.told: list[InputError] = []
        self._at, self._other = at, other

    def stage(self, name: str, total: int | None = None) -> None:
        super().stage(name, total)
        if name == self._at and not self.told:
            with pytest.raises(InputError) as caught:
                self._other()
            self.told.append(caught.value)


@pytest.mark.parametrize(
    ("at", "other_database"), [("loading model and data", False), ("calibrating", True), ("writing", False)]
)
def test_a_second_run_to_the_same_place_is_told_at_the_start(
    tmp_path: Path, model: nn.Module, at: str, other_database: bool
) -> None:
    second = Stages()
    where = tmp_path / "other" if other_database else tmp_path
    where.mkdir(exist_ok=True)
    values = {"search": {"trials": 4}, "out": tmp_path / "out"}
    progress = Elsewhere(at, lambda: launch(where, model, vectors(), values, progress=second))
    result = launch(tmp_path, model, vectors(), values, progress=progress)
    (error,) = progress.told
    assert (error.field, second.names) == ("out", [])
    assert re.search(rf"driven by process {os.getpid()} on ", error.problem)
    assert (result.id in error.problem) == (at == "writing")
    assert [status for status, _, _ in places(tmp_path)] == ["finished"]
    assert not list(tmp_path.glob(".out*"))
    assert not other_database or not list(where.iterdir())


def test_identical_runs_that_choose_their_places_are_one(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"search": {"trials": 4}, "out": None}
    second = Stages()
    progress = Elsewhere("searching sites", lambda: launch(tmp_path, model, vectors(), values, progress=second))
    result = launch(tmp_path, model, vectors(), values, progress=progress)
    (error,) = progress.told
    assert (error.field, second.names) == ("RUN", ["loading model and data"])
    assert result.id in error.problem


def test_a_run_that_lost_its_place_publishes_nothing_and_goes_on_elsewhere(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:

        def taken(*_: object, **__: object) -> str:
            file = reservation_file(tmp_path / "out")
            then = file.stat().st_mtime - 3600
            os.utime(file, (then, then))
            other = stack.enter_context(Reservation(tmp_path / "out", storage="", lease=60.0))
            other.take("r-20260101-000000")
            return ""

        with monkeypatch.context() as patch:
            patch.setattr(recorder, "render_report", taken)
            with pytest.raises(InputError, match="reserved for run r-20260101-000000"):
                launch(tmp_path, model, vectors())
        assert not list(tmp_path.glob("out*"))
        result = launch(tmp_path, model, vectors(), {"out": tmp_path / "elsewhere"})
        assert result.folder == tmp_path / "elsewhere"
    assert [status for status, _, _ in places(tmp_path)] == ["finished"]


def test_an_unfinished_run_does_not_take_the_place_of_another_ones_result(tmp_path: Path, model: nn.Module) -> None:
    other = launch(tmp_path, model, vectors(), {"search": {"seed": 3}, "out": tmp_path / "taken"})
    leave_after_a_site(tmp_path, model)
    error = refused(tmp_path, model, {"out": tmp_path / "taken"})
    assert other.id in error.problem
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{}")
    assert "is not empty" in refused(tmp_path, model, {}).problem


def test_an_unfinished_run_goes_on_to_the_folder_it_is_given(tmp_path: Path, model: nn.Module) -> None:
    leave_after_a_site(tmp_path, model)
    ((run, worker),) = rows(tmp_path / "runs.db", "SELECT run_id, id FROM alphasmith_worker")
    (tmp_path / f"out.partial-{run}-{str(worker).split('/')[2]}").mkdir()
    (tmp_path / "out.partial-0123abcd").mkdir()
    result = launch(tmp_path, model, vectors(), {"out": tmp_path / "deep" / "elsewhere"})
    assert result.folder == tmp_path / "deep" / "elsewhere"
    assert (result.folder / "manifest.json").is_file()
    assert [(status, folder) for status, folder, _ in places(tmp_path)] == [("finished", str(result.folder))]
    assert [path.name for path in tmp_path.glob("out*")] == ["out.partial-0123abcd"]  # nobody's of this run


def test_a_run_that_is_resumed_keeps_the_place_it_was_given_last(tmp_path: Path, model: nn.Module) -> None:
    leave_after_a_site(tmp_path, model)
    with pytest.raises(Interrupted):
        launch(tmp_path, model, vectors(), {"out": tmp_path / "b", "artifacts": f"{tmp_path}/store"}, stop=lambda: True)
    ((status, folder, artifacts),) = places(tmp_path)
    assert (status, folder, artifacts) == ("interrupted", str(tmp_path / "b"), str(tmp_path / "store"))
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    ((run_id,),) = rows(tmp_path / "runs.db", "SELECT id FROM alphasmith_run")
    assert resume(run_id, storage=url, model=model, batches=vectors()).folder == tmp_path / "b"


def test_a_run_killed_before_its_folder_was_recorded_has_one(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "place", killed)
        with pytest.raises(KeyboardInterrupt):
            launch(tmp_path, model, vectors())
    assert places(tmp_path)[0][:2] == ("created", "")
    assert launch(tmp_path, model, vectors()).folder == tmp_path / "out"


# ------------------------------------------------------------------------------------------------ the artifact store


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("s3://", "names no bucket"),
        ("ftp://host/folder", "ftp:// addresses are not supported"),
        ("{}/taken", "is a file"),
        ("{}/taken/deeper", "cannot be made in"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_before_calibration(
    place: str, told: str, tmp_path: Path, model: nn.Module
) -> None:
    (tmp_path / "taken").write_text("a file")
    error = refused(tmp_path, model, {"artifacts": place.format(tmp_path)})
    assert error.field == "artifacts"
    assert told in error.problem
    assert error.remedy


def test_a_store_without_space_is_refused_before_calibration(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs.db.artifacts").mkdir()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "no space left" in refused(tmp_path, model, {}).problem


def test_a_bucket_is_seen_to_be_writable_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Bucket(BucketBackend):
        def __init__(self, bucket: str, prefix: str) -> None:
            pass

        def write(self, artifact_id: str, content_body: Any) -> None:
            done.append(f"write {artifact_id}")

        def remove(self, artifact_id: str) -> None:
            done.append(f"remove {artifact_id}")

    monkeypatch.setattr("alphasmith.storage.artifacts.store.BucketBackend", Bucket)
    config = settings(tmp_path, {"artifacts": "s3://bucket/runs"})
    assert writable_store(config).address == "s3://bucket/runs"
    assert done == ["write probe", "remove probe"]


def test_a_relative_store_is_recorded_as_the_place_it_was(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launch(tmp_path, model, vectors(), {"artifacts": "store"})
    assert places(tmp_path)[0][2] == str(tmp_path / "store")


def test_a_run_with_a_wrong_store_is_mended_by_naming_the_right_one(tmp_path: Path, model: nn.Module) -> None:
    leave_after_a_site(tmp_path, model)
    # As a launch of an earlier version left it: on record, and never able to begin.
    (tmp_path / "taken").write_text("a file")
    right = places(tmp_path)[0][2]
    change(tmp_path, artifacts=f"{tmp_path}/taken")
    assert refused(tmp_path, model, {}).problem == f"{tmp_path}/taken is a file"
    launch(tmp_path, model, vectors(), {"artifacts": right})
    assert [(status, artifacts) for status, _, artifacts in places(tmp_path)] == [("finished", right)]


def change(folder: Path, *, artifacts: str) -> None:
    """Name another store in the record of the only run."""
    with sqlite3.connect(folder / "runs.db") as connection:
        connection.execute("UPDATE alphasmith_run SET artifacts = ?", (artifacts,))


def test_results_go_along_to_another_store(tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    whole = launch(tmp_path / "whole", model, vectors())
    leave_after_a_site(tmp_path, model)
    done = set(rows(tmp_path / "runs.db", TRIAL_SECONDS))
    new = tmp_path / "new"
    # The device of the first store is full: what is there can be read, and nothing can be written.
    real = FolderBackend.drafted

    def drafted(self: FolderBackend) -> Any:
        if self.folder != new:
            raise InputError("artifacts", f"no space left in {self.folder}", "free space")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(FolderBackend, "drafted", drafted)
        assert "no space left" in refused(tmp_path, model, {}).problem
        moved = launch(tmp_path, model, vectors(), {"artifacts": str(new)})
    assert moved.manifest.without_times() == whole.manifest.without_times()
    assert done <= set(rows(tmp_path / "runs.db", TRIAL_SECONDS))
    assert [(status, artifacts) for status, _, artifacts in places(tmp_path)] == [("finished", str(new))]
    assert violations(open_existing(moved.storage), deep=True) == []


def test_a_store_that_was_moved_by_hand_is_simply_named(tmp_path: Path, model: nn.Module) -> None:
    leave_after_a_site(tmp_path, model)
    (tmp_path / "runs.db.artifacts").rename(tmp_path / "new")
    launch(tmp_path, model, vectors(), {"artifacts": str(tmp_path / "new")})
    assert places(tmp_path)[0][2] == str(tmp_path / "new")
    assert not (tmp_path / "runs.db.artifacts").exists()


def test_a_run_does_not_leave_its_results_behind(tmp_path: Path, model: nn.Module) -> None:
    leave_after_a_site(tmp_path, model)
    # The run is left at its next poll, so on a busy machine more than one site may be on record by then.
    results = rows(tmp_path / "runs.db", "SELECT COUNT(*) FROM alphasmith_result")[0][0]
    (tmp_path / "runs.db.artifacts").rename(tmp_path / "lost")
    error = refused(tmp_path, model, {"artifacts": str(tmp_path / "new")})
    assert error.field == "artifacts"
    assert f"{results} objects that" in error.problem
    assert "is gone" in error.problem
    assert "--new" in error.remedy


def test_a_run_does_not_leave_the_store_its_workers_write_to(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_after_a_site(tmp_path, model)
    now = datetime.now(UTC)
    worker = WorkerRecord(
        id="elsewhere/1/aa", role="worker", host="elsewhere", pid=1, engine="", alive=True, left=False, joined=now,
        heartbeat=now, age=0.0,
    )  # fmt: skip
    monkeypatch.setattr(Board, "workers", lambda self: [worker])
    error = refused(tmp_path, model, {"artifacts": str(tmp_path / "new")})
    assert "still use" in error.problem
    monkeypatch.setattr(Board, "workers", lambda self: [replace(worker, alive=False)])
    launch(tmp_path, model, vectors(), {"artifacts": str(tmp_path / "new")})


@pytest.fixture
def server() -> Iterator[str]:
    """Address of an empty PostgreSQL database."""
    with empty_database("postgresql") as url:
        yield url


def test_workers_find_in_the_new_store_what_they_need(server: str, tmp_path: Path, model: nn.Module) -> None:
    def until_searched(store: str) -> None:
        stages = Stages()
        values = {"storage": server, "artifacts": f"{tmp_path}/{store}"}
        with pytest.raises(Interrupted):
            launch(tmp_path, model, vectors(), values, progress=stages, stop=lambda: "searching sites" in stages.names)

    until_searched("old")
    until_searched("new")
    shutil.rmtree(tmp_path / "old")
    database = open_existing(server)
    (run,) = RunStore(database).runs()
    assert run.artifacts == f"{tmp_path}/new"
    sites = [ticket.site for ticket in Board(database, run.id, role="worker").tickets()]
    published = PublishedSites(RunArtifacts(database, ArtifactStore.open(run.artifacts), run.id), sites)
    assert [published.site(name).name for name in sites] == sites != []
    database.close()


def test_cleaning_spares_a_store_that_cannot_be_used(tmp_path: Path, model: nn.Module) -> None:
    leave_after_a_site(tmp_path, model)
    change(tmp_path, artifacts="s3://user:hush@bucket/runs")
    stray = ArtifactStore.open(f"{tmp_path}/runs.db.artifacts").put({"x": next(model.parameters())})
    old = tmp_path / "runs.db.artifacts" / stray.path
    found = collect(open_existing(f"sqlite:///{tmp_path / 'runs.db'}"), older_than=timedelta(0))
    told = "an artifact store that cannot be used (the address holds more than bucket and prefix)"
    assert [item for item in found if item.what == "spared"] == [Removal(what="spared", name=told)]
    assert not old.exists(), "the other store is cleaned all the same"


# ---------------------------------------------------------------------------------------------------------- the engine


def test_a_ray_cluster_that_does_not_answer_is_told_before_calibration(tmp_path: Path, model: nn.Module) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    values = {"engine": "ray", "workers": {"address": "127.0.0.1:1"}}
    assert refused(tmp_path, model, values).field == "workers.address"


def test_ray_that_is_not_installed_is_told_before_calibration(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused(tmp_path, model, {"engine": "ray"})
    assert str(error) == "engine: ray is not installed; pip install 'alphasmith[ray]'"


def test_a_place_that_is_not_given_is_the_recorded_one(tmp_path: Path) -> None:
    config = RunConfig.build({"storage": f"sqlite:///{tmp_path / 'runs.db'}"})
    assert writable_store(config).address == f"{tmp_path / 'runs.db'}.artifacts"
