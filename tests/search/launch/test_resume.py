"""Runs that are left and taken up again: nothing is searched twice, nothing changes, what changed outside is named."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from alphasmith.objectives.calibration.tensor_state import StateFormat
from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.search import RunConfig, RunResult, resume
from alphasmith.search.inputs.calibration_cache import CalibrationCache
from alphasmith.search.interruption import Interrupted
from alphasmith.search.launch import recorder
from alphasmith.search.progress import Silent
from alphasmith.search.site import result as site_result
from alphasmith.search.site.result import SiteResult
from alphasmith.storage.database.connection import open_existing
from alphasmith.storage.files.durable import digest_file
from alphasmith.storage.output.manifest import FILE_NAME
from alphasmith.storage.queue.board import Board
from alphasmith.storage.runs.data_frames import AT_OUTPUT
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.upkeep.check import violations
from tests.support.buckets import SECRET, Bucket
from tests.support.run_cases import (
    REFINED,
    TRIAL_SECONDS,
    Likeness,
    Mlp,
    alphasmith,
    launch,
    rows,
    seeded,
    settings,
    tiny_llama,
    tokens,
    vectors,
)

_CONFIG = "SELECT config, artifacts FROM alphasmith_run"


class Notes(Silent):
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.lines.append(name)

    def advance(self, detail: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        self.lines.append(text)

    def has(self, words: str) -> bool:
        return any(words in line for line in self.lines)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: nn.Module) -> tuple[RunResult, int]:
    """A whole run, and how often it asked whether to stop."""
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return False

    return launch(tmp_path_factory.mktemp("whole"), model, tokens(), REFINED, stop=stop), len(asked)


def after(calls: int) -> Callable[[], bool]:
    """Asks to stop from the given call on."""
    left: Iterator[int] = iter(range(calls))
    return lambda: next(left, None) is None


def once_recorded(folder: Path, trials: int) -> Callable[[], bool]:
    """Asks to stop once so many trials are in the database."""
    return lambda: (folder / "runs.db").exists() and len(_recorded(folder)) >= trials


def found(result: RunResult) -> list[dict[str, Any]]:
    """Every trial without its times."""
    frame = result.trials.drop(columns=["seconds", "study_name"])
    return list(json.loads(frame.to_json(orient="records", double_precision=15)))


def status(folder: Path) -> list[tuple[Any, ...]]:
    return rows(folder / "runs.db", "SELECT status, reason FROM alphasmith_run ORDER BY created")


def test_before_anything_is_found_nothing_is_left(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(Interrupted, match="before anything was on record"):
        launch(tmp_path, model, tokens(), stop=after(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.35, 0.5, 0.7, 0.85, 0.97])
def test_a_run_left_anywhere_finds_what_it_would_have_found(
    share: float, undisturbed: tuple[RunResult, int], tmp_path: Path, model: nn.Module
) -> None:
    whole, asked = undisturbed
    with pytest.raises(Interrupted, match=r"resume with: alphasmith resume r-\S+ --storage sqlite:///"):
        launch(tmp_path, model, tokens(), REFINED, stop=after(int(asked * share)))
    assert [state for state, _ in status(tmp_path)] == ["interrupted"]
    assert not (tmp_path / "out").exists()
    before = {(r["site"], r["number"]) for r in _recorded(tmp_path)}
    again = launch(tmp_path, model, tokens(), REFINED, progress=(notes := Notes()))
    assert notes.has("going on with it")
    assert [state for state, _ in status(tmp_path)] == ["finished"]
    assert found(again) == found(whole)
    assert again.manifest.without_times() == whole.manifest.without_times()
    assert before <= {(str(r["site"]), int(r["number"])) for r in found(again)}
    told = again.manifest.run
    ((finished,),) = rows(tmp_path / "runs.db", "SELECT finished FROM alphasmith_run")
    assert told.created < told.started < told.finished <= datetime.fromisoformat(str(finished)).replace(tzinfo=UTC)
    assert violations(open_existing(again.storage)) == []


def test_results_that_are_gone_or_damaged_are_searched_again(
    undisturbed: tuple[RunResult, int], tmp_path: Path, model: nn.Module
) -> None:
    whole, asked = undisturbed
    with pytest.raises(Interrupted):
        launch(tmp_path, model, tokens(), REFINED, stop=after(int(asked * 0.85)))
    kept = rows(tmp_path / "runs.db", "SELECT site, artifact_id FROM alphasmith_result ORDER BY id")
    assert len(kept) > 2
    (store,) = {path.parent for path in tmp_path.rglob(str(kept[0][1]))}
    (store / str(kept[0][1])).unlink()
    damaged = store / str(kept[1][1])
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    again = launch(tmp_path, model, tokens(), REFINED, progress=(notes := Notes()))
    assert notes.has("2 recorded results are gone, damaged or of another version")
    assert found(again) == found(whole)
    assert again.manifest.without_times() == whole.manifest.without_times()
    assert violations(open_existing(again.storage)) == []


@pytest.mark.slow
def test_results_of_another_version_are_searched_again(
    undisturbed: tuple[RunResult, int], tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, asked = undisturbed
    earlier = StateFormat(SiteResult, version=1, what="site result", remedy="search the site again")
    with monkeypatch.context() as patch:
        patch.setattr(site_result, "_FORMAT", earlier)
        with pytest.raises(Interrupted):
            launch(tmp_path, model, tokens(), REFINED, stop=after(int(asked * 0.85)))
    known = len(rows(tmp_path / "runs.db", "SELECT site FROM alphasmith_result"))
    assert known > 2
    again = launch(tmp_path, model, tokens(), REFINED, progress=(notes := Notes()))
    assert notes.has(f"{known} recorded results are gone, damaged or of another version")
    assert found(again) == found(whole)


def test_a_run_that_keeps_its_objects_in_a_bucket_goes_on_too(
    undisturbed: tuple[RunResult, int], tmp_path: Path, model: nn.Module, bucket: Bucket
) -> None:
    whole, asked = undisturbed
    values = {**REFINED, "artifacts": f"s3://{bucket.name}/runs"}
    with pytest.raises(Interrupted):
        launch(tmp_path, model, tokens(), values, stop=after(int(asked * 0.7)))
    assert not list(tmp_path.glob("*.artifacts"))
    assert bucket.client.list_objects_v2(Bucket=bucket.name)["KeyCount"] > 2
    again = launch(tmp_path, model, tokens(), values, progress=(notes := Notes()))
    assert notes.has("calibration rows and statistics are on record and used again")
    assert notes.has("sites are on record and not searched again")
    assert found(again) == found(whole)
    for text in ((tmp_path / "out" / FILE_NAME).read_text(), *notes.lines, str(rows(tmp_path / "runs.db", _CONFIG))):
        assert SECRET not in text


def _recorded(folder: Path) -> list[dict[str, Any]]:
    query = (
        "SELECT s.study_name, t.number FROM trials t JOIN studies s ON s.study_id = t.study_id "
        "WHERE t.state IN ('COMPLETE', 'PRUNED', 'FAIL')"
    )
    return [{"site": name.partition("/")[2], "number": number} for name, number in rows(folder / "runs.db", query)]


def test_what_is_on_record_is_not_computed_again(
    undisturbed: tuple[RunResult, int], tmp_path: Path, model: nn.Module
) -> None:
    _, asked = undisturbed
    with pytest.raises(Interrupted):
        launch(tmp_path, model, tokens(), REFINED, stop=after(int(asked * 0.6)))
    seconds = TRIAL_SECONDS
    known = set(rows(tmp_path / "runs.db", seconds))
    assert known
    again = launch(tmp_path, model, tokens(), REFINED, progress=(notes := Notes()))
    assert notes.has("calibration rows and statistics are on record and used again")
    assert notes.has("sites are on record and not searched again")
    assert known <= set(rows(tmp_path / "runs.db", seconds)), "a repeated trial would have other seconds"
    attempts = rows(tmp_path / "runs.db", "SELECT state, COUNT(*) FROM alphasmith_attempt GROUP BY state")
    assert dict(attempts)["done"] == int((again.sites["mode"] != "left").sum())


def test_a_run_over_the_whole_model_goes_on_too(tmp_path: Path, model: nn.Module) -> None:
    values = {"search": {"scope": "model", "trials": 8}}
    (tmp_path / "whole").mkdir()
    (tmp_path / "left").mkdir()
    whole = launch(tmp_path / "whole", model, tokens(), values)
    for trials in (3, 5):
        with pytest.raises(Interrupted):
            launch(tmp_path / "left", model, tokens(), values, stop=once_recorded(tmp_path / "left", trials))
    assert _recorded(tmp_path / "left")
    again = launch(tmp_path / "left", model, tokens(), values)
    assert found(again) == found(whole)
    assert again.manifest.without_times() == whole.manifest.without_times()


def test_what_changed_is_named(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(Interrupted):
        launch(tmp_path, model, tokens(), stop=after(10))
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    ((run_id,),) = rows(tmp_path / "runs.db", "SELECT id FROM alphasmith_run")
    other = seeded(Mlp)
    with pytest.raises(InputError, match=r"^model: changed since run r-\S+ began \(sha256 \w{12} then, \w{12} now\)"):
        resume(run_id, storage=url, model=other, batches=tokens())
    with pytest.raises(InputError, match=r"^data: changed since run"):
        resume(run_id, storage=url, model=model, batches=tokens(seed=5))
    changes = {"groups": {"k": 3}, "search": {"trials": 9, "rows": 64, "single_alphas": 5, "refine": False}}
    told = r"^config: not that of run r-\S+: groups.k was 2 and is 3, search.trials was 5"
    with pytest.raises(InputError, match=told):
        resume(run_id, storage=url, model=model, batches=tokens(), changes=changes)
    assert resume(run_id, storage=url, model=model, batches=tokens()).id == run_id
    with pytest.raises(InputError, match=r"^RUN: r-\S+ is finished; its result is in"):
        resume(run_id, storage=url, model=model, batches=tokens())


@pytest.mark.parametrize(
    ("section", "field", "other"), [("scheme", "kernel", "u8s8-pairs16"), (None, "round_scales", "pow2")]
)
def test_a_run_from_before_a_field_existed_goes_on(
    tmp_path: Path, model: nn.Module, section: str | None, field: str, other: str
) -> None:
    with pytest.raises(Interrupted):
        launch(tmp_path, model, tokens(), stop=after(10))
    ((run_id, text),) = rows(tmp_path / "runs.db", "SELECT id, config FROM alphasmith_run")
    config = json.loads(text)
    del (config if section is None else config[section])[field]
    with closing(sqlite3.connect(tmp_path / "runs.db")) as connection, connection:
        connection.execute("UPDATE alphasmith_run SET config = ?", (json.dumps(config),))
    changes = {field: other} if section is None else {section: {field: other}}
    told = f"^config: not that of run {run_id}: .*{field} was None and is '{other}'"
    with pytest.raises(InputError, match=told):
        resume(run_id, storage=f"sqlite:///{tmp_path / 'runs.db'}", model=model, batches=tokens(), changes=changes)
    assert launch(tmp_path, model, tokens()).id == run_id


def test_another_configuration_and_a_fresh_start_are_runs_of_their_own(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(Interrupted):
        launch(tmp_path, model, tokens(), stop=after(10))
    launch(tmp_path, model, tokens(), {"search": {"seed": 3}, "out": tmp_path / "b"})
    launch(tmp_path, model, tokens(), {"out": tmp_path / "c"}, fresh=True)
    assert [state for state, _ in status(tmp_path)] == ["interrupted", "finished", "finished"]


def test_a_second_driver_is_refused_and_the_first_one_not_disturbed(tmp_path: Path, model: nn.Module) -> None:
    refused: list[str] = []

    def meanwhile() -> bool:
        if (
            not refused
            and (tmp_path / "runs.db").exists()
            and rows(tmp_path / "runs.db", "SELECT 1 FROM trials LIMIT 1")
        ):
            refused.append("")
            with pytest.raises(InputError) as error:
                launch(tmp_path, model, tokens())
            refused.append(str(error.value))
        return False

    result = launch(tmp_path, model, tokens(), stop=meanwhile)
    assert "driven by" in refused[1]
    assert [state for state, _ in status(tmp_path)] == ["finished"]
    assert violations(open_existing(result.storage)) == []


def test_a_run_killed_after_its_folder_was_written_only_finishes_its_record(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "_annotate", killed)
        with pytest.raises(KeyboardInterrupt):
            launch(tmp_path, model, tokens())
    before = digest_file(tmp_path / "out" / FILE_NAME, name=FILE_NAME)
    notes = Notes()
    again = launch(tmp_path, model, tokens(), progress=notes)
    assert notes.has("was written before")
    assert not notes.has("calibrating")
    assert digest_file(tmp_path / "out" / FILE_NAME, name=FILE_NAME) == before
    assert [state for state, _ in status(tmp_path)] == ["finished"]
    assert len(again.sites)


def _take_over(folder: Path) -> None:
    """Another process becomes the driver."""
    with closing(sqlite3.connect(folder / "runs.db")) as connection, connection:
        connection.execute("UPDATE alphasmith_run SET driver = 'elsewhere/1/0123abcd/0--'")


def _lose_the_partial_folder(folder: Path) -> None:
    (partial,) = folder.glob("out.partial-*")
    shutil.rmtree(partial)


@pytest.mark.parametrize("step", ["render_report", "_annotate"])
def test_a_driver_that_was_replaced_while_it_wrote_is_refused(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    whole = getattr(recorder, step)

    def replaced(*args: Any, **keywords: Any) -> Any:
        _take_over(tmp_path)
        return whole(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(recorder, step, replaced)
        with pytest.raises(AlphasmithError, match="was taken over by another process"):
            launch(tmp_path, model, tokens())
    published = step == "_annotate"
    assert ((tmp_path / "out").exists(), status(tmp_path)) == (published, [("running", "")])
    assert not list(tmp_path.glob("*.partial-*"))
    notes = Notes()
    again = launch(tmp_path, model, tokens(), progress=notes)
    assert notes.has("was written before") == published
    assert again.manifest.run.created <= again.manifest.run.started <= again.manifest.run.finished
    with pytest.raises(InputError, match="is finished"):
        resume(again.id, storage=again.storage, model=model, batches=tokens())


def test_a_run_whose_partial_folder_vanishes_publishes_nothing_and_can_be_finished(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanishes(*_: object, **__: object) -> str:
        _lose_the_partial_folder(tmp_path)
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "render_report", vanishes)
        with pytest.raises(InputError, match="removed or replaced"):
            launch(tmp_path, model, tokens())
    assert [state for state, _ in status(tmp_path)] == ["failed"]
    assert not list(tmp_path.glob("out*"))
    result = launch(tmp_path, model, tokens())
    there = {path.relative_to(result.folder).as_posix() for path in result.folder.rglob("*") if path.is_file()}
    assert there == {FILE_NAME, *(artifact.path for artifact in result.manifest.artifacts)}


@pytest.mark.slow
def test_a_later_run_starts_from_recorded_winners_and_says_so(tmp_path: Path, model: nn.Module) -> None:
    first = launch(tmp_path, model, tokens(), {"search": {"trials": 12}})
    notes = Notes()
    values = {"search": {"trials": 5, "seed": 1}, "out": tmp_path / "again"}
    second = launch(tmp_path, model, tokens(), values, progress=notes)
    searched = int((first.sites["mode"] != "left").sum())
    assert notes.has(f"{searched} of {searched} sites start from winners on record (run {first.id})")
    assert "reused" in set(second.trials["kind"])
    of_sites = second.trials[~second.trials["site"].isin(AT_OUTPUT)]
    for _, trials in of_sites.groupby("study_name"):
        assert list(trials.sort_values("number")["kind"][:3]) == ["identity", "alpha_0.5", "best_single"]
    notes = Notes()
    values = {"search": {"trials": 5, "seed": 1, "reuse": False}, "out": tmp_path / "afresh"}
    third = launch(tmp_path, model, tokens(), values, progress=notes)
    assert not notes.has("winners on record")
    assert "reused" not in set(third.trials["kind"])
    other = {"search": {"trials": 5}, "scheme": {"weights": "int4"}, "out": tmp_path / "int4"}
    fourth = launch(tmp_path, model, tokens(), other)
    assert "reused" not in set(fourth.trials["kind"]), "another scheme has other winners"


def test_the_same_run_again_is_never_worse_for_knowing_the_winners(tmp_path: Path, model: nn.Module) -> None:
    first = launch(tmp_path, model, tokens(), {"search": {"trials": 10}})
    second = launch(tmp_path, model, tokens(), {"search": {"trials": 10}, "out": tmp_path / "again"})
    a, b = (r.sites.set_index("site")["search_ours"].dropna() for r in (first, second))
    assert (b <= a * (1 + 1e-6) + 1e-12).mean() >= 0.7, (
        "the guard may choose by held-out rows, but most sites do not lose"
    )


def test_a_metric_that_raises_or_is_not_a_number_costs_its_candidate_only(tmp_path: Path, model: nn.Module) -> None:
    like, calls = Likeness(model, tokens(seed=9)), []

    def moody(candidate: nn.Module) -> float:
        calls.append(1)
        if len(calls) % 7 == 3:
            raise RuntimeError("the metric has a bad day")
        return float("nan") if len(calls) % 7 == 5 else like(candidate)

    values = {"search": {"scope": "model", "loss": "task", "trials": 12}}
    result = launch(tmp_path, model, tokens(), values, metric=moody)
    failed = result.trials[result.trials["state"] == "failed"]
    assert len(failed)
    assert all("bad day" in reason or "nan" in reason for reason in failed["reason"])
    assert violations(open_existing(result.storage)) == []


@pytest.mark.slow
def test_the_command_line_interrupts_and_resumes(tmp_path: Path) -> None:
    answer = alphasmith("resume", "r-none", "--storage", f"sqlite:///{tmp_path}/none.db", cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr.splitlines()[-1].startswith("error: storage: no database")
    assert "Traceback" not in answer.stderr


@pytest.mark.slow
def test_workers_are_refused_on_sqlite_with_the_reason(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(Interrupted):
        launch(tmp_path, model, tokens(), stop=after(10))
    ((run_id,),) = rows(tmp_path / "runs.db", "SELECT id FROM alphasmith_run")
    answer = alphasmith("worker", run_id, "--storage", f"sqlite:///{tmp_path / 'runs.db'}", cwd=tmp_path)
    assert answer.returncode == 2
    assert "SQLite hands work to one process only" in answer.stderr
    assert "postgresql://" in answer.stderr
    assert [state for state, _ in status(tmp_path)] == ["interrupted"]


@pytest.mark.slow
def test_two_worker_processes_find_what_one_process_finds(
    undisturbed: tuple[RunResult, int], tmp_path: Path, model: nn.Module
) -> None:
    whole, _ = undisturbed
    result = launch(tmp_path, model, tokens(), {**REFINED, "workers": {"count": 2}})
    assert found(result) == found(whole)
    assert result.manifest.without_times() == whole.manifest.without_times()


def test_a_site_that_cannot_be_searched_fails_the_run_with_its_name(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alphasmith.objectives.judge.site_objective import SiteObjective

    def broken(self: SiteObjective, *_: object) -> None:
        raise RuntimeError("no kernel image")

    with monkeypatch.context() as patch:
        patch.setattr(SiteObjective, "batch", broken)
        with pytest.raises(AlphasmithError, match=r"site model.layers.0\S+: .*no kernel image"):
            launch(tmp_path, model, tokens())
    assert status(tmp_path)[0][0] == "failed"
    result = launch(tmp_path, model, tokens())
    assert [state for state, _ in status(tmp_path)] == ["finished"]
    assert len(result.sites)


def test_the_board_of_a_finished_run_holds_no_lease(undisturbed: tuple[RunResult, int]) -> None:
    result, _ = undisturbed
    database = open_existing(result.storage)
    board = Board(database, result.id, role="driver")
    assert {t.state for t in board.tickets()} == {"done"}
    assert not any(w.alive for w in board.workers())
    assert set(board.results()) == {t.site for t in board.tickets()}
    database.close()


def test_a_configuration_of_the_record_is_the_one_that_was_given(tmp_path: Path, model: nn.Module) -> None:
    result = launch(tmp_path, model, tokens())
    database = open_existing(result.storage)
    record = RunStore(database).get(result.id)
    database.close()
    again = RunConfig.build({**dict(record.config), "storage": result.storage})
    assert again.search == settings(tmp_path).search
    assert record.folder == str(result.folder)
    assert Path(str(record.config["out"])).is_absolute()


USED_AGAIN = "calibration rows and statistics are on record and used again"
INT4: dict[str, Any] = {"scheme": {"weights": "int4"}}


def planned(folder: Path, runs: int) -> Callable[[], bool]:
    """Asks to stop once so many runs have planned their sites: calibrated, nothing found."""
    query = "SELECT COUNT(DISTINCT run_id) FROM alphasmith_ticket"
    return lambda: (folder / "runs.db").exists() and rows(folder / "runs.db", query)[0][0] >= runs


def leave_unfinished(folder: Path, values: dict[str, Any] | None = None, *, runs: int = 1) -> Notes:
    """A run that is left as soon as it is planned; its calibration stays on record."""
    notes = Notes()
    with pytest.raises(Interrupted, match="resume with"):
        launch(folder, seeded(Mlp), vectors(), values, progress=notes, stop=planned(folder, runs))
    return notes


def calibrated(folder: Path) -> list[int]:
    """Calibrated sites that every run has kept under its own id, the oldest run first."""
    query = (
        "SELECT COUNT(a.id) FROM alphasmith_run r LEFT JOIN alphasmith_stored_artifact a "
        "ON a.run_id = r.id AND a.kind = 'calibration' GROUP BY r.id ORDER BY r.created"
    )
    return [count for (count,) in rows(folder / "runs.db", query)]


def test_a_new_run_takes_the_calibration_of_an_unfinished_one_and_keeps_it_as_its_own(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone = launch(tmp_path / "alone", seeded(Mlp), vectors(), INT4)
    leave_unfinished(tmp_path)
    notes = leave_unfinished(tmp_path, INT4, runs=2)
    assert notes.has(USED_AGAIN)
    assert not notes.has("calibrating")
    assert calibrated(tmp_path) == [3, 3], "workers look for rows under the id of their run only"
    shared = launch(tmp_path, seeded(Mlp), vectors(), INT4)
    assert shared.manifest.without_times() == alone.manifest.without_times()
    assert calibrated(tmp_path) == [3, 0]


@pytest.mark.parametrize(
    ("seed", "values"),
    [
        pytest.param(1, {}, id="other weights"),
        pytest.param(0, {"search": {"seed": 3}}, id="other rows"),
        pytest.param(0, {"data": {"samples": 28, "held_out": 16}}, id="other splits of the same batches"),
    ],
)
def test_a_run_of_no_tensor_in_common_shares_no_calibration(seed: int, values: dict[str, Any], tmp_path: Path) -> None:
    leave_unfinished(tmp_path)
    notes = Notes()
    launch(tmp_path, seeded(Mlp, seed), vectors(), {**values, "out": tmp_path / "b"}, progress=notes)
    assert notes.has("calibrating")
    assert not notes.has(USED_AGAIN)


def test_a_run_killed_before_it_kept_its_calibration_keeps_that_of_another_as_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationCache, "attach", killed)
        with pytest.raises(KeyboardInterrupt):
            launch(tmp_path, seeded(Mlp), vectors(), INT4)
    leave_unfinished(tmp_path, {"out": tmp_path / "b"})
    assert calibrated(tmp_path) == [0, 3]
    assert leave_unfinished(tmp_path, INT4, runs=2).has(USED_AGAIN)
    assert calibrated(tmp_path) == [3, 3]
