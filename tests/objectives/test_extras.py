"""One answer for every package that only some installations have."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.extras import MODULES, Extra, require_extra

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
EXTRAS = [pytest.param(extra, module, id=module) for extra, modules in MODULES.items() for module in modules]


@pytest.mark.parametrize(("extra", "module"), EXTRAS)
def test_one_missing_module_is_told_with_the_extra_that_brings_it(
    extra: Extra, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else object())
    told = f"field: {module} is not installed; pip install 'alphasmith[{extra}]'"
    with pytest.raises(InputError, match=f"^{re.escape(told)}$"):
        require_extra("field", extra)


@pytest.mark.parametrize("extra", get_args(Extra))
def test_what_is_installed_passes(extra: Extra, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def found(name: str) -> object:
        asked.append(name)
        return object()

    monkeypatch.setattr(importlib.util, "find_spec", found)
    require_extra("field", extra)
    assert asked == list(MODULES[extra])


def test_every_extra_is_one_that_pip_installs() -> None:
    offered = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(MODULES) <= set(offered)
    for extra, modules in MODULES.items():
        brought = {re.split(r"[\[>=<]", line)[0].replace("-", "_") for line in offered[extra]}
        # onnx_ir comes with onnxscript
        assert set(modules) - {"onnx_ir"} <= brought
