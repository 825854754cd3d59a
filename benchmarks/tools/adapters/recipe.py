"""Runs a recipe as it stands, and asks what it made for the logits of some token ids.

    python recipe.py SCRIPT IDS REPLY

``IDS`` holds ``ids`` (B, L) int64, ``REPLY`` gets ``logits`` (B, L, V), or (B, K) of a classifier, both as safetensors. It runs in the tool's
environment, in the folder that the recipe was written in, and imports nothing of ours.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def logits(made: dict[str, Any], ids: Tensor) -> Tensor:
    """What the model of a recipe answers.

    Args:
        made: What the script left behind.
        ids: (B, L) int64.
    """
    model = made.get("quantized", made.get("model"))
    if model is None:
        return _converted(made["OUT"], ids)
    with torch.no_grad():
        answer = model(ids)
    found: Tensor = answer.logits if hasattr(answer, "logits") else answer[0]
    return found


def _converted(folder: Path, ids: Tensor) -> Tensor:
    """The answer of a model of CTranslate2, which runs from its folder."""
    import ctranslate2
    import numpy as np

    generator = ctranslate2.Generator(str(folder), compute_type="int8_float32", device="cpu", intra_threads=1)
    lengths = ctranslate2.StorageView.from_array(np.full(len(ids), ids.shape[1], dtype=np.int32))
    answer = generator.forward_batch(ctranslate2.StorageView.from_array(ids.numpy().astype(np.int32)), lengths)
    return torch.from_numpy(np.array(answer))


def main(script: str, ids: str, reply: str) -> None:
    """Run and ask."""
    torch.set_num_threads(1)
    answer = logits(runpy.run_path(script), load_file(ids)["ids"])
    save_file({"logits": answer.float().contiguous()}, reply)


if __name__ == "__main__":
    main(*sys.argv[1:])
