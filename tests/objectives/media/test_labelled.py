"""Labelled samples: tables that list media files, data read whole, and pairs of inputs and labels from scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media import MediaSource, load_media, media_kind
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.in_memory import labelled
from tests.support.byte_tokenizer import save_byte_tokenizer

LLAMA = {"model_type": "llama", "vocab_size": 256, "max_position_embeddings": 48}


def write_table(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
        file.write_text("\n".join(lines) + "\n")
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures, each of one grey of its own, in a folder beside the table."""
    (tmp_path / "media").mkdir()
    for i in range(6):
        Image.fromarray(np.full((4, 4, 3), 40 * i, np.uint8)).save(tmp_path / "media" / f"{i}.png")
    return tmp_path


def tokenizer_in(folder: Path) -> Path:
    """A folder with a byte-level tokenizer."""
    (folder / "tokenizer").mkdir()
    return save_byte_tokenizer(folder / "tokenizer")


def texts(folder: Path, media: Any) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.decode(row.tolist()) for batch in media for row in batch.kwargs["input_ids"]]


def greys(media: Any) -> list[int]:
    return [round(float(value * 0.5 + 0.5) * 255 / 40) for batch in media for value in batch.args[0][:, 0, 0, 0]]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_table_lists_files_and_what_they_stand_for(pictures: Path, ending: str) -> None:
    rows = [{"where": f"media/{i}.png", "species": ["cat", "dog"][i % 2]} for i in (5, 3, 0)]
    table = write_table(pictures / f"list.{ending}", rows)
    source = MediaSource(path=table, files="where", label="species", targets="class", image_size=4, whole=True)
    assert media_kind(source) == "image"
    media = load_media(source)
    assert greys(media) == [5, 3, 0]
    assert media.targets == ("dog", "dog", "cat")
    drawn = load_media(MediaSource(path=table, files="where", label="species", targets="class", image_size=4))
    assert sorted(greys(drawn)) == [0, 3, 5]


def test_usual_names_of_labels_are_found_in_a_list(pictures: Path) -> None:
    table = write_table(pictures / "list.csv", [{"path": f"media/{i}.png", "label": i} for i in range(6)])
    media = load_media(MediaSource(path=table, files="path", targets="class", image_size=4, whole=True))
    assert media.targets == tuple("012345")


@pytest.mark.parametrize(
    ("rows", "files", "field", "words"),
    [
        ([{"where": "media/0.png"}], "path", "data.files", "has no field 'path' .it has where"),
        ([{"where": ""}, {"where": "media/0.png"}], "where", "data.files", "names no file in 'where'"),
        ([{"where": "media/9.png"}], "where", "data.files", "which is no file"),
        ([{"where": "media"}], "where", "data.files", "no media file"),
        ([{"where": "media/0.png"}, {"where": "a.wav"}], "where", "data.files", "'a.wav', no image file"),
        (
            [{"where": "media/0.png", "label": "a"}, {"where": "media/0.png", "label": "b"}],
            "where",
            "data.label",
            "calls 0.png 'b', an earlier one 'a'",
        ),
    ],
)
def test_bad_lists_are_named(pictures: Path, rows: list[dict[str, Any]], files: str, field: str, words: str) -> None:
    table = write_table(pictures / "list.jsonl", rows)
    with pytest.raises(InputError, match=words) as caught:
        load_media(MediaSource(path=table, files=files, targets="class", image_size=4))
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_a_list_is_a_table_with_records(pictures: Path) -> None:
    (pictures / "empty.jsonl").write_text("\n")
    for path, words in ((pictures / "empty.jsonl", "lists no file"), (pictures / "media", "no table of files")):
        with pytest.raises(InputError, match=words):
            load_media(MediaSource(path=path, files="where"))


def test_whole_data_keep_their_order_and_are_all_there(pictures: Path) -> None:
    source = MediaSource(path=pictures / "media", image_size=4, samples=2, whole=True)
    assert greys(load_media(source, seed=3)) == list(range(6))


def test_a_plain_text_is_cut_into_pieces_that_cover_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    text = "".join(chr(97 + i % 26) for i in range(4 * 48 * 7))
    (tmp_path / "text.txt").write_text(text)
    source = MediaSource(path=tmp_path / "text.txt", samples=1, max_length=48, whole=True)
    media = load_media(source, model_folder=tokenizer, model_config=LLAMA)
    assert media.samples == 7
    assert texts(tokenizer, media) == [text[i : i + 48] for i in range(0, len(text), 4 * 48)]


