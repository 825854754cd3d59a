"""``alphasmith classify`` and ``generate``: what they print, and where they end."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alphasmith.search.cli.main import main
from tests.packaging.test_docs import blocks, shown_commands, text
from tests.support.processed import spotted_pictures

ANSWERED = pytest.CaptureFixture[str]


def answer(capsys: ANSWERED, *arguments: str) -> tuple[object, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return (caught.value.code, *capsys.readouterr())


@pytest.fixture
def here(image_result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures, one of which is none, the model, and a copy of it in which a file was changed."""
    spotted_pictures(tmp_path / "pictures", 3)
    (tmp_path / "pictures" / "01.png").write_bytes(b"junk")
    (tmp_path / "model").symlink_to(image_result)
    shutil.copytree(image_result, tmp_path / "changed")
    with (tmp_path / "changed" / "quantized" / "preprocessor_config.json").open("a") as file:
        file.write(" ")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_corrupt_file_is_one_line_and_exit_code_1(here: Path, capsys: ANSWERED) -> None:
    code, out, err = answer(capsys, "classify", "model", "pictures", "--top", "1")
    assert code == 1
    assert [line.split(":")[0] for line in out.splitlines()] == ["pictures/00.png", "pictures/02.png"]
    told = [line for line in err.splitlines() if line.startswith(("error:", "note: 1 of"))]
    assert told[0].startswith("error: pictures/01.png is not a readable image")
    assert told[1:] == ["note: 1 of 3 items could not be classified"]


def test_lines_of_json_and_csv(here: Path, capsys: ANSWERED) -> None:
    _, out, _ = answer(capsys, "classify", "model", "pictures", "--json", "--top", "all")
    first, bad, last = map(json.loads, out.splitlines())
    assert (first["item"], bad["item"], last["item"]) == ("pictures/00.png", "pictures/01.png", "pictures/02.png")
    assert "not a readable image" in bad["error"]
    assert sum(found["probability"] for found in first["top"]) == pytest.approx(1, abs=1e-6)
    assert first["class"] == first["top"][0]["class"]
    code, out, _ = answer(capsys, "classify", "model", "pictures/00.png", "pictures/02.png", "--csv", "--top", "2")
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0
    assert [(row["item"], row["rank"]) for row in rows][:2] == [("pictures/00.png", "1"), ("pictures/00.png", "2")]
    assert float(rows[0]["probability"]) == first["probability"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["model", "pictures", "--top", "4"], "--top: 4 classes are asked for, and the model has 3; give at most 3"),
        (["model", "nowhere.png"], "FILES: no file or folder nowhere.png"),
        (["model"], "FILES: there is nothing to classify"),
        (["model", "--text", "x"], "--text: is given, and the model takes an image"),
        (["model", "pictures", "--json", "--csv"], "--csv: is given together with --json"),
        (["pictures", "pictures"], "pictures is no result: it has no manifest.json; give the output folder of a run"),
        (["changed", "pictures"], "changed/quantized/preprocessor_config.json: "),
        (["model", "pictures", "--device", "nothing"], "--device: 'nothing' is not usable"),
    ],
)
def test_what_is_wrong_from_the_start(arguments: list[str], told: str, here: Path, capsys: ANSWERED) -> None:
    code, out, err = answer(capsys, "classify", *arguments)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert told in line


def test_a_text_is_printed_as_it_is(writer_result: Path, capsys: ANSWERED) -> None:
    code, out, _ = answer(capsys, "generate", str(writer_result), "--prompt", "row", "--max-tokens", "5", "--json")
    assert code == 0
    written = json.loads(out)
    assert (written["prompt"], written["tokens"], written["stopped"]) == ("row", 5, "length")
    assert (
        answer(capsys, "generate", str(writer_result), "--prompt", "row", "--max-tokens", "5")[1]
        == written["text"] + "\n"
    )
    code, _, err = answer(capsys, "generate", str(writer_result))
    assert (code, err) == (2, "error: --prompt: is missing; give one, or --prompts FILE\n")


@pytest.mark.slow
def test_the_page_of_processing_runs(
    image_result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ANSWERED
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = spotted_pictures(tmp_path / "photos", 2)
    for number, file in enumerate(sorted(photos.iterdir())):
        file.rename(photos / f"{number}.png")
    shutil.copytree(image_result, "digits")
    (tmp_path / "names.txt").write_text("first\nsecond\nthird\n")
    page = text("docs/processing.md")
    ran = [line for line in shown_commands(page) if line[:2] == ["classify", "digits"]]
    assert len(ran) == 3
    for line in ran:
        assert answer(capsys, *line)[0] == 0
    shown = [content for language, content in blocks(page) if language == "python"]
    assert len(shown) == 2
    for content in shown:
        (tmp_path / "shown.py").write_text(content, encoding="utf-8")
        done = subprocess.run([sys.executable, "shown.py"], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip() != "") == (0, True), done.stderr
