"""Tables of codebooks trained on text: bits per character of a character LSTM before and after.

    python -m benchmarks.joint_tuning SHARED_DATA [--entries 4 8 16 32] [--updates 150] [--out docs/joint.md]

SHARED_DATA is the folder with zoo.py; it is not part of this repository. The text is cut in three: the first part trains, the part before the
last judges whether the tables are kept, the last is looked at once.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphasmith.objectives.joint.packed.packing import ClassClusters, PackedSettings, model_bytes, pack
from alphasmith.objectives.joint.packed.restoring import restore
from alphasmith.objectives.joint.packed.tuning import TuningSettings, finetune_tables
from benchmarks.timing import machine, parser, publish, table, torch_threads

#: Sequences and characters of the test part, as the shared evaluation has them, and the characters that only warm the state up.
_ROWS, _LENGTH, _WARM = 64, 513, 64
#: Sequences and characters of an update.
_BATCH, _STEPS = 16, 129


def bits(model: nn.Module, rows: Tensor, *, warm: int = _WARM) -> Tensor:
    """Bits per character of (B, L) characters."""
    logits = model(rows[:, :-1])[0][:, warm:]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1 + warm :].flatten()) / math.log(2)


def measured(model: nn.Module, rows: Tensor) -> float:
    """The same as a number, without gradients."""
    with torch.no_grad():
        return float(bits(model, rows))


def update_loss(text: Tensor, model: nn.Module, step: int) -> Tensor:
    """Loss of one update on sequences drawn for it."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, text.numel() - _STEPS, (_BATCH,), generator=generator).tolist()
    return bits(model, torch.stack([text[start : start + _STEPS] for start in starts]), warm=0)


def row(model: nn.Module, ids: Tensor, k: int, updates: int) -> list[str]:
    """One number of entries."""
    size = _ROWS * _LENGTH
    test, study, train = ids[-size:].view(_ROWS, -1), ids[-2 * size : -size].view(_ROWS, -1), ids[: -2 * size]
    clusters = ClassClusters(**dict.fromkeys(("conv", "recurrent", "linear", "embedding", "other"), k))
    packed = pack(model, PackedSettings(clusters=clusters))
    found = finetune_tables(
        restore(model, packed),
        packed,
        functools.partial(update_loss, train),
        TuningSettings(steps=updates),
        judge=lambda one: -measured(one, study),
    )
    values = [measured(one, test) for one in (model, restore(model, packed), restore(model, found.packed))]
    ratio = model_bytes(model) / found.packed.stored_bytes
    return [str(k), f"{ratio:.2f}x", *(f"{value:.3f}" for value in values), "yes" if found.kept else "no"]


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("data", type=Path, help="folder with zoo.py")
    made.add_argument("--entries", type=int, nargs="+", default=[4, 8, 16, 32], help="entries of a table")
    made.add_argument("--updates", type=int, default=150, help="updates of the tables")
    given: argparse.Namespace = made.parse_args()
    where = machine()
    sys.path.insert(0, str(given.data))
    zoo: Any = importlib.import_module("zoo")
    folder = given.data / "charlstm_shakespeare"
    model = zoo.load_model(str(folder))[0].eval()
    characters = json.loads((folder / "config.json").read_text())["char_to_id"]
    text = (given.data / "texts" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    ids = torch.tensor([characters[one] for one in text if one in characters])
    with torch_threads(1):
        rows = [row(model, ids, k, given.updates) for k in given.entries]
    header = ["K", "fewer bytes", "float [bit]", "packed [bit]", f"{given.updates} updates [bit]", "kept"]
    publish("JOINT_TUNING", f"{where}\n\n{table(header, rows)}", given.out)


if __name__ == "__main__":
    main()