def test_records_are_numbered_in_their_order(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(["one", "two", " ", "four", "five"])]
    table = write_table(tmp_path / "texts.jsonl", rows)
    source = MediaSource(path=table, samples=2, targets="class", whole=True, batch_size=1)
    media = load_media(source, model_folder=tokenizer, model_config=LLAMA)
    assert texts(tokenizer, media) == ["one", "two", "four", "five"]
    assert media.targets == (0, 1, 1, 0)


def test_clips_of_another_rate_are_resampled_with_a_note(tmp_path: Path) -> None:
    for i, rate in enumerate((8000, 16000, 16000)):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(rate // 4, np.float32), rate)
    media = load_media(MediaSource(path=tmp_path, sampling_rate=16000))
    assert media.notes == ("1 of 3 clips resampled from 8000 to 16000 Hz",)
    assert {batch.args[0].shape[1] for batch in media} == {4000}


@pytest.mark.parametrize(
    "batches",
    [
        [(torch.arange(4.0)[:2, None], [0, 1]), (torch.arange(4.0)[2:, None], torch.tensor([1, 0]))],
        [(np.arange(4.0)[:, None], np.array([0, 1, 1, 0]))],
        [(torch.tensor([float(i)]), label) for i, label in enumerate([0, 1, 1, 0])],
        [({"x": torch.arange(4.0)[:, None]}, [0, 1, 1, 0])],
        [{"x": torch.arange(4.0)[:, None], "labels": torch.tensor([0, 1, 1, 0])}],
        [Batch(args=(torch.arange(4.0)[:, None],), labels=torch.tensor([0, 1, 1, 0]))],
    ],
    ids=["tensors", "arrays", "single samples", "mappings", "named labels", "batches"],
)
def test_pairs_of_inputs_and_labels(batches: list[Any]) -> None:
    found, targets = labelled(batches, limit=100)
    values = [v for batch in found for x in (*batch.args, *batch.kwargs.values()) for v in x[:, 0].tolist()]
    assert values == [0.0, 1.0, 2.0, 3.0]
    assert targets == (0, 1, 1, 0)
    assert all(batch.labels is None for batch in found)


def test_other_forms_of_labels() -> None:
    assert labelled([(torch.zeros(2, 1), ["cat", "dog"])], limit=9)[1] == ("cat", "dog")
    assert labelled([(torch.zeros(1), "cat")], limit=9)[1] == ("cat",)
    (batch,), targets = labelled([(torch.zeros(2, 3), torch.ones(2, 3))], limit=9)
    assert targets == ()
    assert batch.labels is not None
    assert torch.equal(batch.labels, torch.ones(2, 3))
    ids, none = labelled([torch.zeros(2, 8, dtype=torch.int64)], limit=9)
    assert (ids[0].size, none) == (2, ())


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (torch.zeros(3, 2), "is a Tensor"),
        ([], "there is none"),
        ([(torch.zeros(2, 1), [0, 1, 2])], "has 3 labels for 2 samples"),
        ([(torch.zeros(2, 1), [0, 1]), torch.zeros(2, 1)], "has labels where other batches have none"),
        ([torch.zeros(2, 1), (torch.zeros(2, 1), [0, 1])], "has labels where other batches have none"),
        ([(torch.zeros(2, 1),)], "holds 1 things"),
        ([(torch.zeros(2, 1), torch.zeros(2, 2, dtype=torch.int64))], "whole numbers of shape"),
        ([(torch.zeros(2, 1), torch.full((2, 1), float("nan")))], "NaN or infinity"),
        ([(torch.full((2, 1), float("nan")), [0, 1])], "NaN or infinity"),
        ([(torch.zeros(2, 1), torch.ones(3, 1))], "3 samples"),
    ],
)
def test_bad_pairs_are_named(batches: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        labelled(batches, limit=100)
    assert "\n" not in str(caught.value)


def test_a_table_lists_clips_of_sound(tmp_path: Path) -> None:
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", np.full(4000, i / 4, np.float32), 8000)
    table = write_table(tmp_path / "clips.csv", [{"clip": f"{i}.wav", "word": f"w{i}"} for i in (2, 0, 1)])
    media = load_media(
        MediaSource(path=table, files="clip", label="word", targets="class", sampling_rate=8000, whole=True)
    )
    assert media_kind(MediaSource(path=table, files="clip")) == "audio"
    assert [round(float(batch.args[0][row].mean()) * 4) for batch in media for row in range(batch.size)] == [2, 0, 1]
    assert media.targets == ("w2", "w0", "w1")
