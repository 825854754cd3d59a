"""What is fuzzed: each target spoils one kind of input and lets the product read it. Only an ``AlphasmithError`` may come back."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow
import soundfile
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from PIL import Image
from pyarrow import parquet

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.objectives.media import MediaSource, load_media
from alphasmith.search.checkpoints.load import load_quantized, load_smoothed
from alphasmith.search.checkpoints.verification import undo
from alphasmith.search.config import RunConfig
from alphasmith.search.toml_values import apply_overrides
from alphasmith.storage.files.durable import digest_file
from alphasmith.storage.output.manifest import parse_manifest, read_manifest
from tests.fuzz.mutations import odd_values, spoilt_bytes, spoilt_json, spoilt_value
from tests.support.hostile_files import pictures, saved_classifier, saved_film, saved_sound, task_of
from tests.support.run_cases import Mlp, saved_llama, seeded, written_texts

Target = Callable[[DataObject], None]

_DATA = Path(__file__).parents[1] / "storage" / "data"
_DEFAULTS = RunConfig().model_dump(mode="json")


@cache
def _kept() -> Path:
    """A folder for what is made once; gone with the process."""
    folder = tempfile.mkdtemp(prefix="fuzz-")
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        yield Path(folder)


def configuration(data: DataObject) -> None:
    """Configurations in Python, as TOML, and as overrides."""
    with suppress(AlphasmithError):
        RunConfig.build(spoilt_value(data, spoilt_value(data, _DEFAULTS)))
    with suppress(AlphasmithError):
        section = data.draw(
            st.sampled_from(["", "model.", "data.", "search.", "workers.", "hardware.", "groups.", "scheme."])
        )
        name = data.draw(st.sampled_from(sorted(_DEFAULTS.get(section[:-1], _DEFAULTS))) | st.text(max_size=8))
        value = data.draw(odd_values.map(repr) | st.text(max_size=20))
        RunConfig.build(apply_overrides({}, [f"{section}{name}={value}"]))
    text = '[search]\ntrials = 8\n[hardware]\nmemory = "8 GiB"\n[sites]\nskip = ["a*"]\n[model]\npath = "x"\n'
    with _scratch() as folder, suppress(AlphasmithError):
        (folder / "run.toml").write_bytes(spoilt_bytes(data, text.encode()))
        RunConfig.from_toml(folder / "run.toml")


def manifest(data: DataObject) -> None:
    """Manifests of every version."""
    version = data.draw(st.sampled_from(["run_version_1", "run_version_2"]))
    content = spoilt_json(data, (_DATA / version / "manifest.json").read_bytes())
    with suppress(AlphasmithError, UnicodeDecodeError):
        text = content.decode()
        parse_manifest(text).to_json()
    with _scratch() as folder, suppress(AlphasmithError):
        (folder / "manifest.json").write_bytes(content)
        read_manifest(folder)


@cache
def _classifier() -> tuple[Path, Path]:
    folder = saved_classifier(_kept() / "classifier")
    return folder, pictures(_kept() / "pictures")


@cache
def _llama() -> tuple[Path, Path]:
    folder = saved_llama(_kept() / "llama")
    return folder, written_texts(_kept() / "texts.jsonl")


def model_folder(data: DataObject) -> None:
    """Model folders of two kinds, one file of them spoilt."""
    source, media = data.draw(st.sampled_from([_classifier, _llama]))()
    names = sorted(file.name for file in source.iterdir())
    name = data.draw(st.sampled_from([*names, *[n for n in names if n.endswith("config.json")] * 4]))
    with _scratch() as place, suppress(AlphasmithError):
        folder = shutil.copytree(source, place / "model")
        spoil = spoilt_json if name.endswith(".json") else spoilt_bytes
        (folder / name).write_bytes(spoil(data, (source / name).read_bytes()))
        task_of(folder, media, traced=True)


@cache
def _media() -> dict[str, bytes]:
    made: dict[str, bytes] = {}
    for name, kind in (
        ("png", "PNG"),
        ("jpg", "JPEG"),
        ("gif", "GIF"),
        ("bmp", "BMP"),
        ("tif", "TIFF"),
        ("webp", "WEBP"),
    ):
        stream = io.BytesIO()
        Image.linear_gradient("L").convert("RGB").resize((24, 20)).save(stream, format=kind)
        made[f"a.{name}"] = stream.getvalue()
    stream = io.BytesIO()
    Image.new("RGB", (9, 7), (1, 2, 3)).save(stream, format="PPM")
    made["a.ppm"] = stream.getvalue()
    file = saved_sound(_kept() / "a.wav")
    made["a.wav"] = file.read_bytes()
    wave, rate = soundfile.read(file)
    for name in ("flac", "ogg", "aiff"):
        soundfile.write(_kept() / f"a.{name}", wave, rate)
        made[f"a.{name}"] = (_kept() / f"a.{name}").read_bytes()
    with suppress(ImportError):
        for name in ("mp4", "mkv", "avi"):
            made[f"a.{name}"] = saved_film(_kept() / f"a.{name}").read_bytes()
    made["a.txt"] = ("words and more words, ünïcode. " * 20).encode()
    made["a.jsonl"] = "".join(json.dumps({"text": f"line {i} of words"}) + "\n" for i in range(8)).encode()
    talk = [
        {"messages": [{"role": "user", "content": f"word {i}"}, {"role": "assistant", "content": "x"}]}
        for i in range(8)
    ]
    made["talk.jsonl"] = "".join(json.dumps(line) + "\n" for line in talk).encode()
    made["a.csv"] = ("text,other\n" + "".join(f'"line {i}, of words",{i}\n' for i in range(8))).encode()
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [f"line {i}" for i in range(8)], "n": np.arange(8)}), sink)
    made["a.parquet"] = sink.getvalue()
    return made


def media(data: DataObject) -> None:
    """A media file of any kind, spoilt."""
    name = data.draw(st.sampled_from(sorted(_media())))
    spoilt = spoilt_bytes(data, _media()[name])
    if name.endswith("jsonl") and data.draw(st.booleans()):
        lines = _media()[name].splitlines()
        spoilt = b"\n".join([*lines[:3], spoilt_json(data, lines[3]), *lines[4:]])
    texts = name.endswith(("txt", "jsonl", "csv", "parquet"))
    with _scratch() as folder, suppress(AlphasmithError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (folder / name).write_bytes(spoilt)
        source = MediaSource(path=folder, samples=3, batch_size=2, frames=2, max_length=16)
        list(load_media(source, model_folder=_llama()[0] if texts else None))


def result(data: DataObject) -> None:
    """Output folders of a run whose files were spoilt together with their digests."""
    names = [
        "quantized/quantization.json",
        "quantized/model.safetensors",
        "smoothed/model.safetensors",
        "scales.safetensors",
    ]
    name = data.draw(st.sampled_from([names[0], *names]))
    with _scratch() as place, suppress(AlphasmithError):
        folder = shutil.copytree(_DATA / "run_version_2", place / "result")
        spoil = spoilt_json if name.endswith(".json") else spoilt_bytes
        (folder / name).write_bytes(spoil(data, (folder / name).read_bytes()))
        told = json.loads((folder / "manifest.json").read_text())
        for entry in told["artifacts"]:
            if entry["path"] == name:
                found = digest_file(folder / name)
                entry |= {"sha256": found.sha256, "bytes": found.bytes}
        (folder / "manifest.json").write_text(json.dumps(told))
        match name.partition("/")[0]:
            case "quantized":
                load_quantized(folder, seeded(Mlp))
            case "smoothed":
                load_smoothed(folder, seeded(Mlp))
            case _:
                undo(folder, place / "undone")


TARGETS: dict[str, Target] = {
    target.__name__: target for target in (configuration, manifest, model_folder, media, result)
}
