"""The command line on a real folder: every command, plain and as JSON."""

from __future__ import annotations

import http.client
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file

from alphasmith.objectives.model.loading import load_model
from alphasmith.search.cli.main import app, main
from alphasmith.search.progress import TerminalBars
from tests.support.run_cases import alphasmith, answer, saved_llama, tokens, written_texts

SMALL = (
    *("--set", "search.trials=5", "--set", "search.rows=64", "--set", "search.single_alphas=5"),
    *("--set", "search.noise_model=false", "--set", "groups.k=2", "--set", "data.max_length=24"),
    *("--set", "data.samples=20", "--set", "data.tuning=8", "--set", "data.held_out=8", "--set", "data.proof=4"),
    *("--set", "search.refine_trials=8"),
)
#: The models of the shared folder beside the checkout, where there is one.
SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


class Place:
    """A folder with a model, texts and a finished run ``out``; commands are run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        saved_llama(folder / "model")
        written_texts(folder / "texts.jsonl")
        self.run = alphasmith("run", "--model", "model", "--data", "texts.jsonl", "--out", "out", *SMALL, cwd=folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One run through the installed command, in a process of its own."""
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def here(place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(place.folder)
    return place.folder


class Answer:
    """What a command answered."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        self.code = caught.value.code
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        """Standard output, parsed."""
        assert self.code == 0
        return json.loads(self.out)


def run_id(place: Place) -> str:
    """Id of the run in ``out``."""
    return str(json.loads((place.folder / "out" / "manifest.json").read_text())["run"]["id"])


# --------------------------------------------------------------------------------------------------- run, list, show


def test_progress_on_one_stream_and_the_result_on_the_other(place: Place) -> None:
    run = place.run
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    for stage in ("loading model and data", "calibrating", "searching sites", "proving equivalence", "writing"):
        assert any(line.startswith(stage) for line in run.stderr.splitlines())
        assert stage not in run.stdout
    told = " ".join(run.stdout.split())  # lines are broken between words
    assert run_id(place) in told
    assert "results in out: smoothed/, quantized/, report.html, manifest.json" in told
    assert "; perplexity " in told, "the verdict has the metric"
    assert "of the whole model in float32): quantized weights" in told
    assert "% quantized (" in told
    assert "an embedding: its rows are looked up, not multiplied" in told
    assert "warning: " in run.stderr
    assert "of the weights are quantized; " in run.stderr
    present = {p.name for p in place.folder.iterdir()}
    assert {"model", "texts.jsonl", "out", "alphasmith.db"} <= present
    assert not [name for name in present if "partial" in name]


def test_the_first_line_comes_before_torch_is_imported(tmp_path: Path) -> None:
    stops = "class Stop:\n    def find_spec(self, name, *_):\n        if name == 'torch': sys.exit('torch')"
    script = f"import sys\n{stops}\nsys.meta_path.insert(0, Stop())\nfrom alphasmith.search.cli.main import main\nmain(['run'])"
    told = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert told.stderr.splitlines() == ["starting ...", "torch"]


def test_run_as_json_repeats_the_manifest(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("run", "--model", "model", "--data", "texts.jsonl", "--out", "again", "--name", "second", *SMALL)
    told = Answer(capsys, *arguments, "--storage", "sqlite:///other.db", "--json")
    answer_ = told.json
    assert answer_["manifest"] == json.loads((here / "again" / "manifest.json").read_text())
    assert answer_["storage"] == "sqlite:///other.db"
    assert answer_["manifest"]["run"]["name"] == "second"
    told = Answer(capsys, "list", "--storage", "sqlite:///other.db", "--json")
    assert [row["id"] for row in told.json] == [answer_["run"]]
    shutil.rmtree(here / "again")


def test_list_and_show(place: Place, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    id_ = run_id(place)
    (row,) = Answer(capsys, "list", "--json").json
    assert (row["id"], row["name"], row["status"], row["scope"]) == (id_, "model", "finished", "site")
    assert id_ in Answer(capsys, "list").out
    details = Answer(capsys, "show", id_[:-2], "--json").json  # a prefix will do
    manifest = json.loads((here / "out" / "manifest.json").read_text())
    assert [s["site"] for s in details["sites"]] == [s["name"] for s in manifest["sites"]]
    refinement = manifest["refinement"]["trials"] if manifest["refinement"] else 0
    assert (
        details["trials"]
        == sum(s["trials"] for s in manifest["sites"]) + refinement + manifest["output"]["sweep"]["trials"]
    )
    assert details["failed_trials"] == 0
    for site in details["sites"]:
        if site["winner"] != "refined":  # the output decided on those
            assert site["ours"] <= min(site["identity"], site["alpha_half"], site["best_single"])


def test_show_prints_what_run_printed(
    place: Place, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Answer(capsys, "show", run_id(place))
    assert shown.code == 0
    assert shown.out.splitlines() == place.run.stdout.splitlines()
    assert all(s["name"] in shown.out for s in json.loads((here / "out" / "manifest.json").read_text())["sites"])
    monkeypatch.setenv("COLUMNS", "72")
    narrow = Answer(capsys, "show", run_id(place)).out
    assert max(map(len, narrow.splitlines())) <= 72
    assert narrow.partition(";")[0] == shown.out.partition(";")[0] != shown.out


def test_show_says_what_it_cannot_see(place: Place, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    id_ = run_id(place)
    (here / "out").rename(here / "elsewhere")
    try:
        moved = Answer(capsys, "show", id_).out
        details = Answer(capsys, "show", id_, "--json").json
    finally:
        (here / "elsewhere").rename(here / "out")
    assert "status: finished" in moved
    assert "its manifest.json cannot be read from here" in moved
    assert details["weights"] == []
    assert all(s["site"] in moved for s in details["sites"])


def test_a_relative_configuration_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "settings"
    folder.mkdir()
    (folder / "run.toml").write_text(
        'name = "from a file"\nout = "../filed"\n[model]\npath = "../model"\n[data]\npath = "../texts.jsonl"\n'
    )
    told = Answer(capsys, "run", "settings/run.toml", *SMALL, "--set", "search.scope=model")
    assert told.code == 0
    assert "groups of the whole model" in told.out
    manifest = json.loads((here / "filed" / "manifest.json").read_text())
    assert (manifest["run"]["name"], manifest["scope"]) == ("from a file", "model")
    shutil.rmtree(here / "filed")
    shutil.rmtree(folder)


# ----------------------------------------------------------------------------------------------------- verify, undo


def test_verify_passes_and_then_notices_a_byte(
    place: Place, here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told = Answer(capsys, "verify", "out", "--json").json
    manifest = json.loads((here / "out" / "manifest.json").read_text())
    assert told["artifacts"] == len(manifest["artifacts"])
    assert 0 <= told["error"] <= told["tolerance"]
    assert told["samples"] == 4
    assert "agree on 4 samples" in Answer(capsys, "verify", "out").out
    for file in ("quantized/model.safetensors", "smoothed/config.json", "report.html"):
        copy = tmp_path / Path(file).name
        shutil.copytree(here / "out", copy)
        content = bytearray((copy / file).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / file).write_bytes(content)
        spoilt = Answer(capsys, "verify", str(copy))
        assert spoilt.code == 1
        assert spoilt.out == ""
        assert spoilt.err.count("\n") == 1
        assert spoilt.err.startswith("error: ")
        assert file in spoilt.err


def test_verify_elsewhere_needs_the_original(
    here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = str(here / "out")
    lost = Answer(capsys, "verify", out)
    assert (lost.code, lost.out) == (2, "")
    assert lost.err.startswith("error: model.path: ")
    moved = ("--model", str(here / "model"), "--data", str(here / "texts.jsonl"))
    assert Answer(capsys, "verify", out, *moved, "--json").json["samples"] == 4
    other = saved_llama(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] += 1
    load_model(path=other).model.save_pretrained(other, state_dict=weights)  # type: ignore[operator]
    wrong = Answer(capsys, "verify", out, "--model", str(other), "--data", str(here / "texts.jsonl"))
    assert wrong.code == 2
    assert "is not the model of this run" in wrong.err


def test_a_proof_that_fails_is_told(
    here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tolerance below rounding the proof must fail: it does measure something."""
    shutil.copytree(here / "out", tmp_path / "strict")
    file = tmp_path / "strict" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["proof"]["error"] > 1e-12
    manifest["proof"] |= {"error": 0.0, "tolerance": 1e-12}
    file.write_text(json.dumps(manifest))
    told = Answer(capsys, "verify", str(tmp_path / "strict"))
    assert told.code == 2
    assert told.err.count("\n") == 1
    assert "changes the float model" in told.err


def test_undo_gives_a_folder_with_the_original_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = Answer(capsys, "undo", "out", "--out", "undone", "--json").json
    original, undone = load_file(here / "model" / "model.safetensors"), load_file(here / "undone" / "model.safetensors")
    smoothed = load_file(here / "out" / "smoothed" / "model.safetensors")
    assert set(undone) == set(original)
    changed = [n for n in original if not torch.equal(smoothed[n], original[n])]
    assert told["parameters"] >= len(changed) > 0
    for name in original:
        torch.testing.assert_close(undone[name], original[name], rtol=1e-6, atol=0)
    value = tokens(8, seed=7)[0]
    first, second = (answer(load_model(path=here / name).model, value) for name in ("model", "undone"))
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)
    assert (here / "undone" / "tokenizer.json").is_file()
    again = Answer(capsys, "undo", "out", "--out", "undone")
    assert again.code == 2
    assert again.err.startswith("error: out: ")
    shutil.rmtree(here / "undone")


