"""Code that a record or a manifest names runs only where the caller names it, too."""

from __future__ import annotations

import json
import pickle
import shlex
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from alphasmith.objectives.errors import InputError
from alphasmith.search.checkpoints.verification import verify
from alphasmith.search.cli.main import main
from alphasmith.search.config import RunConfig
from alphasmith.search.inputs.permission import CodeNotAllowedError, check_code, code_named, named_in
from alphasmith.search.launch.pipeline import resume, run
from alphasmith.search.study.study_record import StoredLog
from alphasmith.storage.database.connection import open_optuna

MODULE = """
import torch
from pathlib import Path
from torch import nn

def build(*path):
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()

def batches(*path):
    return list(torch.randn(104, 16, generator=torch.Generator().manual_seed(1)).split(8))

def trap(*anything):
    Path(__file__).with_name("sprung").touch()
    raise SystemExit("sprung")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A finished run of functions of a module that lies beside it."""
    monkeypatch.delitem(sys.modules, "allowed_code", raising=False)
    (tmp_path / "allowed_code.py").write_text(MODULE)
    model = {"factory": "allowed_code:build", "factory_path": tmp_path}
    values = {
        "model": model,
        "data": {"factory": "allowed_code:batches"},
        "search": {"trials": 4, "refine": False, "rows": 32},
        "storage": f"sqlite:///{tmp_path}/a.db",
        "out": tmp_path / "first",
    }
    run(RunConfig.build(values))
    yield tmp_path
    assert not (tmp_path / "sprung").exists()


