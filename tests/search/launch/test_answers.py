"""Models that classify or write, run from folders alone: their metric comes from what the data say, or from the model itself."""

from __future__ import annotations

import copy
import difflib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.search import RunResult, load_quantized, run
from alphasmith.search.cli.main import app
from alphasmith.search.inputs.preparation import survey
from alphasmith.search.inputs.task import Task, load_task
from alphasmith.search.interruption import Interrupted
from tests.support.run_cases import settings
from tests.support.writers import save_tokenizer, save_whisper, write_clips

#: Folder of Whisper tiny.en and folder of clips, joined as in PATH.
WHISPER = os.environ.get("ALPHASMITH_TEST_WHISPER", "")
CLASSES = ("cat", "dog", "owl")
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "id2label": dict(enumerate(CLASSES)),
    "label2id": {name: number for number, name in enumerate(CLASSES)},
}


def saved(kind: Any, config: Any, folder: Path) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
    model.save_pretrained(folder)
    return model  # type: ignore[no-any-return]


def task_of(folder: Path, data: Path, **values: Any) -> Task:
    counts = {"samples": 24, "held_out": 12, "proof": 4}
    return load_task(
        settings(folder, {"model": {"path": folder / "model"}, "data": {"path": data, **counts, **values}})
    )


def expected(task: Task) -> float:
    """Share of held-out samples that the float model answers rightly, one at a time."""
    right = []
    for batch in task.held_out:
        for i in range(batch.size):
            one = batch.narrow(i, i + 1)
            with torch.no_grad():
                scores = task.loaded.model(**one.kwargs).logits
            assert one.labels is not None
            right.append(bool(scores.argmax() == one.labels[0]))
    return sum(right) / len(right)


def image_folder(folder: Path) -> Path:
    """Pictures of one colour in a folder a class, whose names differ from the model's in case."""
    for number in range(48):
        file = folder / CLASSES[number % 3].upper() / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        colour = np.random.default_rng(number).integers(0, 255, 3, np.uint8)
        Image.fromarray(np.broadcast_to(colour, (8, 8, 3)).copy()).save(file)
    return folder


