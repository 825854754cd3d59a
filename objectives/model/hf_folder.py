"""Reading a Hugging Face folder: what must be there, what is refused, and which class loads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.reading import is_regular, read_object, refusing, usable_path
from alphasmith.objectives.stored_types import cast_to
from alphasmith.objectives.text import listed

#: What transformers reads of a folder beside the weights; each holds an object.
_JSON_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "adapter_config.json",
)
#: Numbers of a configuration that say how many modules are made, before any weight is looked at, and the most of them.
_COUNTS = ("layers", "blocks", "depth", "depths", "experts", "stages", "layer")
_MOST_COUNT = 100_000


def read_folder(path: Path, *, trust_remote_code: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """Load the model of a folder with ``config.json`` and safetensors.

    Args:
        path: The folder.
        trust_remote_code: Run Python code that lies in the folder.

    Returns:
        The model, and the tensors of the checkpoint that it has no place for.

    Raises:
        InputError: As ``load_model`` for folders.
    """
    content = _read_config(path, trust_remote_code)
    _check_files(weight_files(path))
    return _from_pretrained(path, content, trust_remote_code)


def build_architecture(path: Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that a folder's ``config.json`` describes, with random weights; the global generator is left as it was.

    Args:
        path: Folder with ``config.json``.
        dtype: The type that the configuration then tells; None: that of the folder.

    Raises:
        InputError: No readable configuration, remote code, or an unknown architecture.
    """
    from transformers import AutoConfig

    loader = _architecture(path, _read_config(path, trust_remote_code=False))
    with _loading(path), quiet_transformers(), torch.random.fork_rng(devices=[]):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if dtype is not None:
            config.dtype = dtype
        model: nn.Module = loader.from_config(config) if hasattr(loader, "from_config") else loader(config)
        if not isinstance(model, nn.Module):
            raise TypeError(f"{loader.__name__} makes a {type(model).__name__}, no model")
    return model


def empty_architecture(path: Path) -> nn.Module:
    """The model that a folder's ``config.json`` describes, on the device ``meta``: its modules and shapes, without memory.

    Args:
        path: Folder with ``config.json``.

    Raises:
        InputError: As :func:`build_architecture`.
    """
    with torch.device("meta"):
        return build_architecture(path)


def unloaded_architecture(path: Path) -> nn.Module:
    """The same with its buffers, which no checkpoint holds, as they should be: only parameters are on the device ``meta``.

    Args:
        path: Folder with ``config.json``.

    Raises:
        InputError: As :func:`build_architecture`.
    """

    def emptied(_: nn.Module, __: str, parameter: nn.Parameter) -> nn.Parameter | None:
        # A tied one comes twice, and must stay the same object.
        return None if parameter.is_meta else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    # What the hook returns is registered in the parameter's place; its annotation says None.
    handle = register_module_parameter_registration_hook(cast("Callable[..., None]", emptied))
    try:
        return build_architecture(path, dtype=torch.float32)
    finally:
        handle.remove()


def architecture_names(model: nn.Module) -> frozenset[str]:
    """Names of the tensors of a fresh model of the same class and configuration, without its memory.

    Args:
        model: A transformers model.
    """
    made: Any = type(model)
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        return frozenset(made(model.config).state_dict())


def save_folder(model: nn.Module, folder: Path, *, types: Mapping[str, torch.dtype], most: int) -> None:
    """Write a transformers model as a Hugging Face folder, silently.

    Args:
        model: Has its own ``save_pretrained``. Its tensors get their types, in place.
        folder: Exists.
        types: Name of a tensor -> type that it is written in; the others as they are.
        most: Bytes per file of weights; what is larger is written as shards with an index.
    """
    cast_to(model, types)
    save: Any = model.save_pretrained
    with quiet_transformers():
        save(folder, max_shard_size=most)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # written through a private temporary file; a checkpoint is for others to read


