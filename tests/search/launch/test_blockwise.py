"""A run block by block finds, makes and writes what the run of the whole model does, to the bit, and goes on where it was left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file

from alphasmith.objectives.errors import InputError
from alphasmith.search import RunConfig, RunResult, resume, run
from alphasmith.search.checkpoints.load import load_quantized
from alphasmith.search.checkpoints.verification import undo
from alphasmith.search.engines import perform
from alphasmith.search.interruption import Interrupted
from alphasmith.search.progress import Silent
from alphasmith.storage.output.result_folder import ResultFolder
from tests.support.run_cases import TRIAL_SECONDS, rows, settings, tokens
from tests.support.streamed_models import WITHOUT_BLOCKS, deep_llama, saved

BATCHES = [{"input_ids": ids} for ids in tokens()]


class Notes(Silent):
    """A progress that remembers notes and stages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.lines.append(name)

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(deep_llama(), tmp_path_factory.mktemp("model"), torch.bfloat16)


def config(model: Path, place: Path, mode: str = "blockwise", values: Mapping[str, Any] | None = None) -> RunConfig:
    place.mkdir(parents=True, exist_ok=True)
    return settings(place, {"model": {"path": model}, "memory": {"mode": mode}, **(values or {})})


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, RunResult]:
    """The whole model in memory, and block by block."""
    place = tmp_path_factory.mktemp("runs")
    resident, streamed = (run(config(folder, place / m, m), batches=BATCHES) for m in ("resident", "blockwise"))
    return resident, streamed


def test_sites_have_the_same_winners_and_losses(both: tuple[RunResult, RunResult]) -> None:
    resident, streamed = both
    differing = {"study_name", "seconds", "study", "share", "share_measured"}
    for name in set(resident.sites.columns) - differing:
        assert streamed.sites[name].astype(str).tolist() == resident.sites[name].astype(str).tolist(), name


def test_tensors_are_the_same(both: tuple[RunResult, RunResult]) -> None:
    resident, streamed = (ResultFolder(result.folder) for result in both)
    for below in ("quantized", "smoothed"):
        expected, found = resident.read_checkpoint(below), streamed.read_checkpoint(below)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), below
        assert len(streamed.weight_files(below)) == 4  # three blocks, and what is around them
    scales = streamed.read_tensors("scales.safetensors")
    assert all(torch.equal(scales[name], value) for name, value in resident.read_tensors("scales.safetensors").items())
    assert streamed.read_json("quantized/quantization.json") == resident.read_json("quantized/quantization.json")
    config = streamed.read_json("smoothed/config.json")
    assert config == resident.read_json("smoothed/config.json")


def test_the_output_judges_alike(both: tuple[RunResult, RunResult]) -> None:
    resident, streamed = (result.manifest.output for result in both)
    assert streamed.one_alpha is None
    assert streamed.sweep is None
    for name in ("loss", "naive", "alpha_half", "best_single", "ours", "kept"):
        assert getattr(streamed, name) == getattr(resident, name)
    (found,), (expected,) = streamed.metrics, resident.metrics
    assert found == expected.model_copy(update={"one_alpha": None})
    assert found.float_model is not None


def test_the_manifest_tells_of_the_whole_model(both: tuple[RunResult, RunResult]) -> None:
    resident, streamed = (result.manifest for result in both)
    assert (streamed.memory.mode, streamed.memory.blocks) == ("blockwise", 3)
    assert (resident.memory.mode, resident.memory.blocks) == ("resident", 0)
    assert streamed.weights == resident.weights
    assert streamed.payload == resident.payload
    assert streamed.skipped == resident.skipped
    assert streamed.model == resident.model
    assert any("block by block" in note for note in streamed.notes)
    assert streamed.proof is not None
    assert streamed.proof.dtype == "float64"


def test_the_result_loads_and_nothing_is_left_beside_it(both: tuple[RunResult, RunResult]) -> None:
    streamed = both[1]
    model = load_quantized(streamed.folder)
    with torch.no_grad():
        assert bool(torch.isfinite(model(BATCHES[0]["input_ids"]).logits).all())
    assert [path.name for path in streamed.folder.parent.iterdir() if "partial" in path.name] == []


