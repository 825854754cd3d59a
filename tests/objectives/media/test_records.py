"""Texts in tables and conversations: every form that data sets have is read the same way, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pytest
from pyarrow import parquet

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media import MediaBatches, MediaSource, data_digest, load_media
from tests.support.byte_tokenizer import save_byte_tokenizer

TEXTS = ["plain words", "with, a comma", 'with "quotes" in it', "two\nlines", "umlauts äöü", "more; marks | here"]
CONFIG = {"model_type": "llama", "vocab_size": 300}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a token for every byte, so that texts come back whole."""
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chat_folder(bytes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    for file in bytes_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def read(path: Path, folder: Path, **settings: Any) -> MediaBatches:
    return load_media(MediaSource(path=path, **settings), model_folder=folder, model_config=CONFIG)


def texts_of(media: MediaBatches, folder: Path) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode(batch.kwargs["input_ids"][0]) for batch in media.one_by_one()]


def written(path: Path, form: str) -> Path:
    """The texts and two nulls in one of the forms."""
    frame = pd.DataFrame({"n": range(len(TEXTS) + 2), "text": [None, *TEXTS, None]})
    if form in ("jsonl", "jsonl with a byte order mark"):
        lines = "\n".join(json.dumps({"n": 1, "text": text}, ensure_ascii=False) for text in [None, *TEXTS, None])
        path = path.with_suffix(".jsonl")
        path.write_text(lines, encoding="utf-8-sig" if "mark" in form else "utf-8")
    elif form == "categories":
        path = path.with_suffix(".parquet")
        frame.astype({"text": "category"}).to_parquet(path)
    elif form == "arrow strings":
        path = path.with_suffix(".parquet")
        frame.astype({"text": pd.ArrowDtype(pyarrow.large_string())}).to_parquet(path)
    elif form == "views":
        path = path.with_suffix(".parquet")
        parquet.write_table(pyarrow.table({"text": pyarrow.array([None, *TEXTS, None], pyarrow.string_view())}), path)
    else:
        ending, mark = {"csv": (".csv", ","), "csv with semicolons": (".csv", ";"), "tsv": (".tsv", "\t")}[form]
        path = path.with_suffix(ending)
        frame.to_csv(path, index=False, sep=mark, encoding="utf-8-sig")
    return path


@pytest.mark.parametrize(
    "form",
    [
        "jsonl",
        "jsonl with a byte order mark",
        "categories",
        "arrow strings",
        "views",
        "csv",
        "csv with semicolons",
        "tsv",
    ],
)
def test_every_table_holds_the_same_texts(form: str, bytes_folder: Path, tmp_path: Path) -> None:
    media = read(written(tmp_path / "data", form), bytes_folder)
    assert sorted(texts_of(media, bytes_folder)) == sorted(TEXTS)
    assert "2 records without a text (null) passed over" in media.notes


SAID = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
SHARED = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
PARTS = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in SAID]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": SAID},
        {"messages": PARTS, "id": 1},
        {"conversations": SHARED},
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"instruction": "Why?", "output": "Because."},
        {"prompt": "Why?", "response": "Because."},
        {"prompt": "Why?", "completion": "Because."},
        {"question": "Why?", "answer": "Because."},
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_conversations_go_through_the_template(
    record: dict[str, Any], ending: str, chat_folder: Path, bytes_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"chat.{ending}"
    if ending == "jsonl":
        file.write_text(json.dumps(record))
    else:
        parquet.write_table(pyarrow.Table.from_pylist([record]), file)
    assert texts_of(read(file, chat_folder), chat_folder) == ["<user>Why?<assistant>Because."]
    with pytest.raises(InputError, match="no chat template") as caught:
        read(file, bytes_folder)
    assert caught.value.field == "data.column"
    assert "\n" not in str(caught.value)


def test_a_named_column_may_hold_conversations(chat_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    about = {"instruction": "Sum up.", "input": "Long.", "output": "Short."}
    file.write_text("\n".join(map(json.dumps, [{"talk": SHARED, **about}, {"talk": None}])))
    media = read(file, chat_folder, column="talk")
    assert texts_of(media, chat_folder) == ["<user>Why?<assistant>Because."]
    file.write_text(json.dumps(about))
    assert texts_of(read(file, chat_folder), chat_folder) == ["<user>Sum up.\n\nLong.<assistant>Short."]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": "hello"}, "no list of messages"),
        ({"messages": []}, "no list of messages"),
        ({"messages": [{"speaker": "a"}]}, "no list of messages"),
        ({"messages": ["hello"]}, "no list of messages"),
        ({"instruction": 3, "output": "b"}, "no text in 'instruction'"),
        ({"text": 3}, "no text in 'text'"),
        ({"body": "a"}, "it has body"),
    ],
)
def test_records_that_hold_no_text_are_named(
    record: dict[str, Any], words: str, chat_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(record))
    with pytest.raises(InputError, match=words) as caught:
        read(file, chat_folder)
    assert caught.value.field == "data.column"
    assert "line 1" in caught.value.problem


def test_a_template_that_refuses_is_named(chat_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in chat_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system prompt') }}")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": SAID}))
    with pytest.raises(InputError, match="no system prompt"):
        read(tmp_path / "chat.jsonl", folder)


def test_a_torn_csv_is_named(bytes_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_text("text,n\na,b,c\n")
    with pytest.raises(InputError, match="line 2 has 3 cells"):
        read(file, bytes_folder)
    file.write_bytes("text\nä\n".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        read(file, bytes_folder)
    file.write_text("")
    with pytest.raises(InputError, match="holds no text"):
        read(file, bytes_folder)


def test_tables_beside_other_files_are_no_texts(bytes_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text of some length")
    (tmp_path / "texts" / "about.csv").write_text("name,origin\na,b\n")
    assert texts_of(read(tmp_path / "texts", bytes_folder), bytes_folder) == ["a text of some length"]
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "about.csv").write_text("name,origin\na,b\n")
    assert load_media(MediaSource(path=tmp_path / "pictures")).samples == 1


def test_the_batch_size_does_not_change_the_digest(bytes_folder: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "data", "csv")
    digests = {data_digest(read(file, bytes_folder, batch_size=size).one_by_one()) for size in (1, 2, 6)}
    assert len(digests) == 1
