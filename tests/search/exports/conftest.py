"""Small results of language models, one for each scheme, and what reads their exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from alphasmith.objectives.quantization.scheme import Scheme
from tests.support.processed import saved_reader
from tests.support.run_cases import result_of_folder, saved_llama, written_texts

#: No division at run time, and nothing searched beyond the sites: what an export holds is what counts here.
PLAIN = {"search": {"trials": 4, "refine": False, "shift": ["none"]}, "sites": {"explicit": "never"}}


@pytest.fixture(scope="session")
def result_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Output folder of a run of a small LLaMA with a scheme, made when it is first asked for."""

    @cache
    def made(scheme: str) -> Path:
        folder = tmp_path_factory.mktemp(scheme)
        model = saved_llama(folder / "model")
        (model / "LICENSE").write_text("As you like.\n")
        (model / "README.md").write_text("---\nlicense: mit\n---\n# A small model\n")
        fields = {name: value for name, value in asdict(Scheme.parse(scheme)).items() if value is not None}
        return result_of_folder(folder, model, written_texts(folder / "texts.jsonl"), {**PLAIN, "scheme": fields})

    return made


@pytest.fixture(scope="session")
def explicit_result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a BERT, whose second matrix of each MLP follows a GELU and is divided at run time."""
    folder = tmp_path_factory.mktemp("explicit")
    model = saved_reader(folder / "model")
    weights = load_file(model / "model.safetensors")
    weights["bert.encoder.layer.0.intermediate.dense.weight"][:2] *= 40  # loud channels after the GELU
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    values = {"search": {"trials": 4, "refine": False, "guard": "site", "shift": ["none"]}}
    return result_of_folder(folder, model, written_texts(folder / "texts.jsonl"), values)
