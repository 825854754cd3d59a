"""Media: every kind read the way a model wants it, three disjoint splits, a stable digest, and bad input by name."""

from __future__ import annotations

import builtins
import json
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media import MediaBatches, MediaSource, data_digest, in_memory, load_media, split_batches
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.batches import as_media
from tests.support.byte_tokenizer import save_byte_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer: one token per byte, no padding token."""
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


LLAMA = {"model_type": "llama", "vocab_size": 256, "max_position_embeddings": 48}


def decode(folder: Path, batch: Batch) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    keep = batch.kwargs["attention_mask"].bool()
    return [tokenizer.decode(row[k].tolist()) for row, k in zip(batch.kwargs["input_ids"], keep, strict=True)]


def rows_of(batches: Sequence[Batch]) -> list[int]:
    return [int(v) for batch in batches for v in batch.args[0][:, 0]]


def write_images(folder: Path, count: int, size: tuple[int, int] = (10, 12)) -> list[np.ndarray[Any, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i in range(count)]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:02d}.png")
    return pictures


def refusal(source: MediaSource, **kwargs: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        list(load_media(source, **kwargs))
    assert caught.value.remedy
    return caught.value


# ---------------------------------------------------------------------------------------------------- splits and digest


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    held_out=st.one_of(st.floats(0.05, 0.5), st.integers(1, 5)),
    proof=st.one_of(st.floats(0.05, 0.4), st.integers(1, 5)),
    seed=st.integers(0, 5),
)
def test_splits_are_disjoint_and_complete(sizes: list[int], held_out: float, proof: float, seed: int) -> None:
    numbers = torch.split(torch.arange(sum(sizes)), sizes)
    batches = [Batch(args=(part[:, None],), mask=part[:, None] > -1, labels=part) for part in numbers]
    counts = [max(1, round(n * sum(sizes))) if n < 1 else n for n in (held_out, proof)]
    if sum(counts) >= sum(sizes):
        with pytest.raises(InputError, match="too few"):
            split_batches(batches, held_out, proof, seed=seed)
        return
    splits = split_batches(batches, held_out, proof, seed=seed)
    parts = [rows_of(split) for split in (splits.calibration, splits.held_out, splits.proof)]
    assert [len(part) for part in parts] == [sum(sizes) - sum(counts), *counts]
    assert sorted(parts[0] + parts[1] + parts[2]) == list(range(sum(sizes)))
    for split in (splits.calibration, splits.held_out, splits.proof):
        assert split.samples == len(rows_of(split))
        for batch, size in zip(split, split.sizes, strict=True):
            assert batch.size == size
            assert batch.labels is not None
            assert batch.labels.tolist() == batch.args[0][:, 0].tolist()
            assert batch.mask is None, "it hides nothing"
    again = split_batches(batches, held_out, proof, seed=seed)
    assert rows_of(again.proof) == parts[2]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 3), min_size=4, max_size=30),
    cut=st.integers(1, 9),
    size=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_batches_change_neither_splits_nor_digest(lengths: list[int], cut: int, size: int, seed: int) -> None:
    """Samples of several shapes, handed over in batches of ``cut`` at most, split into batches of ``size``."""
    samples = [Batch(kwargs={"x": torch.full((1, length), i), "flag": True}) for i, length in enumerate(lengths)]
    handed: list[Batch] = []
    for length, group in groupby(enumerate(lengths), key=lambda item: item[1]):
        numbers = [i for i, _ in group]
        for start in range(0, len(numbers), cut):
            part = torch.tensor(numbers[start : start + cut])
            handed.append(Batch(kwargs={"x": part[:, None].expand(-1, length), "flag": True}))
    expected = split_batches(samples, 1, 1, size=1, seed=seed)
    found = split_batches(handed, 1, 1, size=size, seed=seed)
    for one, other in ((found.calibration, expected.calibration), (found.proof, expected.proof)):
        assert max(one.sizes) <= size
        rows = [row for batch in one for row in batch.kwargs["x"]]
        assert [row.tolist() for row in rows] == [batch.kwargs["x"][0].tolist() for batch in other]
    assert data_digest(as_media(handed).one_by_one()) == data_digest(as_media(samples).one_by_one())


def test_sorted_classes_land_in_every_split() -> None:
    batches = [Batch(args=(torch.full((2, 1), i // 10),)) for i in range(20)]
    splits = split_batches(batches, 0.3, 0.3)
    assert set(rows_of(splits.calibration)) == set(rows_of(splits.held_out)) == {0, 1}


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan")])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(InputError, match=r"data\.held_out"):
        split_batches([Batch(args=(torch.zeros(9, 1),))], share)


def test_splitting_lazy_batches_reads_nothing() -> None:
    read: list[int] = []

    def load(numbers: tuple[int, ...]) -> Batch:
        read.extend(numbers)
        return Batch(args=(torch.tensor(numbers)[:, None],))

    lazy = MediaBatches.of(20, 4, load, notes=("a note",))
    splits = split_batches(lazy, 4, 4)
    assert read == []
    assert splits.proof.notes == ("a note",)
    list(splits.proof)
    assert len(read) == 4
    assert lazy[-1].args[0][0, 0] == 16
    assert [int(b.args[0][0, 0]) for b in lazy[1:3]] == [4, 8]
    with pytest.raises(IndexError):
        lazy[5]


def test_digest_tells_contents_apart() -> None:
    base = Batch(kwargs={"x": torch.arange(6.0).view(2, 3), "flag": True})
    same = Batch(kwargs={"flag": True, "x": torch.arange(6.0).view(2, 3)})
    others = [
        Batch(kwargs={"x": torch.arange(6.0).view(3, 2), "flag": True}),
        Batch(kwargs={"x": torch.arange(6.0).double().view(2, 3), "flag": True}),
        Batch(kwargs={"y": torch.arange(6.0).view(2, 3), "flag": True}),
        Batch(kwargs={"x": torch.arange(6.0).view(2, 3), "flag": 1}),
        Batch(kwargs={"x": torch.arange(6.0).view(2, 3), "flag": True}, mask=torch.ones(2, 3).bool()),
        Batch(args=(torch.arange(6.0).view(2, 3), True)),
    ]
    assert data_digest([base]) == data_digest([same])
    digests = {data_digest([b]) for b in (base, *others)} | {data_digest([base, base]), data_digest([])}
    assert len(digests) == len(others) + 3
    with pytest.raises(InputError, match="stable digest"):
        data_digest([Batch(args=(torch.zeros(1), object()))])


# ------------------------------------------------------------------------------------------------------------ in memory


def test_in_memory_takes_every_form() -> None:
    x = torch.arange(6.0).view(3, 2)
    attention = torch.tensor([[1, 1], [1, 0], [1, 1]])
    given_batch = Batch(args=(x,))
    batches = in_memory(
        [x, x.numpy(), (x, {"k": 1}), {"input_ids": x, "attention_mask": attention, "labels": x[:, 0]}, given_batch]
    )
    assert [b.size for b in batches] == [3] * 5
    assert torch.equal(batches[1].args[0], x)
    assert batches[3].labels is not None
    assert "labels" not in batches[3].kwargs
    assert batches[3].mask is not None
    assert batches[3].mask.tolist() == attention.bool().tolist()
    assert torch.equal(batches[4].args[0], given_batch.args[0])
    full = in_memory([{"input_ids": x, "attention_mask": torch.ones(3, 2).long()}])[0]
    assert full.mask is None


def test_in_memory_stops_at_the_limit_of_an_endless_stream() -> None:
    def endless() -> Any:
        while True:
            yield torch.zeros(4, 2)

    assert [b.size for b in in_memory(endless(), limit=10)] == [4, 4, 2]


@pytest.mark.parametrize(
    ("batches", "named"),
    [
        ([], "there is none"),
        (["text"], "is a str"),
        ([()], "holds no tensor"),
        ([torch.zeros(0, 3)], "is empty"),
        ([(torch.zeros(2, 3), torch.zeros(3, 3))], "has 3 samples"),
        ([torch.tensor([[float("nan")]])], "NaN"),
        ([{"x": torch.tensor([[float("inf")]])}], r"\['x'\].*NaN or infinity"),
        ([{"input_ids": torch.ones(2, 3), "attention_mask": torch.zeros(2, 3).long()}], "padding only"),
    ],
)
def test_in_memory_refuses(batches: list[Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        in_memory(batches)


# ----------------------------------------------------------------------------------------------------------------- text


def test_windows_of_a_text_never_overlap(tokenizer_folder: Path, tmp_path: Path) -> None:
    text = "".join(f"{i:04d} " for i in range(4000))
    (tmp_path / "a.txt").write_text(text[:12000])
    (tmp_path / "b.txt").write_text(text[12000:])
    (tmp_path / ".hidden.txt").write_text("secret")
    source = MediaSource(path=tmp_path, samples=20, batch_size=6, max_length=40)
    media = load_media(source, model_folder=tokenizer_folder, model_config=LLAMA, seed=3)
    assert media.sizes == (6, 6, 6, 2)
    found = [s for batch in media for s in decode(tokenizer_folder, batch)]
    places = sorted(text.index(s) for s in found)
    assert all(b - a >= 40 for a, b in pairwise(places))
    assert places[-1] > 16000  # spread over both files
    again = load_media(source, model_folder=tokenizer_folder, model_config=LLAMA, seed=3)
    assert data_digest(media) == data_digest(media) == data_digest(again)
    other = load_media(source, model_folder=tokenizer_folder, model_config=LLAMA, seed=4)
    assert data_digest(other) != data_digest(media)


def test_windows_keep_characters_whole(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("äöü€漢字" * 200, encoding="utf-8")
    source = MediaSource(path=tmp_path, samples=9, max_length=4)
    media = load_media(source, model_folder=tokenizer_folder, model_config=LLAMA)
    assert media.samples == 9


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_records_are_drawn_padded_and_masked(tokenizer_folder: Path, tmp_path: Path, ending: str) -> None:
    texts = [f"{i} " + " ".join(WORDS[: i % 5 + 1]) for i in range(40)] + ["", "  "]
    if ending == "jsonl":
        (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"body": t}) for t in texts) + "\n\n")
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "d.parquet")
    source = MediaSource(path=tmp_path, column="body", samples=12, batch_size=5)
    media = load_media(source, model_folder=tokenizer_folder, model_config=LLAMA)
    assert media.sizes == (5, 5, 2)
    found = [s for batch in media for s in decode(tokenizer_folder, batch)]
    assert len(set(found)) == 12
    assert set(found) <= set(texts)
    for batch in media:
        if batch.mask is not None:
            assert torch.equal(batch.mask, batch.kwargs["attention_mask"].bool())
            assert not bool((batch.mask[:, 1:] & ~batch.mask[:, :-1]).any()), "padding is on the right"
    assert any(batch.mask is not None for batch in media)
    everything = load_media(
        MediaSource(path=tmp_path, column="body"), model_folder=tokenizer_folder, model_config=LLAMA
    )
    assert everything.samples == 40  # blank records are no samples


def test_text_for_encoder_decoders_and_plain_modules(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(WORDS * 30))
    source = MediaSource(path=tmp_path, samples=3, max_length=16)
    config = {"model_type": "t5", "is_encoder_decoder": True}
    ids = load_media(source, model_folder=tokenizer_folder, model_config=config)[0].kwargs["input_ids"]
    plain = load_media(source, model_folder=tokenizer_folder)[0]
    assert torch.equal(plain.args[0], ids)
    assert not plain.kwargs


def test_bad_text_is_named(tokenizer_folder: Path, tmp_path: Path) -> None:
    def refused(name: str, content: bytes, **kwargs: Any) -> InputError:
        file = tmp_path / name
        file.write_bytes(content)
        return refusal(MediaSource(path=file), model_folder=tokenizer_folder, **kwargs)

    assert "holds no text" in refused("blank.txt", b"  \n ").problem
    assert "is empty" in refused("empty.txt", b"").problem
    assert "UTF-8" in refused("latin.txt", "äöü".encode("latin-1") * 20).problem
    assert "line 2 is not JSON" in refused("broken.jsonl", b'{"text": "a"}\n{"text').problem
    missing = refused("other.jsonl", b'{"body": "a"}\n')
    assert missing.field == "data.column"
    assert "it has body" in missing.problem
    assert "no fields" in refused("list.jsonl", b"[1]\n").problem
    assert "UTF-8" in refused("latin.jsonl", '{"text": "ä"}'.encode("latin-1")).problem
    assert "parquet" in refused("junk.parquet", b"PAR1 nothing").problem
    assert "holds no text" in refused("blank.jsonl", b'{"text": ""}\n').problem
    assert "knows 10" in refused("a.txt", b"hello world", model_config={"vocab_size": 10}).problem
    assert refusal(MediaSource(path=tmp_path / "a.txt")).problem.startswith("text needs a tokenizer")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "a.txt").write_text("a")
    (mixed / "b.jsonl").write_text("{}")
    assert "mixes" in refusal(MediaSource(path=mixed), model_folder=tokenizer_folder).problem
    broken = tmp_path / "tokenizer"
    broken.mkdir()
    (broken / "tokenizer.json").write_text('{"version"')
    assert "tokenizer" in refusal(MediaSource(path=tmp_path / "a.txt"), model_folder=broken).problem


def test_parquet_columns_are_checked(tokenizer_folder: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "d.parquet")
    error = refusal(MediaSource(path=tmp_path), model_folder=tokenizer_folder)
    assert error.field == "data.column"
    assert "it has body, n" in error.problem
    assert "no text in 'n'" in refusal(MediaSource(path=tmp_path, column="n"), model_folder=tokenizer_folder).problem


# --------------------------------------------------------------------------------------------------------------- images


def test_images_without_a_processor(tmp_path: Path) -> None:
    pictures = write_images(tmp_path / "class_a", 4) + write_images(tmp_path / "class_b", 3)
    media = load_media(
        MediaSource(path=tmp_path, batch_size=3), model_config={"model_type": "vit", "image_size": [10, 12]}
    )
    assert media.sizes == (3, 3, 1)
    assert "no image processor" in media.notes[0]
    found = torch.cat([b.kwargs["pixel_values"] for b in media])
    wanted = {p.tobytes() for p in pictures}
    back = {((x * 0.5 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy().tobytes() for x in found}
    assert back == wanted
    resized = load_media(MediaSource(path=tmp_path, image_size=8), model_config={"num_channels": 1})[0]
    assert resized.args[0].shape == (7, 1, 8, 8)


def test_images_by_the_models_processor(tmp_path: Path) -> None:
    write_images(tmp_path / "media", 3)
    stored: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 6, "width": 6},
        "image_mean": [0.0] * 3,
    }
    stored |= {"image_std": [1.0] * 3, "do_resize": True, "do_rescale": True, "do_normalize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    media = load_media(MediaSource(path=tmp_path / "media"), model_folder=tmp_path, model_config={"model_type": "vit"})
    pixels = media[0].kwargs["pixel_values"]
    assert pixels.shape == (3, 3, 6, 6)
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1
    assert media.notes == ()


def test_numbers_of_an_unusable_processor_are_used(tmp_path: Path) -> None:
    write_images(tmp_path / "media", 2)
    stored = {"image_processor_type": "NoSuchProcessor", "size": {"shortest_edge": 9}, "image_mean": [0.0] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor": stored}))
    media = load_media(MediaSource(path=tmp_path / "media"), model_folder=tmp_path)
    assert media[0].args[0].shape == (2, 3, 9, 9)
    assert float(media[0].args[0].min()) >= 0
    assert "processor file" in media.notes[0]
    (tmp_path / "preprocessor_config.json").write_text("{")
    assert refusal(MediaSource(path=tmp_path / "media"), model_folder=tmp_path).field == "model.path"


def test_bad_images_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, 2, (64, 64))
    (tmp_path / "fake.png").write_text("no picture")
    assert "fake.png" in refusal(MediaSource(path=tmp_path)).problem
    (tmp_path / "fake.png").unlink()
    whole = (tmp_path / "01.png").read_bytes()
    (tmp_path / "01.png").write_bytes(whole[: len(whole) // 2])
    error = refusal(MediaSource(path=tmp_path))
    assert "01.png is a damaged image" in error.problem
    assert "5 channels" in refusal(MediaSource(path=tmp_path), model_config={"num_channels": 5}).problem


# ---------------------------------------------------------------------------------------------------------------- audio


def test_audio_is_mono_resampled_and_unpadded(tmp_path: Path) -> None:
    rate = 22050
    for i, seconds in enumerate((1.0, 1.1, 0.9, 0.2, 3.0)):
        time = np.arange(int(rate * seconds)) / rate
        tone = 0.5 * np.sin(2 * np.pi * 440 * time)
        soundfile.write(tmp_path / f"{i}.{'flac' if i % 2 else 'wav'}", np.stack([tone, tone], 1), rate)
    media = load_media(MediaSource(path=tmp_path, sampling_rate=16000, seconds=2.0))
    assert media.samples == 5
    for batch in media:
        wave = batch.args[0]
        assert wave.dim() == 2
        assert 3000 < wave.shape[1] <= 32000
        spectrum = torch.fft.rfft(wave, dim=1).abs().mean(0)
        assert abs(int(spectrum.argmax()) * 16000 / wave.shape[1] - 440) < 10
        assert (wave[:, -100:].abs().amax(1) > 0.3).all(), "no clip ends in padding"
        assert (wave.abs().amax(1) < 0.6).all()
    kept = sorted(batch.args[0].shape[1] / 16000 for batch in media for _ in range(batch.size))
    assert all(0.8 * s <= k <= s + 1e-3 for k, s in zip(kept, (0.2, 0.9, 1.0, 1.1, 2.0), strict=True))
    assert max(media.sizes) == 2, "lengths of a second and of a little more share one"
    assert len({data_digest(media) for _ in range(2)}) == 1, "read twice"


def test_audio_by_the_models_feature_extractor(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32), 8000)
    stored = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 4000, "do_normalize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    config = {"model_type": "wav2vec2"}
    media = load_media(MediaSource(path=tmp_path / "a.wav"), model_folder=tmp_path, model_config=config)
    values = media[0].kwargs["input_values"]
    assert values.shape == (1, 4000)
    assert float(values.std()) == pytest.approx(1, abs=0.01)
    source = MediaSource(path=tmp_path / "a.wav", sampling_rate=8000)
    assert refusal(source, model_folder=tmp_path).field == "data.sampling_rate"
    plain = load_media(MediaSource(path=tmp_path / "a.wav"), model_config=config | {"sampling_rate": 8000})
    assert plain[0].kwargs["input_values"].shape == (1, 8000)


def test_bad_audio_is_named(tmp_path: Path) -> None:
    (tmp_path / "fake.wav").write_bytes(b"RIFF nothing")
    assert "fake.wav" in refusal(MediaSource(path=tmp_path)).problem
    soundfile.write(tmp_path / "fake.wav", np.zeros(0, np.float32), 8000)
    assert "no sound" in refusal(MediaSource(path=tmp_path)).problem
    soundfile.write(tmp_path / "fake.wav", np.array([0, np.nan], np.float32), 8000, subtype="FLOAT")
    assert "NaN" in refusal(MediaSource(path=tmp_path)).problem


# ---------------------------------------------------------------------------------------------------------------- video


def test_frames_become_clips_that_do_not_overlap(tmp_path: Path) -> None:
    for name, count in (("one", 7), ("two", 4)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (6, 6), (10 * i, 100 if name == "two" else 0, 0)).save(tmp_path / name / f"{i}.png")
    source = MediaSource(path=tmp_path, kind="video", frames=3, image_size=6)
    media = load_media(source, model_config={"model_type": "videomae"})
    clips = torch.cat([b.kwargs["pixel_values"] for b in media])
    assert clips.shape == (3, 3, 3, 6, 6)  # two clips of the first video, one of the second
    red = ((clips[:, :, 0, 0, 0] * 0.5 + 0.5) * 25.5).round().int().tolist()
    assert sorted(red) == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    error = refusal(MediaSource(path=tmp_path, kind="video", frames=9))
    assert error.field == "data.frames"
    assert "longest has 7" in error.problem


def test_video_files(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "bgr0"
        for i in range(5):
            picture = np.full((16, 16, 3), 40 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    media = load_media(MediaSource(path=tmp_path, frames=2, image_size=16))
    levels = ((torch.cat([b.args[0] for b in media])[:, :, 0, 0, 0] * 0.5 + 0.5) * 255 / 40).round().int().tolist()
    assert sorted(levels) == [[0, 1], [2, 3]]
    (tmp_path / "a.mkv").write_bytes(b"nothing")
    assert "not a readable video" in refusal(MediaSource(path=tmp_path)).problem


def test_missing_pyav_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    real = builtins.__import__

    def without_av(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    assert "alphasmith[video]" in refusal(MediaSource(path=tmp_path)).remedy


# ------------------------------------------------------------------------------------------------------------ the source


def test_kinds_are_told_by_endings(tmp_path: Path) -> None:
    assert refusal(MediaSource(path=tmp_path / "nowhere")).problem.endswith("does not exist")
    assert "empty folder" in refusal(MediaSource(path=tmp_path)).problem
    (tmp_path / "readme.rst").write_text("x")
    assert "holds no media file" in refusal(MediaSource(path=tmp_path)).problem
    assert "no audio file" in refusal(MediaSource(path=tmp_path, kind="audio")).problem
    assert "is no text file" in refusal(MediaSource(path=tmp_path / "readme.rst", kind="text")).problem
    write_images(tmp_path, 2)
    (tmp_path / "a.txt").write_text("x")
    error = refusal(MediaSource(path=tmp_path))
    assert error.field == "data.kind"
    assert "1 text, 2 image" in error.problem
    assert load_media(MediaSource(path=tmp_path, kind="image")).samples == 2


@pytest.mark.parametrize(
    "name", ["samples", "batch_size", "max_length", "sampling_rate", "frames", "image_size", "seconds"]
)
def test_numbers_of_a_source_are_positive(name: str) -> None:
    with pytest.raises(InputError, match=rf"data\.{name}"):
        MediaSource(path=Path("x"), **{name: 0})  # type: ignore[arg-type]
