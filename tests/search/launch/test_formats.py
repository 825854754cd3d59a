"""Formats of sites in a run: chosen under the budget, on record, resumed, picked again bit for bit, shown."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import nn

from alphasmith.dashboards.study_views import HISTORY_ID
from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.search import RunResult, load_quantized, resume
from alphasmith.search.checkpoints.formats import pick
from alphasmith.search.checkpoints.verification import verify
from alphasmith.search.cli.main import app
from alphasmith.search.formats import stage as format_stage
from alphasmith.search.formats.record import StoredPlans
from alphasmith.search.formats.stage import MOST_PASSES, FormatResult
from alphasmith.search.interruption import Interrupted
from alphasmith.storage.database.connection import open_optuna
from alphasmith.storage.output.format_entries import FormatsEntry
from tests.support.run_cases import Likeness, Mlp, answer, launch, rows, seeded, vectors

CHOSEN: dict[str, Any] = {
    "name": "formats",
    "search": {"trials": 4},
    "sites": {"formats": ["int8-static", "uint8-static", "int8-token", "int16-static", "float"]},
    "budget": {"share_of_macs": 0.5},
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return seeded(Mlp)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A finished run, and what its model did meanwhile."""

    folder: Path
    result: RunResult
    answers: dict[int, torch.Tensor]
    samples: int

    @property
    def entry(self) -> FormatsEntry:
        return entry_of(self.result)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, model: nn.Module) -> Watched:
    """A run whose samples are counted while formats are chosen, and whose points are asked for an answer before it writes."""
    folder, answers, samples = tmp_path_factory.mktemp("formats"), {}, []
    choose, forms = format_stage.choose_formats, format_stage.forms_of_front

    def counted(candidate: CandidateModel, *args: Any, **keywords: Any) -> Any:
        hook = candidate.model.register_forward_hook(lambda _, given, __: samples.append(len(given[0])))
        try:
            return choose(candidate, *args, **keywords)
        finally:
            hook.remove()

    def asked(candidate: CandidateModel, smoothings: Any, result: FormatResult) -> Any:
        for point in result.points:
            with candidate.using(result.schemes(point)), candidate.applied(smoothings) as applied:
                answers[point.number] = answer(applied, vectors()[0])
        return forms(candidate, smoothings, result)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("alphasmith.search.launch._formats.choose_formats", counted)
        patched.setattr("alphasmith.search.launch._outcome.forms_of_front", asked)
        result = launch(folder, model, vectors(), CHOSEN, metric=Likeness(model, vectors(seed=9)))
    return Watched(folder=folder, result=result, answers=answers, samples=sum(samples))


@pytest.fixture
def finished(watched: Watched) -> tuple[Path, RunResult]:
    return watched.folder, watched.result


def entry_of(result: RunResult) -> FormatsEntry:
    entry = result.manifest.formats
    assert entry is not None
    return entry


def test_the_choice_keeps_within_the_budget_and_lowers_the_loss(finished: tuple[Path, RunResult]) -> None:
    entry = entry_of(finished[1])
    assert entry.own == "int8-static"
    assert entry.chosen.cost <= 0.5 + 1e-6
    assert entry.chosen.cost == pytest.approx(entry.chosen.share_of_macs)
    own = next(point for point in entry.points if not point.formats)
    within = [point.loss for point in entry.points if point.cost <= 0.5 + 1e-6 and point.loss is not None]
    assert entry.chosen.loss == min(within)
    assert own.loss is not None
    assert entry.chosen.loss is not None
    assert entry.chosen.loss < own.loss
    assert entry.before is not None
    assert entry.after is not None
    assert entry.after < entry.before
    assert entry.metric is not None


def test_the_front_is_monotone_and_no_point_beats_it(finished: tuple[Path, RunResult]) -> None:
    entry = entry_of(finished[1])
    front = [(point.cost, point.loss or 0.0) for point in entry.front]
    assert len(front) > 2
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(front))
    for point in entry.points:
        assert point.loss is not None
        assert any(cost <= point.cost and loss <= point.loss for cost, loss in front)
        assert point.predicted == pytest.approx(point.loss, rel=0.5)