# ---------------------------------------------------------------------------------------- report, hardware, dashboard


def test_report(place: Place, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = Answer(capsys, "report", run_id(place), "--out", "page.html", "--json").json
    page = (here / told["report"]).read_text()
    assert run_id(place) in page
    assert "http://" not in page.split("<body")[0]
    assert "page.html" in Answer(capsys, "report", run_id(place), "--out", "page.html").out
    missing = Answer(capsys, "report", run_id(place), "--out", "nowhere/page.html")
    assert missing.code == 2
    assert missing.err.startswith("error: --out: ")
    (here / "page.html").unlink()


def test_hardware(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = Answer(capsys, "hardware", "--json").json
    assert alone["rho"] == 0.0
    assert alone["detected"]["memory"] > 0
    assert alone["given"] == {"memory": None, "gpu_threads": None, "bandwidth": None}
    ends = [(r["low"], r["high"]) for r in alone["ranges"]]
    assert ends[0] == (0.1, 0.5)
    assert ends[-1] == pytest.approx((0.5, 0.9))
    model = ("--set", "model.path=model", "--set", "data.path=texts.jsonl", "--set", "hardware.memory=2KiB")
    given = Answer(capsys, "hardware", *model, "--json").json
    assert given["given"]["memory"] == 2048
    assert given["rho"] == pytest.approx(1 - 2048 / given["required"]["memory"])
    for before, after in zip(alone["ranges"], given["ranges"], strict=True):
        assert after["low"] > before["low"]
        assert after["high"] == before["high"]
    text = Answer(capsys, "hardware", *model).out
    assert "model requires" in text
    assert "memory is tightest" in text
    assert all(r["explanation"] in text for r in given["ranges"])
    assert "kernels" not in alone
    probed = Answer(capsys, "hardware", "--probe", "--json").json["kernels"]
    assert [k["library"] for k in probed] == ["onnxruntime", "onednn", "openvino"]
    shown = Answer(capsys, "hardware", "--probe").out
    assert all(k["library"] in shown and k["kernel"] in (None, "exact", "u8s8-pairs16") for k in probed)


def test_the_dashboard_says_where_it_listens_and_answers_the_hosts_it_is_told(place: Place) -> None:
    command = [
        sys.executable,
        "-m",
        "alphasmith.search.cli.main",
        "dashboard",
        "--port",
        "0",
        "--allow-host",
        "box.example",
    ]
    with subprocess.Popen(command, cwd=place.folder, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            told = server.stderr.readline()
            found = re.fullmatch(r"dashboard at http://127\.0\.0\.1:(\d+)(/\S+), Ctrl-C stops it\n", told)
            assert found
            answers = {}
            for host in ("localhost", "box.example", "other.example"):
                connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
                connection.request("GET", found[2], headers={"Host": host})
                answers[host] = connection.getresponse().status
                connection.close()
            assert answers == {"localhost": 200, "box.example": 200, "other.example": 403}
        finally:
            server.send_signal(signal.SIGINT)
            code = server.wait(timeout=20)
    assert code == 0


@pytest.mark.parametrize("command", sorted(app.commands))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = Answer(capsys, command, "--help")
    assert told.code == 0
    assert f"alphasmith {command}" in told.out
    documented = app.commands[command].help
    assert documented
    assert documented.split("\n")[0] in " ".join(told.out.split())
    for parameter in app.commands[command].params:
        assert not isinstance(parameter, click.Option) or parameter.help


def test_no_command_prints_help_and_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    bare = Answer(capsys)
    assert bare.code == 2
    assert "Commands:" in bare.err
    version = Answer(capsys, "--version")
    assert version.code == 0
    assert version.out.startswith("alphasmith, version ")


def test_bars_on_a_terminal(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alphasmith.search.cli._options.for_terminal", TerminalBars)
    told = Answer(capsys, "run", "--model", "model", "--data", "texts.jsonl", "--out", "barred", *SMALL, "--json")
    assert told.json["folder"] == "barred"
    assert "searching sites" in told.err
    shutil.rmtree(here / "barred")


# -------------------------------------------------------------------------------------------------- the user's function


@pytest.mark.skipif(not (SHARED / "zoo.py").is_file(), reason="the shared models are not beside the checkout")
def test_a_factory_with_its_data_and_metric(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    factory = ("--factory", "zoo:load_model", "--factory-path", str(SHARED))
    data = ("--set", "data.factory=zoo_eval:calib_batches", "--set", "data.metric=zoo_eval:evaluate")
    told = Answer(
        capsys, "run", "--model", str(SHARED / "ad_autoencoder"), *factory, *data, *SMALL, "--out", "out", "--json"
    )
    manifest = told.json["manifest"]
    assert manifest["model"]["kind"] == "factory"
    (metric,) = manifest["output"]["metrics"]
    assert 0.5 < metric["float"] < 1
    for site in manifest["sites"]:
        if site["losses"] is not None and site["winner"] != "refined" and manifest["output"]["kept"] == "ours":
            losses = site["losses"]["held_out"]
            assert losses["ours"] <= min(losses["identity"], losses["alpha_0.5"], losses["best_single"])
    refused = Answer(capsys, "verify", "out")
    assert refused.code == 2
    assert refused.err.startswith("error: --allow-code: ")
    options = shlex.split(refused.err.partition("if you trust it, add ")[2])
    allowed = ["zoo:load_model", "zoo_eval:calib_batches", str(SHARED), str(SHARED / "ad_autoencoder")]
    assert options == [part for name in allowed for part in ("--allow-code", name)]
    assert Answer(capsys, "verify", "out", *factory).code == 2
    assert Answer(capsys, "verify", "out", *options, "--json").json["error"] < 1e-4
    given = (*factory, "--allow-code", "zoo_eval:calib_batches", "--model", str(SHARED / "ad_autoencoder"))
    assert Answer(capsys, "verify", "out", *given, "--json").json["error"] < 1e-4
