"""Media files that are something else than their names say, or far more: refused, and no foreign program is started."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import soundfile
from PIL import EpsImagePlugin, Image
from pyarrow import parquet

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media import MediaSource, load_media
from alphasmith.objectives.media._bounds import IMAGE_FORMATS
from alphasmith.objectives.media._records import read_records
from tests.support.hostile_files import pictures, saved_film, saved_sound

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def read(path: Path, kind: str = "auto", **settings: int) -> int:
    """Read every batch; the number of samples."""
    source = MediaSource(path=path, kind=kind, samples=4, batch_size=2, **settings)  # type: ignore[arg-type]
    return sum(batch.size for batch in load_media(source))


def refused(path: Path, kind: str = "auto") -> str:
    with pytest.raises(InputError) as caught:
        read(path, kind)
    assert caught.value.field == "data.path"
    assert "\n" not in str(caught.value)
    return caught.value.problem


def png(width: int, height: int) -> bytes:
    """The head of a picture of that size, with next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tiff"])
def test_postscript_starts_no_interpreter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise SystemExit("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    (tmp_path / name).write_bytes(POSTSCRIPT)
    with Image.open(tmp_path / name) as image:
        assert image.format == "EPS"  # Pillow left to itself takes it
    assert "not a readable image" in refused(tmp_path / name)


def test_every_format_in_the_list_is_read(tmp_path: Path) -> None:
    for kind in IMAGE_FORMATS:
        folder = tmp_path / kind
        folder.mkdir()
        Image.new("RGB", (8, 6), (9, 8, 7)).save(folder / f"a.{kind.lower()}", format=kind)
        read(folder, "image")
    for kind in ("ICO", "PCX", "TGA", "SGI"):
        made = io.BytesIO()
        Image.new("RGB", (16, 16)).save(made, format=kind)
        (tmp_path / "other.png").write_bytes(made.getvalue())
        assert "not a readable image" in refused(tmp_path / "other.png")


@pytest.mark.parametrize(
    ("size", "word"),
    [((60_000, 60_000), "pixels"), ((2**31 - 1, 2**31 - 1), ""), ((60_000, 10), "stripe"), ((0, 9), "")],
)
def test_a_picture_has_a_size(size: tuple[int, int], word: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(*size))
    assert word in refused(tmp_path / "a.png")


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:40] + bytes(byte ^ 0xFF for byte in data[40:80]) + data[80:]


@pytest.mark.parametrize("spoil", [cut, flipped, lambda data: b"", lambda data: data[:10]])
def test_a_damaged_picture_is_one_line(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    folder = pictures(tmp_path / "images", 1)
    (folder / "0.png").write_bytes(spoil((folder / "0.png").read_bytes()))
    assert "0.png" in refused(folder)


@pytest.mark.parametrize("name", ["a.png", "a.wav", "a.mp4", "a.txt", "a.jsonl"])
def test_what_is_no_file_is_never_opened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    assert refused(tmp_path / name) == f"{tmp_path / name} is not a plain file"
    assert "holds no" in refused(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert refused(tmp_path / name) == f"{tmp_path / name} is not a plain file"


def with_rate(data: bytes, rate: int) -> bytes:
    return data[:24] + struct.pack("<I", rate) + data[28:]


@pytest.mark.parametrize("rate", [0, 1, 999, 768_001, 2**31 - 1, 2**32 - 1])
def test_sound_has_a_rate(rate: int, tmp_path: Path) -> None:
    file = saved_sound(tmp_path / "a.wav")
    read(tmp_path)
    file.write_bytes(with_rate(file.read_bytes(), rate))
    assert "a.wav" in refused(tmp_path)


def test_sound_is_of_a_format_that_is_taken(tmp_path: Path) -> None:
    wave = np.zeros(1600, np.float32)
    for name, kind in (("a.wav", "AU"), ("a.flac", "CAF"), ("a.ogg", "W64"), ("a.aiff", "MAT5")):
        soundfile.write(tmp_path / name, wave, 16_000, format=kind)
        assert "does not begin like" in refused(tmp_path / name)
    for name, kind in (("a.wav", "WAV"), ("a.flac", "FLAC"), ("a.ogg", "OGG"), ("a.aiff", "AIFF"), ("b.wav", "RF64")):
        soundfile.write(tmp_path / name, wave, 16_000, format=kind)
        read(tmp_path / name)


def test_sound_has_few_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alphasmith.objectives.media._audio.MOST_SAMPLES", 3200 * 8 - 1)
    saved_sound(tmp_path / "a.wav", channels=7)
    read(tmp_path)
    saved_sound(tmp_path / "a.wav", channels=8)
    assert "8 channels" in refused(tmp_path)


def test_a_playlist_named_as_a_film_opens_nothing(tmp_path: Path) -> None:
    pytest.importorskip("av")
    secret = saved_film(tmp_path / "secret.mp4")
    lists = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{secret}'\n",
    }
    for text in lists.values():
        (tmp_path / "list.mp4").write_text(text)
        assert "does not begin like" in refused(tmp_path / "list.mp4")


def test_a_film_whose_name_is_an_address_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    saved_film(tmp_path / "plain.mp4", frames=6)
    (tmp_path / "plain.mp4").rename("concat:plain.mp4")
    assert read(Path("concat:plain.mp4"), frames=2) == 3


def test_a_film_has_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    saved_film(tmp_path / "a.mp4", frames=6)
    read(tmp_path, frames=2)
    monkeypatch.setattr("alphasmith.objectives.media._bounds.MOST_CLIP_PIXELS", 2 * 32 * 32 - 1)
    with pytest.raises(InputError, match="32x32 pixels in 2 frames, too many"):
        read(tmp_path, frames=2)
    monkeypatch.setattr("alphasmith.objectives.media._bounds.MOST_PIXELS", 32 * 32 - 1)
    with pytest.raises(InputError, match="32x32 pixels, too many"):
        read(tmp_path, frames=2)


@pytest.mark.parametrize("spoil", [cut, flipped, lambda data: b"", lambda data: data[:10]])
def test_a_damaged_film_is_one_line(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    pytest.importorskip("av")
    file = saved_film(tmp_path / "a.mp4")
    file.write_bytes(spoil(file.read_bytes()))
    assert "a.mp4" in refused(file)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": ' + b"[" * 100_000, "nested too deep"),
        (b'{"text": "\xff"}', "UTF-8"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b'{"text": "' + b"a" * 2**24 + b'"}', "characters"),
    ],
)
def test_a_record_has_a_shape(line: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(InputError, match=f"data.path: .*a.jsonl.*{word}"):
        list(read_records(tmp_path / "a.jsonl"))


def test_a_table_of_other_bytes_is_one_line(tmp_path: Path) -> None:
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(np.array([0, 2], np.int32)), pyarrow.py_buffer(b"\xff\xfe")]
    )
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (whole, cut(whole), flipped(whole), b"PAR1" * 9, b""):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(InputError, match=r"data\.path: .*a\.parquet"):
            list(read_records(tmp_path / "a.parquet"))
    for content in (b'a\n"' + b"x" * 2**25, b"\xff\xfe,"):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(InputError, match=r"data\.path: .*a\.csv"):
            list(read_records(tmp_path / "a.csv"))
