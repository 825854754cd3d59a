"""A checkpoint as one safetensors file, or as shards with an index, named as Hugging Face folders name them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from alphasmith.storage.output.output_folder import OutputFolder

#: Names of a checkpoint's weights, in one file or in shards that the index lists.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Largest file of a checkpoint that came in one piece or from Python [bytes].
SHARD = 5 * 10**9


def shard_bytes(source: Path | None) -> int:
    """How large the files of a checkpoint may be: as large as those that it was made from.

    Args:
        source: The folder that it was loaded from; None: there is none.
    """
    if source is None:
        return SHARD
    if (source / SINGLE).is_file():
        return max(SHARD, (source / SINGLE).stat().st_size)
    sizes = [file.stat().st_size for file in source.glob("*.safetensors")] if (source / INDEX).is_file() else []
    return max(sizes, default=SHARD)


def write_checkpoint(
    folder: OutputFolder,
    below: str,
    tensors: Mapping[str, Tensor],
    *,
    types: Mapping[str, torch.dtype],
    most: int = SHARD,
) -> None:
    """Write a checkpoint, one file after the other.

    Args:
        folder: The output folder.
        below: The checkpoint's folder in it; empty: the output folder itself.
        tensors: By name; tied ones once.
        types: Name -> type that a tensor is written in; the others as they are.
        most: Bytes per file; a larger tensor has one of its own.

    Raises:
        InputError: As ``OutputFolder.write_tensors``.
    """
    inside = f"{below}/" if below else ""
    sizes = {name: value.numel() * types.get(name, value.dtype).itemsize for name, value in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        if shards[-1] and filled + sizes[name] > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name]
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        cast = {name: tensors[name].to(types.get(name, tensors[name].dtype)) for name in names}
        folder.write_tensors(f"{inside}{file}", cast, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        folder.write_json(f"{inside}{INDEX}", index)