def test_every_point_is_a_trial_on_record(finished: tuple[Path, RunResult]) -> None:
    folder, result = finished
    entry = entry_of(result)
    study = optuna.load_study(study_name=f"{result.id}/formats", storage=open_optuna(f"sqlite:///{folder / 'runs.db'}"))
    assert [trial.values for trial in study.trials] == [[point.cost, point.loss] for point in entry.points]
    assert [trial.params for trial in study.trials] == [point.formats for point in entry.points]
    assert {trial.number for trial in study.best_trials} >= {point.number for point in entry.front}
    noted = rows(
        folder / "runs.db",
        "SELECT key FROM study_system_attributes JOIN studies USING (study_id) WHERE study_name LIKE '%/formats'",
    )
    assert any(HISTORY_ID in key for (key,) in noted)
    found = rows(folder / "runs.db", "SELECT count(*) FROM studies WHERE study_name LIKE '%/formats'")
    assert found == [(1,)]


def test_every_point_can_be_picked_and_what_was_kept_comes_back(
    finished: tuple[Path, RunResult], tmp_path: Path
) -> None:
    result = finished[1]
    entry = entry_of(result)
    for point in entry.pickable:
        out = tmp_path / str(point.number)
        assert pick(result.folder, point.number, out)["formats"] == point.formats
        again = verify(out)
        assert "skipped" in again
        assert load_file(out / "quantized/model.safetensors").keys() >= {"norm.weight"}
        made = json.loads((out / "manifest.json").read_text())
        assert made["formats"]["picked"] == point.number
        assert made["scheme"]["sites"].keys() == point.formats.keys()
        sizes = made["payload"]
        stored = sum(t.nbytes for t in load_file(out / "quantized/model.safetensors").values())
        assert sizes["weights_quantized"] + sizes["other"] == stored
        same = (out / "quantized/model.safetensors").read_bytes() == (
            result.folder / "quantized/model.safetensors"
        ).read_bytes()
        assert same == (point.number == entry.picked)


def test_a_picked_model_is_the_one_that_was_measured(watched: Watched, model: nn.Module, tmp_path: Path) -> None:
    for point in watched.entry.pickable:
        pick(watched.result.folder, point.number, tmp_path / str(point.number))
        found = load_quantized(tmp_path / str(point.number), model)
        assert torch.equal(answer(found, vectors()[0]), watched.answers[point.number])
    own = next(point for point in watched.entry.points if not point.formats)
    assert not torch.equal(watched.answers[own.number], watched.answers[watched.entry.picked])


def test_the_passes_are_counted_and_bounded(watched: Watched) -> None:
    calibration = 32
    assert watched.samples / calibration <= watched.entry.passes <= MOST_PASSES
    assert len(watched.entry.points) * calibration <= watched.samples, "every point was run on all tuning samples"