@pytest.mark.slow
def test_rounded_scales_are_taken_out_to_the_bit_and_cost_what_they_cost_in_memory(
    folder: Path, tmp_path: Path
) -> None:
    rounding = {"round_scales": "pow2", "search": {"trials": 4, "refine": False, "single_alphas": 3}}
    found = {}
    for mode in ("resident", "blockwise"):
        place = tmp_path / mode
        result = run(config(folder, place, mode, rounding), batches=BATCHES)
        undo(result.folder, place / "undone")
        manifest = ResultFolder(result.folder).manifest
        assert manifest.memory.mode == mode
        assert manifest.rounding is not None
        told = [note for note in manifest.notes if note.startswith("scales are powers of two at")]
        assert len(told) == 1
        found[mode] = manifest.output.kept, manifest.rounding, told
        undone = {n: t for f in sorted((place / "undone").glob("*.safetensors")) for n, t in load_file(f).items()}
        original = load_file(folder / "model.safetensors")
        assert undone.keys() == original.keys()
        assert all(torch.equal(undone[n].view(torch.int16), original[n].view(torch.int16)) for n in original)
        smoothed = ResultFolder(result.folder).read_checkpoint("smoothed")
        assert any(not torch.equal(smoothed[n], original[n]) for n in original)
    assert found["blockwise"] == found["resident"]
    rounded = found["blockwise"][1]
    assert rounded.before is not None
    assert rounded.before != rounded.after


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_workers_of_every_engine_share_the_sites_of_a_block(
    engine: str, folder: Path, both: tuple[RunResult, RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the driver searched a site itself")

    monkeypatch.setattr(perform, "search_data", refused)  # in this process alone
    if engine == "ray":
        pytest.importorskip("ray", reason="ray is not installed")
    shared = run(
        config(folder, tmp_path, values={"engine": engine, "workers": {"count": 2, "threads": 1}}), batches=BATCHES
    )
    alone = both[1]
    for below in ("quantized", "smoothed"):
        expected, found = (ResultFolder(result.folder).read_checkpoint(below) for result in (alone, shared))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), below
    assert shared.manifest.memory.mode == "blockwise"


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_the_next_block(
    folder: Path, tmp_path: Path, both: tuple[RunResult, RunResult]
) -> None:
    place = tmp_path / "stopped"
    reached = Notes()

    def stop() -> bool:
        return any(line.startswith("model.layers.2: searching") for line in reached.lines)

    with pytest.raises(Interrupted, match="alphasmith resume"):
        run(config(folder, place), batches=BATCHES, progress=reached, stop=stop)
    before = {(s, n): v for s, n, v in rows(place / "runs.db", TRIAL_SECONDS)}
    ((identity,),) = rows(place / "runs.db", "SELECT id FROM alphasmith_run")
    told = Notes()
    result = resume(identity, storage=f"sqlite:///{place}/runs.db", batches=BATCHES, progress=told)
    after = {(s, n): v for s, n, v in rows(place / "runs.db", TRIAL_SECONDS)}
    assert {key: after[key] for key in before} == before, "a trial was made again"
    assert "2 of 3 blocks are on record and not searched again" in told.lines
    assert not any(line.startswith("model.layers.1: searching") for line in told.lines)
    same_tensors(result, both[1])


@pytest.mark.slow
def test_states_that_are_gone_are_made_again_and_no_site_is_searched_again(
    folder: Path, tmp_path: Path, both: tuple[RunResult, RunResult]
) -> None:
    place, reached = tmp_path / "lost", Notes()

    def stop() -> bool:
        return any("layers.2: calibrating" in line for line in reached.lines)

    with pytest.raises(Interrupted):
        run(config(folder, place), batches=BATCHES, progress=reached, stop=stop)
    (work,) = (path for path in place.iterdir() if path.name.endswith("-blocks"))
    shutil.rmtree(work)
    before = rows(place / "runs.db", TRIAL_SECONDS)
    ((identity,),) = rows(place / "runs.db", "SELECT id FROM alphasmith_run")
    # Other batches, too: what was kept of the old ones would not fit.
    result = resume(
        identity, storage=f"sqlite:///{place}/runs.db", batches=BATCHES, changes={"data": {"batch_size": 5}}
    )
    assert set(before) <= set(rows(place / "runs.db", TRIAL_SECONDS))
    same_tensors(result, both[1])


def same_tensors(one: RunResult, other: RunResult) -> None:
    for below in ("quantized", "smoothed"):
        left, right = (ResultFolder(result.folder).read_checkpoint(below) for result in (one, other))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), below


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_the_next_block(
    folder: Path, tmp_path: Path, both: tuple[RunResult, RunResult]
) -> None:
    """The process ends itself as the kernel ends one, after the second block is on record."""
    place = tmp_path / "killed"
    script = tmp_path / "child.py"
    values = config(folder, place).model_dump(mode="json")
    script.write_text(
        "import json, os, signal, sys\n"
        "from alphasmith.search import RunConfig, run\n"
        "from alphasmith.search.progress import Silent\n"
        "from tests.search.launch.test_blockwise import BATCHES\n"
        "class Killing(Silent):\n"
        "    def stage(self, name, total=None):\n"
        "        if name.startswith('model.layers.2: calibrating'):\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(RunConfig.build(json.loads(sys.argv[1])), batches=BATCHES, progress=Killing())\n",
        encoding="utf-8",
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, str(script), json.dumps(values)]
    ended = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    before = rows(place / "runs.db", TRIAL_SECONDS)
    told = Notes()
    result = run(config(folder, place), batches=BATCHES, progress=told)
    assert "2 of 3 blocks are on record and not searched again" in told.lines
    assert set(before) <= set(rows(place / "runs.db", TRIAL_SECONDS))
    same_tensors(result, both[1])


