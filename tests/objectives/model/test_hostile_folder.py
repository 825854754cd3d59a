"""Model folders that nobody should have written: one line each, whatever transformers does on them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from alphasmith.objectives.errors import InputError
from tests.support.hostile_files import DEEP, Change, content, pictures, saved_classifier, settings, task_of


def sharded(index: str) -> Change:
    def change(model: Path) -> None:
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        (model / "model.safetensors.index.json").write_text(index)

    return change


def fifo(name: str) -> Change:
    def change(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return change


CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
SPOILT: dict[str, tuple[Change, str]] = {
    "shard is a number": (sharded('{"weight_map": {"a": 5}}'), "puts a into '5'"),
    "shard is null": (sharded('{"weight_map": {"a": null}}'), "puts a into"),
    "shard is elsewhere": (sharded('{"weight_map": {"a": "../x.safetensors"}}'), "beside it"),
    "shards are a list": (sharded('{"weight_map": ["a"]}'), "weight_map"),
    "shards are nested deep": (sharded(DEEP), "nested too deep"),
    "configuration nested deep": (content(CONFIG, DEEP), "nested too deep"),
    "configuration is a list": (content(CONFIG, "[1]"), "holds no JSON object"),
    "configuration is no UTF-8": (content(CONFIG, b'{"model_type": "\xff"}'), "not UTF-8"),
    "configuration holds half a pair": (content(CONFIG, r'{"model_type": "\ud800"}'), "surrogate"),
    "configuration waits": (fifo(CONFIG), "no config.json"),
    "weights wait": (fifo("model.safetensors"), "no safetensors"),
    "architectures is an object": (settings(CONFIG, architectures={"a": 1}), "not a list"),
    "architectures is a number": (settings(CONFIG, architectures=7), "not a list"),
    "architectures is a list of numbers": (settings(CONFIG, architectures=[7]), "not a list"),
    "architecture is no model": (settings(CONFIG, architectures=["AutoTokenizer"]), "cannot be loaded"),
    "architecture is a function": (settings(CONFIG, architectures=["pipeline"]), "no architecture"),
    "no heads": (settings(CONFIG, num_attention_heads=0), "ZeroDivisionError"),
    "no patches": (settings(CONFIG, patch_size=0), "ZeroDivisionError"),
    "words as sizes": (settings(CONFIG, hidden_size="big"), "cannot be loaded"),
    "billions of layers": (settings(CONFIG, num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "infinite layers": (settings(CONFIG, num_hidden_layers=float("inf")), "num_hidden_layers is inf"),
    "an unknown activation": (settings(CONFIG, hidden_act="boom"), "boom"),
    "generation settings nested deep": (content("generation_config.json", DEEP), "nested too deep"),
    "a tokenizer nested deep": (content("tokenizer.json", DEEP), "nested too deep"),
    "processor is a list": (content(PROCESSOR, "[1]"), "holds no JSON object"),
    "processor nested deep": (content(PROCESSOR, DEEP), "nested too deep"),
    "processor size is a word": (content(PROCESSOR, '{"size": "big"}'), "big"),
    "processor size is negative": (content(PROCESSOR, '{"size": -3}'), "-3"),
    "processor size is huge": (settings(PROCESSOR, size={"height": 10**9, "width": 8}), "height is 1000000000"),
    "processor size is infinite": (settings(PROCESSOR, size=float("inf")), "size is inf"),
    "processor mean is a word": (content(PROCESSOR, '{"image_mean": "grey"}'), "grey"),
    "processor deviation is zero": (content(PROCESSOR, '{"image_std": [0, 0, 0]}'), "image_std"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_classifier(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_folder_is_one_line(kind: str, model: Path, tmp_path: Path) -> None:
    change, words = SPOILT[kind]
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    with pytest.raises(InputError) as caught:
        task_of(folder, pictures(tmp_path / "images"))
    assert caught.value.field == "model.path"
    assert words in caught.value.problem
    assert folder.name in caught.value.problem or "processor" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_folder_as_it_is_works(model: Path, tmp_path: Path) -> None:
    assert task_of(model, pictures(tmp_path / "images")).loaded.kind == "hf"
    assert json.loads((model / CONFIG).read_text())["model_type"] == "vit"
