"""Models that write, exported in parts: ONNX Runtime writes a text step by step as our module reads it whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alphasmith.search import export, load_quantized
from alphasmith.search.exports.verification import verify_export
from tests.support.onnx_runtime import CLOSE, PLAIN, difference, numbers, session, simulate
from tests.support.run_cases import result_of_folder
from tests.support.writers import START, bart, save_tokenizer, save_whisper, t5, write_clips

pytest.importorskip("onnx", reason="needs pip install 'alphasmith[onnx]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'alphasmith[onnx]'")

LAYOUTS = ("ort-u8", "qdq")
PARTS = ["decoder.onnx", "decoder_with_past.onnx", "encoder.onnx"]


@pytest.fixture(scope="module")
def written_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Output folder of a run of a small model that writes."""

    @cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        (folder / "model").mkdir()
        if name == "whisper":
            save_whisper(folder / "model")
            write_clips(folder / "clips", 24)
            return result_of_folder(folder, folder / "model", folder / "clips", PLAIN)
        model: Any = {"t5": t5, "bart": bart}[name]()
        model.save_pretrained(folder / "model")
        save_tokenizer(folder / "model")
        pairs = [{"text": f"row {i} of {7 * i} groups", "target": f"{i} in {7 * i}"} for i in range(24)]
        (folder / "texts.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        return result_of_folder(folder, folder / "model", folder / "texts.jsonl", PLAIN, label="target")

    return made


SAMPLES = 8


def heard(name: str) -> dict[str, Tensor]:
    """What an encoder reads: texts are of several lengths."""
    generator = torch.Generator().manual_seed(8)
    if name == "whisper":
        return {"input_features": torch.randn(SAMPLES, 8, 100, generator=generator)}
    lengths = torch.arange(SAMPLES) + 4
    mask = (torch.arange(11) < lengths[:, None]).long()
    return {"input_ids": torch.randint(0, 256, (SAMPLES, 11), generator=generator), "attention_mask": mask}


def check(found: Any, expected: Tensor, mask: Tensor | None = None) -> None:
    """Equal but where a last bit of a float part moved a code by one, which reaches what is computed from it in its sample."""
    counted = torch.ones(expected.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    assert difference(np.asarray(found)[counted.numpy()], expected[counted]) < 0.05
    apart = torch.from_numpy(np.array(found)) - expected
    equal = apart.norm(dim=-1) <= CLOSE * expected.norm(dim=-1)
    assert float(equal[counted].double().mean()) > 0.25


def renamed(told: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Keys and values that one part returns, as the next one takes them."""
    found = {name.replace("present", "past", 1): value for name, value in told.items() if name.startswith("present")}
    return {name: value for name, value in found.items() if name in names}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param("whisper", "ort-u8", marks=pytest.mark.slow),
        pytest.param("whisper", "qdq", marks=pytest.mark.slow),
        pytest.param("t5", "ort-u8", marks=pytest.mark.slow),
        pytest.param("t5", "qdq", marks=pytest.mark.slow),
        pytest.param("bart", "ort-u8", marks=pytest.mark.slow),
        pytest.param("bart", "qdq", marks=pytest.mark.slow),
    ],
)
def test_a_text_is_written_step_by_step(
    written_by: Callable[[str], Path], name: str, layout: str, tmp_path: Path
) -> None:
    result = written_by(name)
    record = export(result, "onnx", tmp_path / "out", layout=layout).record
    assert sorted(entry.path for entry in record.artifacts if entry.path.endswith(".onnx")) == PARTS
    given = heard(name)
    ids = torch.randint(0, 256, (SAMPLES, 8), generator=torch.Generator().manual_seed(9))
    ids[:, 0] = START
    model: Any = simulate(load_quantized(result))
    with torch.no_grad():
        states = model.get_encoder()(**given).last_hidden_state
        expected = model(**given, decoder_input_ids=ids).logits
    parts = {file.removesuffix(".onnx"): session(tmp_path / "out" / file) for file in PARTS}
    taken = {stem: [value.name for value in opened.get_inputs()] for stem, opened in parts.items()}
    check(parts["encoder"].run(None, numbers(given))[0], states, given.get("attention_mask"))
    mask = {"encoder_attention_mask": given["attention_mask"].numpy()} if "attention_mask" in given else {}
    first = {"decoder_input_ids": ids[:, :3].numpy(), "encoder_hidden_states": states.numpy(), **mask}
    names = [value.name for value in parts["decoder"].get_outputs()]
    told = dict(zip(names, parts["decoder"].run(None, first), strict=True))
    logits, done = [told["logits"]], 3
    kept = renamed(told, taken["decoder_with_past"])
    cross = {key: value for key, value in kept.items() if key.startswith("past_cross")}
    assert cross
    names = [value.name for value in parts["decoder_with_past"].get_outputs()]
    for more in (1, 3, 1):
        step = {"decoder_input_ids": ids[:, done : done + more].numpy(), **kept, **mask}
        answer = parts["decoder_with_past"].run(None, step)
        told = dict(zip(names, answer, strict=True))
        logits.append(told["logits"])
        kept = {**renamed(told, taken["decoder_with_past"]), **cross}
        done += more
    assert done == ids.shape[1]
    check(np.concatenate(logits, 1), expected)
    assert verify_export(tmp_path / "out", run=result)["operators"] == len(record.operators)