@pytest.mark.parametrize("name", WITHOUT_BLOCKS)
def test_a_model_without_blocks_is_resident_and_says_so(name: str, tmp_path: Path) -> None:
    model = saved(WITHOUT_BLOCKS[name](), tmp_path / "model")
    batches = [{"input_ids": b["input_ids"], "decoder_input_ids": b["input_ids"]} for b in BATCHES]
    told = Notes()
    result = run(config(model, tmp_path), batches=batches if name == "t5" else BATCHES, progress=told)
    (line,) = (line for line in told.lines if line.startswith("memory.mode"))
    assert line == "memory.mode: resident, since the model has no list of blocks of one class"
    assert result.manifest.memory.mode == "resident"


def test_a_model_that_was_handed_over_is_resident_and_says_so(tmp_path: Path) -> None:
    told = Notes()
    values = settings(tmp_path, {"memory": {"mode": "blockwise"}})
    run(values, model=deep_llama(2), batches=BATCHES, progress=told)
    assert "memory.mode: resident, since the model is not a plain Hugging Face folder" in told.lines


@pytest.mark.slow
def test_auto_goes_block_by_block_only_where_the_whole_model_is_too_large(folder: Path, tmp_path: Path) -> None:
    roomy = run(config(folder, tmp_path / "roomy", "auto"), batches=BATCHES)
    assert roomy.manifest.memory.mode == "resident"
    scarce = {"hardware": {"search_memory": "40 MiB"}}
    wide = saved(deep_llama(2, head_dim=8), tmp_path / "wide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alphasmith.search.inputs.streaming._RESIDENT_BYTES", 10**5)
        result = run(config(wide, tmp_path / "scarce", "auto", scarce), batches=BATCHES)
    assert result.manifest.memory.mode == "blockwise"


def test_a_device_that_is_too_small_is_told_before_calibration_and_nothing_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    told = Notes()
    with pytest.raises(InputError, match=r"^out: .* bytes\) are needed .* \(1000 bytes\) are free") as refused:
        run(config(folder, tmp_path / "full"), batches=BATCHES, progress=told)
    assert "\n" not in str(refused.value)
    assert not any("calibrating" in line for line in told.lines)
    assert list((tmp_path / "full").iterdir()) == []


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(InputError, match=r"^memory\.mode: "):
        RunConfig.build({"memory": {"mode": "piecewise"}})