def rewritten(place: Path, **sections: dict[str, Any]) -> str:
    """All that an attacker does: the id of the run whose row was changed."""
    with closing(sqlite3.connect(place / "a.db")) as connection, connection:
        ((run_id, text),) = connection.execute("select id, config from alphasmith_run").fetchall()
        config = json.loads(text)
        for section, fields in sections.items():
            config[section] |= fields
        connection.execute(
            "update alphasmith_run set status = 'interrupted', finished = null, folder = ?, config = ?",
            (str(place / "second"), json.dumps(config)),
        )
    return str(run_id)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({}, ("model.factory", "data.factory", "model.factory_path")),
        ({"model": {"factory": "allowed_code:trap"}}, ("model.factory",)),
        ({"data": {"factory": "allowed_code:trap"}}, ("data.factory",)),
        ({"data": {"metric": "allowed_code:trap"}}, ("data.metric",)),
        (
            {"model": {"factory": "shutil:rmtree", "factory_path": None, "path": "/treasure"}},
            ("model.factory", "model.path"),
        ),
        ({"model": {"factory": None, "factory_path": None, "path": "/x", "trust_remote_code": True}}, ("model.path",)),
    ],
)
def test_resume_runs_nothing_that_a_row_names(
    sections: dict[str, dict[str, Any]], named: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = rewritten(place, **sections)
    with pytest.raises(SystemExit) as ended:
        main(["resume", run_id, "--storage", f"sqlite:///{place}/a.db"])
    told = capsys.readouterr().err.splitlines()[-1]
    assert (ended.value.code, told.startswith(f"error: --allow-code: run {run_id} names code")) == (2, True)
    for field in named:
        assert f"{field} = " in told
    with pytest.raises(CodeNotAllowedError):
        resume(run_id, storage=f"sqlite:///{place}/a.db")
    assert not (place / "second").exists()


def test_the_options_that_the_refusal_names_are_enough(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = rewritten(place)
    storage = ["--storage", f"sqlite:///{place}/a.db"]
    with pytest.raises(SystemExit):
        main(["resume", run_id, *storage])
    options = shlex.split(capsys.readouterr().err.splitlines()[-1].partition("if you trust it, add ")[2])
    assert len(options) == 6
    for left in range(0, 6, 2):  # one missing is one too few
        with pytest.raises(SystemExit) as ended:
            main(["resume", run_id, *storage, *options[:left], *options[left + 2 :]])
        assert ended.value.code == 2
    given = ["--factory", "allowed_code:build", "--factory-path", str(place), "--allow-code", "allowed_code:batches"]
    with pytest.raises(SystemExit) as ended:
        main(["resume", run_id, *storage, *given])
    assert ended.value.code == 0
    assert (place / "second" / "manifest.json").is_file()


def test_verify_runs_nothing_that_a_manifest_names(place: Path) -> None:
    file = place / "first" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["config"]["data"]["factory"] = "allowed_code:trap"
    file.write_text(json.dumps(manifest))
    with pytest.raises(CodeNotAllowedError, match=r"data\.factory = 'allowed_code:trap'"):
        verify(place / "first", factory="allowed_code:build", factory_path=place)
    with pytest.raises(CodeNotAllowedError, match=r"model\.factory = "):
        verify(place / "first", allow_code=["allowed_code:batches"])


def config(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.build(sections)


def test_what_a_script_gives_needs_no_permission() -> None:
    recorded = config(model={"factory": "a:b", "path": "/m"}, data={"factory": "c:d", "metric": "e:f"})
    check_code(recorded, (), "run r-1", ("model", "batches", "metric"))
    assert set(code_named(recorded, ("model",))) == {"data.factory", "data.metric", "model.path"}
    with pytest.raises(CodeNotAllowedError, match=r"--allow-code e:f --allow-code /m$"):
        check_code(recorded, ("c:d",), "run r-1", ("model",))


def test_models_without_code_need_none() -> None:
    for plain in (config(model={"path": "/m"}, data={"path": "/d"}), config()):
        check_code(plain, (), "run r-1")
        assert code_named(plain) == {}


def test_folders_are_the_same_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "code")
    monkeypatch.chdir(tmp_path)
    recorded = config(model={"factory": "a:b", "factory_path": str(tmp_path / "code")})
    for name in ("code", "./link", tmp_path / "code"):
        check_code(recorded, ("a:b", name), "run r-1")
    with pytest.raises(InputError):
        check_code(recorded, ("a:b", tmp_path), "run r-1")


def test_the_callers_own_changes_name_code() -> None:
    changes = {"model": {"factory": "a:b"}, "data": RunConfig.build({"data": {"metric": "c:d"}}).data, "workers": {}}
    assert named_in(changes) == ["a:b", "c:d"]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import pathlib; pathlib.Path('sprung').touch()",)


def test_states_of_samplers_are_not_taken_from_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna's CMA-ES finds its state in attributes of trials, as a pickle."""
    monkeypatch.chdir(tmp_path)
    storage = open_optuna(f"sqlite:///{tmp_path}/a.db")
    study = optuna.create_study(study_name="r-1/site", storage=storage)
    distributions: dict[str, Any] = {name: optuna.distributions.FloatDistribution(0, 1) for name in "xy"}
    planted: dict[str, Any] = {"cma:optimizer:0": pickle.dumps(Bomb()).hex(), "cma:generation": 0}
    for _ in range(3):
        made = create_trial(
            state=TrialState.COMPLETE, value=1.0, params={"x": 0.5, "y": 0.5}, distributions=distributions
        )
        made.system_attrs = planted
        study.add_trial(made)
    past = StoredLog(storage, "r-1/site").past.trials
    assert [trial.system_attrs for trial in past] == [{}, {}, {}]

    def sampled(trials: list[Any]) -> None:
        sampler = optuna.samplers.CmaEsSampler(seed=0, n_startup_trials=1, warn_independent_sampling=False)
        memory = optuna.create_study(sampler=sampler)
        for trial in trials:
            memory.add_trial(trial)
        memory.ask(distributions)

    sampled(list(past))
    assert not Path("sprung").exists()
    with suppress(Exception):  # the state is none, once it has been unpickled
        sampled(study.get_trials())
    assert Path("sprung").exists(), "the trap is none: this test says nothing"