def test_a_run_left_among_the_choices_ends_as_if_it_had_not_been(
    finished: tuple[Path, RunResult], model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = StoredPlans.add

    def leaving(self: StoredPlans, measured: Any, **keywords: Any) -> None:
        add(self, measured, **keywords)
        if measured.number == 2:
            raise Interrupted("enough")

    metric = Likeness(model, vectors(seed=9))
    with monkeypatch.context() as patched:
        patched.setattr(StoredPlans, "add", leaving)
        with pytest.raises(Interrupted):
            launch(tmp_path, model, vectors(), CHOSEN, metric=metric)
    assert not (tmp_path / "out").exists()
    scored: list[int] = []
    errors = ModelObjective.sample_errors
    (run,) = (row[0] for row in rows(tmp_path / "runs.db", "SELECT id FROM alphasmith_run"))

    def watched(self: ModelObjective, smoothings: Any) -> Any:
        scored.append(1)
        return errors(self, smoothings)

    monkeypatch.setattr(ModelObjective, "sample_errors", watched)
    storage = f"sqlite:///{tmp_path / 'runs.db'}"
    result = resume(run, storage=storage, model=model, batches=vectors(), metric=metric)
    assert result.manifest.without_times() == finished[1].manifest.without_times()
    # Of the points, all but the three on record; beside them, variants of the whole model and twice the held-out samples.
    assert len(scored) < len(entry_of(result).points) - 3 + 8


def test_the_report_and_the_texts_hold_the_front(finished: tuple[Path, RunResult]) -> None:
    folder, result = finished
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "Output loss against cost of the formats" in page
    assert 'id="formats"' in page
    shown = called(str(result.folder))
    assert shown.exit_code == 0, shown.output
    assert "(this one)" in shown.output
    by_id = called(result.id, "--storage", f"sqlite:///{folder / 'runs.db'}", "--json")
    assert json.loads(by_id.output)["picked"] == entry_of(result).picked


def called(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["formats", *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--pick", "99", "--out", "new"), "choose one of"),
        (("--pick", "0"), "--out is missing"),
        (("--out", "new"), "--pick is missing"),
        (("--pick", "0", "--out", "out"), "already exists"),
    ],
)
def test_a_pick_that_cannot_be_leaves_nothing(
    finished: tuple[Path, RunResult], arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = finished
    monkeypatch.chdir(folder)
    error = called(str(result.folder), *arguments).exception
    assert isinstance(error, InputError)
    assert words in str(error).replace(":", "")
    assert not (folder / "new").exists()


def test_a_picked_folder_holds_no_other_point(finished: tuple[Path, RunResult], tmp_path: Path) -> None:
    result = finished[1]
    pick(result.folder, entry_of(result).picked, tmp_path / "a")
    with pytest.raises(InputError, match="one point of the front and no other"):
        pick(tmp_path / "a", entry_of(result).picked, tmp_path / "b")


def test_a_changed_file_is_not_picked_from(finished: tuple[Path, RunResult], tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(finished[1].folder, spoilt)
    (spoilt / "formats/operators.json").write_text("{}")
    with pytest.raises(IntegrityError):
        pick(spoilt, entry_of(finished[1]).picked, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_sites_that_the_scheme_names_keep_theirs(tmp_path: Path, model: nn.Module) -> None:
    values = CHOSEN | {"scheme": {"sites": {"fc1": "w8a8-channel-token"}}}
    result = launch(tmp_path, model, vectors(), values)
    assert all("fc1" not in point.formats for point in entry_of(result).points)
    assert result.manifest.scheme.sites["fc1"] == "w8a8-channel-token"
    assert entry_of(result).sites == 2


def test_formats_that_cost_nothing_need_no_budget(tmp_path: Path, model: nn.Module) -> None:
    values = {"search": {"trials": 4}, "sites": {"formats": ["int8-static", "uint8-static", "int8-token"]}}
    entry = entry_of(launch(tmp_path, model, vectors(), values))
    assert entry.limit is None
    assert entry.chosen.share_of_macs == 0
    assert "int8-token" not in entry.chosen.formats.values()


def test_times_of_the_target_are_a_budget(tmp_path: Path, model: nn.Module) -> None:
    table = tmp_path / "times.toml"
    table.write_text("int8-static = 1e-12\nint8-token = 1.4e-12\nfloat = 4e-12\n")
    values = {"search": {"trials": 4}, "budget": {"latency": str(table), "latency_factor": 1.3}}
    entry = entry_of(launch(tmp_path, model, vectors(), values))
    assert set(entry.choices) == {"int8-static", "int8-token", "float"}
    assert entry.cost_unit.startswith("time")
    own = next(point for point in entry.points if not point.formats)
    assert own.cost == pytest.approx(1.0)
    assert 1.0 <= entry.chosen.cost <= 1.3 + 1e-5


def test_without_a_table_times_follow_from_the_hardware(tmp_path: Path, model: nn.Module) -> None:
    values = {
        "search": {"trials": 4},
        "sites": {"formats": ["int8-static", "int8-token", "float"]},
        "budget": {"latency_factor": 1.2},
        "hardware": {"bandwidth": "50 GB/s"},
    }
    for name in "ab":
        (tmp_path / name).mkdir()
    entry = entry_of(launch(tmp_path / "a", model, vectors(), values))
    own = next(point for point in entry.points if not point.formats)
    assert own.cost == pytest.approx(1.0)
    assert entry.cost_unit.startswith("time")
    assert 1.0 < entry.chosen.cost <= 1.2 + 1e-5
    with pytest.raises(InputError, match=r"is met by no choice of formats; the nearest is 0\.9"):
        launch(tmp_path / "b", model, vectors(), values | {"budget": {"latency_factor": 0.5}})
    assert not (tmp_path / "b/out").exists()