def _read_config(path: Path, trust_remote_code: bool) -> dict[str, Any]:
    usable_path("model.path", path)
    if not path.is_dir():
        problem = "is a file, not a folder" if path.exists() else "does not exist"
        raise InputError("model.path", f"{path} {problem}", "give a folder with config.json and *.safetensors")
    file = path / "config.json"
    if not is_regular(file):
        raise InputError("model.path", f"{path} has no config.json", "give a Hugging Face folder, or use a factory")
    content = read_object(file, field="model.path")
    for name in _JSON_FILES:
        if is_regular(path / name):  # transformers reads it, and says nothing of the file where it cannot
            read_object(path / name, field="model.path")
    _check_counts(file, content)
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


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder: one, or the shards of its index.

    Args:
        path: The folder.

    Raises:
        InputError: There are none, or not all.
    """
    index = path / "model.safetensors.index.json"
    if is_regular(path / "model.safetensors"):
        return [path / "model.safetensors"]
    if is_regular(index):
        shards = _shards(index)
        missing = [name for name in shards if not is_regular(path / name)]
        if missing:
            raise InputError("model.path", f"{path} lacks shards {listed(missing)}", "copy the whole checkpoint")
        return [path / name for name in shards]
    others = sorted(file for file in path.glob("*.safetensors") if is_regular(file))
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


def _shards(index: Path) -> list[str]:
    """Names of the files that an index of shards names, all of them beside it."""
    places = read_object(index, field="model.path").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(
            "model.path", f"{index} is no shard index: it has no weight_map of tensors to files", "repair it"
        )
    for tensor, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            told = f"{index} puts {tensor[:100]} into {str(name)[:100]!r}, which is no safetensors file beside it"
            raise InputError("model.path", told, "repair it")
    return sorted(set(places.values()))


def _check_counts(file: Path, content: Mapping[str, Any]) -> None:
    """Refuse a configuration of more modules than any model has: they would be made one by one."""
    for name, value in content.items():
        if isinstance(value, dict):
            _check_counts(file, value)
        for number in value if isinstance(value, list) else [value]:
            counts = name.rsplit("_", 1)[-1] in _COUNTS and isinstance(number, (int, float))
            if counts and not abs(number) <= _MOST_COUNT:
                raise InputError("model.path", f"{file}: {name} is {number}, more than {_MOST_COUNT}", "repair it")


def _check_files(files: list[Path]) -> None:
    """Opening reads the header and compares it with the length of the file: a cut-off shard is named here."""
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError("model.path", f"{file} is damaged ({error})", "copy or download it again") from error


def _from_pretrained(
    path: Path, content: Mapping[str, Any], trust_remote_code: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    loader = _architecture(path, content)
    with _loading(path), quiet_transformers():
        model, info = loader.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
        if not isinstance(model, nn.Module):
            raise TypeError(f"{loader.__name__} makes a {type(model).__name__}, no model")
    lost = sorted(info.get("missing_keys", ()))
    if lost:
        raise InputError(
            "model.path",
            f"the checkpoint lacks {listed(lost)}, which would be random",
            "give the complete checkpoint, or set architectures in config.json to the class it was saved from",
        )
    return model, tuple(sorted(info.get("unexpected_keys", ())))


def _loading(path: Path) -> AbstractContextManager[None]:
    """transformers at work on a folder: what it raises on one it cannot use is one line."""
    return refusing("model.path", f"{path} cannot be loaded", f"check {path / 'config.json'} and weights")


def _architecture(path: Path, content: Mapping[str, Any]) -> Any:
    """Class to load with: the one named in ``architectures``, the auto class of remote code, else ``AutoModel``."""
    import transformers

    auto_map = content.get("auto_map")
    if isinstance(auto_map, Mapping):
        names = [name for name in auto_map if name.startswith("AutoModel") and hasattr(transformers, name)]
        if names:
            return getattr(transformers, names[-1])
    declared = content.get("architectures") or ["AutoModel"]
    if not isinstance(declared, list) or not isinstance(declared[0], str):
        told = f"{path / 'config.json'}: architectures is a {type(declared).__name__}, not a list of class names"
        raise InputError("model.path", told, "repair it")
    found = getattr(transformers, declared[0], None)
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
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
