"""Reading a Hugging Face folder: what must be there, what is refused, and which class loads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError  # transformers checks configurations with it
from safetensors import SafetensorError, safe_open
from torch import nn

from alphasmith.objectives.errors import InputError

_SHOWN = 5
#: What transformers raises on a folder it cannot use.
_LOADING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    ImportError,
    AttributeError,
    SafetensorError,
    StrictDataclassError,
)


def read_folder(path: Path, *, trust_remote_code: bool, dtype: torch.dtype) -> tuple[nn.Module, tuple[str, ...]]:
    """Load the model of a folder with ``config.json`` and safetensors.

    Args:
        path: The folder.
        trust_remote_code: Run Python code that lies in the folder.
        dtype: Floating type of the parameters.

    Returns:
        The model, and the tensors of the checkpoint that it has no place for.

    Raises:
        InputError: As ``load_model`` for folders.
    """
    content = _read_config(path, trust_remote_code)
    _check_files(_weight_files(path))
    return _from_pretrained(path, content, trust_remote_code, dtype)


def build_architecture(path: Path) -> nn.Module:
    """The model that a folder's ``config.json`` describes, with random weights; the global generator is left as it was.

    Args:
        path: Folder with ``config.json``.

    Raises:
        InputError: No readable configuration, remote code, or an unknown architecture.
    """
    from transformers import AutoConfig

    loader = _architecture(path, _read_config(path, trust_remote_code=False))
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            model: nn.Module = loader.from_config(config) if hasattr(loader, "from_config") else loader(config)
    except _LOADING_ERRORS as error:
        raise _unloadable(path, error) from error
    return model


def save_folder(model: nn.Module, folder: Path) -> None:
    """Write a transformers model as a Hugging Face folder, silently.

    Args:
        model: Has a ``save_pretrained`` of its own.
        folder: Exists.
    """
    save: Any = model.save_pretrained
    with quiet_transformers():
        save(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # written through a private temporary file; a checkpoint is for others to read


def shorten_names(names: list[str]) -> str:
    """The first few of many names, for one line of text."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _read_config(path: Path, trust_remote_code: bool) -> dict[str, Any]:
    if not path.is_dir():
        problem = "is a file, not a folder" if path.exists() else "does not exist"
        raise InputError("model.path", f"{path} {problem}", "give a folder with config.json and *.safetensors")
    file = path / "config.json"
    if not file.is_file():
        raise InputError("model.path", f"{path} has no config.json", "give a Hugging Face folder, or use a factory")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("model.path", f"{file} is not readable JSON ({error})", "repair it") from error
    if not isinstance(content, dict):
        raise InputError("model.path", f"{file} holds no JSON object", "repair it")
    if content.get("auto_map") and not trust_remote_code:
        raise InputError(
            "model.trust_remote_code",
            f"{file} asks to run code of the folder (auto_map)",
            "set it to true if you trust that code, or remove auto_map if transformers itself has the architecture",
        )
    if not content.get("model_type") and not content.get("auto_map"):
        raise InputError(
            "model.path",
            f"{file} has no model_type",
            "give a transformers model, or load it with --factory module:function",
        )
    if content.get("quantization_config"):
        raise InputError("model.path", f"{path} is already quantized", "give the float checkpoint it was made from")
    return content


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError("model.path", f"{index} is not a readable shard index ({error})", "repair it") from error
        missing = [name for name in shards if not (path / name).is_file()]
        if missing:
            raise InputError("model.path", f"{path} lacks shards {shorten_names(missing)}", "copy the whole checkpoint")
        return [path / name for name in shards]
    others = sorted(path.glob("*.safetensors"))
    if others:
        raise InputError(
            "model.path",
            f"{path} has {others[0].name} but no model.safetensors and no model.safetensors.index.json",
            "rename the file to model.safetensors, or add the index of the shards",
        )
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise InputError(
            "model.path",
            f"{path} is a pickle-only checkpoint",
            "convert it: load it where you trust it and call save_pretrained(..., safe_serialization=True)",
        )
    raise InputError("model.path", f"{path} has no safetensors", "give a folder with *.safetensors")


def _check_files(files: list[Path]) -> None:
    """Opening reads the header and compares it with the length of the file: a cut-off shard is named here."""
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError("model.path", f"{file} is damaged ({error})", "copy or download it again") from error


def _from_pretrained(
    path: Path, content: Mapping[str, Any], trust_remote_code: bool, dtype: torch.dtype
) -> tuple[nn.Module, tuple[str, ...]]:
    loader = _architecture(path, content)
    try:
        with quiet_transformers():
            model, info = loader.from_pretrained(
                path,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                dtype=dtype,
                attn_implementation="eager",
                output_loading_info=True,
            )
    except _LOADING_ERRORS as error:
        raise _unloadable(path, error) from error
    lost = sorted(info.get("missing_keys", ()))
    if lost:
        raise InputError(
            "model.path",
            f"the checkpoint lacks {shorten_names(lost)}, which would be random",
            "give the complete checkpoint, or set architectures in config.json to the class it was saved from",
        )
    return model, tuple(sorted(info.get("unexpected_keys", ())))


def _unloadable(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError("model.path", f"{path} cannot be loaded ({reason[:300]})", "check config.json and weights")


def _architecture(path: Path, content: Mapping[str, Any]) -> Any:
    """Class to load with: the one named in ``architectures``, the auto class of remote code, else ``AutoModel``."""
    import transformers

    auto_map = content.get("auto_map")
    if isinstance(auto_map, Mapping):
        names = [name for name in auto_map if name.startswith("AutoModel") and hasattr(transformers, name)]
        if names:
            return getattr(transformers, names[-1])
    declared = content.get("architectures") or ["AutoModel"]
    found = getattr(transformers, str(declared[0]), None)
    if found is None or not hasattr(found, "from_pretrained"):
        raise InputError(
            "model.path",
            f"transformers {transformers.__version__} has no architecture {declared[0]} ({path.name}/config.json)",
            "update transformers, or load the model with --factory module:function",
        )
    return found


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and reports of transformers: what they say is checked, or returned, here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