def image_model(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    saved(ViTForImageClassification, ViTConfig(**SMALL, image_size=8, patch_size=4), folder / "model")


def test_accuracy_of_an_image_classifier_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_model(tmp_path)
    image_folder(tmp_path / "pictures")
    sets = [
        "data.samples=24",
        "data.tuning=0",
        "data.held_out=12",
        "data.proof=4",
        "search.trials=4",
        "search.refine=false",
        "search.rows=32",
    ]
    flags = [part for value in sets for part in ("--set", value)]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["run", "--model", "model", "--data", "pictures", "--out", "out", *flags])
    assert done.exit_code == 0, done.output
    assert "accuracy (higher is" in " ".join(done.stdout.split())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    task = task_of(tmp_path, tmp_path / "pictures")
    (metric,) = manifest["output"]["metrics"]
    assert metric["name"] == "accuracy"
    assert metric["float"] == pytest.approx(expected(task))
    assert "accuracy" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_accuracy_of_a_text_classifier(ending: str, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**SMALL, vocab_size=300, max_position_embeddings=32)
    saved(BertForSequenceClassification, config, tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    rows = [{"text": f"text {i} of {'many ' * (i % 3)}", "label": CLASSES[i % 3]} for i in range(40)]
    import pandas as pd

    file = tmp_path / f"data.{ending}"
    frame = pd.DataFrame(rows)
    if ending == "csv":
        frame.to_csv(file, index=False)
    elif ending == "parquet":
        frame.assign(label=[i % 3 for i in range(40)]).to_parquet(file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    task = task_of(tmp_path, file)
    assert task.metric is not None
    assert (task.metric.name, task.metric.higher_is_better) == ("accuracy", True)
    assert task.metric.score(task.loaded.model) == pytest.approx(expected(task))
    assert {int(i) for b in task.held_out for i in torch.as_tensor(b.labels)} == {0, 1, 2}
    assert task_of(tmp_path, file, label="none").metric is None
    frame.assign(label="bird").to_json(tmp_path / "other.jsonl", orient="records", lines=True)
    with pytest.raises(InputError, match="'bird' is no label of the model"):
        task_of(tmp_path, tmp_path / "other.jsonl")


def test_accuracy_of_an_audio_classifier(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(**SMALL, conv_dim=(8,), conv_kernel=(10,), conv_stride=(40,), num_feat_extract_layers=1,
                            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=10)  # fmt: skip
    saved(Wav2Vec2ForSequenceClassification, config, tmp_path / "model")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "model")
    for number, file in enumerate(write_clips(tmp_path / "clips", 12)):
        folder = tmp_path / "clips" / CLASSES[number % 3]
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    task = task_of(tmp_path, tmp_path / "clips")
    assert task.metric is not None
    assert task.metric.name == "accuracy"
    assert task.metric.score(task.loaded.model) == pytest.approx(expected(task))


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, RunResult]:
    """A run of a tiny Whisper on clips without texts."""
    folder = tmp_path_factory.mktemp("speech")
    (folder / "model").mkdir()
    model = save_whisper(folder / "model")
    write_clips(folder / "clips")
    values = {
        "model": {"path": folder / "model"},
        "data": {"path": folder / "clips", "samples": 8, "held_out": 6, "proof": 2},
    }
    return folder, model, run(settings(folder, values))


def test_a_model_that_writes_is_judged_on_all_it_writes(speech: tuple[Path, nn.Module, RunResult]) -> None:
    folder, model, result = speech
    (metric,) = result.manifest.output.metrics
    assert metric.name == "perplexity"
    config = settings(
        folder,
        {
            "model": {"path": folder / "model"},
            "data": {"path": folder / "clips", "samples": 8, "held_out": 6, "proof": 2},
        },
    )
    task = load_task(config)
    assert any("what the model itself writes" in note for note in task.notes)
    found = survey(config, task)
    # The decoder's sites have seen as many rows as it has written tokens.
    tokens = sum(batch.kwargs["decoder_input_ids"].numel() for batch in task.calibration)
    assert tokens > 3 * sum(batch.size for batch in task.calibration)
    assert any("decoder" in site.name for site in found.sites)
    quantized: Any = load_quantized(result.folder, model)
    read = task.held_out[0]
    with torch.no_grad():
        own, other = (m(**read.kwargs).logits.argmax(-1) for m in (model, quantized))
    assert float((own == other).double().mean()) > 0.5


def test_a_model_that_writes_can_be_stopped(speech: tuple[Path, nn.Module, RunResult], tmp_path: Path) -> None:
    folder, _, _ = speech
    values = {
        "model": {"path": folder / "model"},
        "data": {"path": folder / "clips", "samples": 8, "held_out": 6, "proof": 2},
    }
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return True

    with pytest.raises(Interrupted, match="before the search"):
        run(settings(tmp_path, values), stop=stop)
    assert len(asked) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_what_it_cannot_know(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model: Any = save_whisper(tmp_path / "model")
    model.model.save_pretrained(tmp_path / "model")
    write_clips(tmp_path / "clips", 4)
    with pytest.raises(InputError, match="no head that writes"):
        task_of(tmp_path, tmp_path / "clips")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not WHISPER, reason="ALPHASMITH_TEST_WHISPER names no folder of Whisper tiny.en and no folder of clips"
)
def test_whisper_still_writes_what_it_hears(tmp_path: Path) -> None:
    """Words of clips, greedily written with a cache as people use it: few may differ from the float model's."""
    import soundfile
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    model_folder, clips = map(Path, WHISPER.split(os.pathsep))
    values = {"model": {"path": model_folder}, "data": {"path": clips}, "search": {"trials": 8, "rows": 1024}}
    result = run(settings(tmp_path, values))
    (metric,) = result.manifest.output.metrics
    assert metric.ours is not None
    assert metric.float_model is not None
    assert metric.ours < 1.05 * metric.float_model
    model: Any = WhisperForConditionalGeneration.from_pretrained(model_folder, attn_implementation="eager").eval()
    extractor = WhisperFeatureExtractor.from_pretrained(model_folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    quantized: Any = load_quantized(result.folder, copy.deepcopy(model))
    total = changed = 0
    for file in sorted(clips.glob("*.wav")):
        wave, rate = soundfile.read(file, dtype="float32")
        features = extractor(wave, sampling_rate=rate, return_tensors="pt").input_features
        said = [tokenizer.decode(m.generate(features, max_new_tokens=64)[0]).split() for m in (model, quantized)]
        parts = difflib.SequenceMatcher(a=said[0], b=said[1], autojunk=False).get_opcodes()
        changed += sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in parts if kind != "equal")
        total += len(said[0])
    assert total > 100
    assert changed < 0.15 * total
