"""Integer models of small runs, one for each kind of media."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.hostile_files import saved_classifier
from tests.support.processed import (
    saved_reader,
    saved_watcher,
    sounds,
    spotted_pictures,
    tone_classifier,
    written_videos,
)
from tests.support.run_cases import launch, result_of_folder, saved_llama, written_texts
from tests.support.writers import save_tokenizer, t5


@pytest.fixture(scope="session")
def image_result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a vision transformer of three classes."""
    folder = tmp_path_factory.mktemp("image")
    return result_of_folder(folder, saved_classifier(folder / "model"), spotted_pictures(folder / "data", 24))


@pytest.fixture(scope="session")
def text_result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a BERT of three named classes that reads letters."""
    folder = tmp_path_factory.mktemp("text")
    return result_of_folder(folder, saved_reader(folder / "model"), written_texts(folder / "texts.jsonl"))


@pytest.fixture(scope="session")
def writer_result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a language model that writes letters."""
    folder = tmp_path_factory.mktemp("writer")
    model = saved_llama(folder / "model")
    settings_of_tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    settings_of_tokenizer["chat_template"] = "{% for m in messages %}{{ m.content }}.{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings_of_tokenizer))
    return result_of_folder(folder, model, written_texts(folder / "texts.jsonl"))


@pytest.fixture(scope="session")
def mute_result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a language model whose generation_config.json says that any token ends a text."""
    folder = tmp_path_factory.mktemp("mute")
    model = saved_llama(folder / "model")
    place = model / "generation_config.json"
    told = json.loads(place.read_text()) if place.is_file() else {}
    tokens = json.loads((model / "config.json").read_text())["vocab_size"]
    place.write_text(json.dumps({**told, "eos_token_id": list(range(tokens))}))
    return result_of_folder(folder, model, written_texts(folder / "texts.jsonl"))


@pytest.fixture(scope="session")
def translator_result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a T5 that writes bytes after bytes."""
    folder = tmp_path_factory.mktemp("translator")
    model: Any = t5()
    model.save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    pairs = [{"text": f"row {i} of {7 * i} groups", "target": f"{i} in {7 * i}"} for i in range(24)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return result_of_folder(folder, folder / "model", folder / "texts.jsonl", label="target")


@pytest.fixture(scope="session")
def video_result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a video transformer of two named classes."""
    folder = tmp_path_factory.mktemp("video")
    return result_of_folder(folder, saved_watcher(folder / "model"), written_videos(folder / "clips"))


@pytest.fixture(scope="session")
def sound_result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a convolutional model of sound that a script handed over."""
    folder = tmp_path_factory.mktemp("sound")
    few = {"search": {"trials": 4}, "data": {"samples": 16, "held_out": 6, "proof": 2}}
    return launch(folder, tone_classifier(), sounds(), few).folder
