"""Items out of what a command line names: their names, their order, what is missing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.items import ItemLimits
from alphasmith.search.processing.classifier import NamedItem, Refused
from alphasmith.search.processing.sources import ItemSource


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of several kinds, as the current one."""
    for name in ("b.png", "a.png", "deep/c.png", ".hidden.png", ".secret/d.png", "e.wav", "deep/f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(source: ItemSource, kind: str = "image", stdin: bytes = b"") -> list[str]:
    source.check()
    found = source.items(kind, ItemLimits(bytes=100), io.BytesIO(stdin))  # type: ignore[arg-type]
    return [f"refused {item.name}" if isinstance(item, Refused) else item.name for item in found]


def test_files_folders_and_patterns(here: Path) -> None:
    assert names(ItemSource(places=["."])) == ["a.png", "b.png", "deep/c.png"]
    assert names(ItemSource(places=["b.png", "deep", "*.png"])) == ["b.png", "deep/c.png", "a.png", "b.png"]
    assert names(ItemSource(places=["**/*.png"])) == ["a.png", "b.png", "deep/c.png"], "none twice"
    (here / "[odd].png").write_bytes(b"x")
    assert names(ItemSource(places=["[odd].png"])) == ["[odd].png"], "a file that is there is no pattern"
    assert names(ItemSource(places=["deep"]), "audio") == ["refused deep"]


def test_lists_are_read_to_their_end(here: Path) -> None:
    listed = "a.png\n\nnowhere.png\r\ndeep/c.png\n"
    (here / "list").write_text(listed)
    expected = ["a.png", "refused nowhere.png", "deep/c.png"]
    assert names(ItemSource(listed="list")) == expected
    assert names(ItemSource(listed="-"), stdin=listed.encode()) == expected


def test_texts_of_lines_and_tables(here: Path) -> None:
    rows = [{"text": "one", "other": "x"}, {"text": None, "other": "y"}, {"other": "z"}]
    (here / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    (here / "t.txt").write_bytes(b"first\n\nsecond\n\xff\xfe\n" + b"w" * 200 + b"\nlast")
    assert names(ItemSource(places=["t.txt"]), "text") == ["t.txt"]
    lines = ["t.txt line 1", "t.txt line 3", "refused t.txt line 4", "refused t.txt line 5", "t.txt line 6"]
    assert names(ItemSource(places=["t.txt"], lines=True), "text") == lines
    assert names(ItemSource(places=["-"]), "text", b"one\ntwo\n") == ["line 1", "line 2"]
    table = ["t.jsonl line 1", "t.jsonl line 2", "t.jsonl line 3", "refused t.jsonl"]
    assert names(ItemSource(places=["t.jsonl"]), "text") == table
    with pytest.raises(InputError, match="no text in 'review' \\(it has other, text\\)"):
        names(ItemSource(places=["t.jsonl"], column="review"), "text")


def test_standard_input_is_one_file_for_media(here: Path) -> None:
    (item,) = ItemSource(places=["-"]).items("image", ItemLimits(bytes=100), io.BytesIO(b"\x89PNG" + b"x" * 500))
    assert isinstance(item, NamedItem)
    assert len(item.item.data) == 101, "no more is read than it takes to refuse it"  # type: ignore[union-attr]


def test_a_list_is_read_no_further_than_asked_for(here: Path) -> None:
    stream = io.BytesIO(b"a.png\n" * 100_000)
    items = ItemSource(listed="-").items("image", ItemLimits(), stream)
    next(items)
    next(items)
    assert stream.tell() == 12


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (ItemSource(), "FILES: there is nothing to classify"),
        (ItemSource(places=["a.png", "nowhere.png"]), "FILES: no file or folder nowhere.png"),
        (ItemSource(places=["*.jpg"]), "FILES: no file matches *.jpg"),
        (ItemSource(places=["-"], listed="-"), "FILES: standard input is named twice"),
        (ItemSource(listed="nowhere"), "--files-from: no file nowhere"),
        (ItemSource(places=["x" * 300]), "is too long"),
        (ItemSource(places=["a\0b"]), "holds a zero byte"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(source: ItemSource, told: str, here: Path) -> None:
    with pytest.raises(InputError) as caught:
        source.check()
    assert told in str(caught.value)


def test_what_is_plainly_of_another_kind(here: Path) -> None:
    with pytest.raises(InputError, match=r"FILES: e\.wav is sound, and the model takes an image; give an image"):
        ItemSource(places=["a.png", "e.wav"]).check_kind("image")
    with pytest.raises(InputError, match="--text: is given, and the model takes sound"):
        ItemSource(texts=["x"]).check_kind("audio")
    ItemSource(places=["a.png", "deep", "-"], texts=()).check_kind("image")
