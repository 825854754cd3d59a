"""The stages of joint compression on trained models: what each finds and saves, and what speech loses.

    python -m benchmarks.joint_stages SHARED_DATA [--models dtln charlstm_shakespeare ...] [--energy 0.99] [--entries 32] [--out docs/joint.md]

SHARED_DATA is the folder with zoo.py; it is not part of this repository. No stage is followed by training here: the losses are those of
the bare stages, from which training starts.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor, nn

from alphasmith.objectives.joint.low_rank.factorization import LowRankSettings, factorize
from alphasmith.objectives.joint.low_rank.norms import fold_norms
from alphasmith.objectives.joint.metrics.scores import score
from alphasmith.objectives.joint.packed.packing import ClassClusters, PackedSettings, model_bytes, pack
from alphasmith.objectives.joint.packed.restoring import load_packed, restore
from alphasmith.objectives.joint.sparsity.targets import find_targets
from alphasmith.objectives.joint.sparsity.terms import SparsitySettings, sparsity_terms
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model.plain_operators import rewrite
from benchmarks.timing import machine, parser, publish, table

#: Folder -> shape of one example; of whole numbers where it is one long.
EXAMPLES = {
    "dtln": (1, 4096),
    "dtln_norm500h": (1, 4096),
    "charlstm_shakespeare": (8,),
    "kwt1": (1, 16000),
    "resnet8_cifar10": (1, 3, 32, 32),
    "resnet20_cifar10": (1, 3, 32, 32),
    "mobilenet_vww": (1, 3, 96, 96),
}
SPEECH_RATE = 16_000


def example(shape: tuple[int, ...]) -> Batch:
    """One batch in a model's layout."""
    generator = torch.Generator().manual_seed(0)
    if len(shape) == 1:
        return Batch(args=(torch.randint(0, 60, (2, *shape), generator=generator),))
    return Batch(args=(0.1 * torch.randn((2, *shape[1:]), generator=generator),))


def numbers(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def speech(data: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Noisy and clean clips."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for kind, clips in zip(("noisy", "clean"), found, strict=True):
        for file in sorted((data / "speech_pairs").glob(f"vctk_*_{kind}.wav")):
            clips.append(torch.from_numpy(soundfile.read(file, dtype="float32")[0]))
    return found


def heard(model: nn.Module, data: Path) -> str:
    """SI-SDR and STOI of enhanced speech, PESQ where it is installed."""
    noisy, clean = speech(data)
    with torch.no_grad():
        outputs = [model(clip.unsqueeze(0)).squeeze(0) for clip in noisy]
    told = [score(metric, outputs, clean, rate=SPEECH_RATE) for metric in ("si_sdr", "stoi", "pesq")]
    return ", ".join("not measured" if one.value is None else f"{one.value:.3f}" for one in told)


def row(name: str, model: nn.Module, data: Path, energy: float, entries: int) -> list[str]:
    """What the stages make of one model."""
    batch = example(EXAMPLES[name])
    targets = find_targets(model, batch)
    terms = sparsity_terms(model, targets, SparsitySettings())
    small = copy.deepcopy(model)
    rewrite(small)
    folded = fold_norms(small, batch)
    layers = factorize(small, LowRankSettings(energy=energy))
    before = model_bytes(model)
    clusters = ClassClusters(**dict.fromkeys(("conv", "recurrent", "linear", "embedding", "other"), entries))
    settings = PackedSettings(clusters=clusters)
    alone, both = pack(model, settings), pack(small, settings)
    coded = restore(model, alone)
    load_packed(small, both)
    found = [
        name,
        f"{len(targets.encoder)} + {len(targets.recurrent)}",
        f"{float(terms.first):.2e} + {float(terms.second):.2e}",
        f"{len(folded.rows)} + {len(folded.columns)}",
        f"{sum(layer.rank > 0 for layer in layers)} of {len(layers)}",
        f"{numbers(model) / numbers(small):.2f}x",
        f"{before / alone.stored_bytes:.2f}x",
        f"{before / both.stored_bytes:.2f}x",
    ]
    return [*found, *(heard(m, data) for m in (model, coded, small))] if "dtln" in name else [*found, "", "", ""]


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("data", type=Path, help="folder with zoo.py")
    made.add_argument("--models", nargs="+", default=list(EXAMPLES), help="folders of models")
    made.add_argument("--energy", type=float, default=0.99, help="share of the squared singular values kept")
    made.add_argument("--entries", type=int, default=32, help="entries of a table")
    given: argparse.Namespace = made.parse_args()
    where = machine()
    sys.path.insert(0, str(given.data))
    zoo: Any = importlib.import_module("zoo")
    rows = [
        row(name, zoo.load_model(str(given.data / name))[0], given.data, given.energy, given.entries)
        for name in given.models
    ]
    header = [
        "model", "norms, encoder + recurrent", "terms at 1e-4", "norms folded, rows + columns", "layers factored",
        "fewer numbers, low rank", "fewer bytes, codebook", "both", "speech, float", "codebook", "both",
    ]  # fmt: skip
    publish("JOINT_STAGES", f"{where}\n\n{table(header, rows)}", given.out)


if __name__ == "__main__":
    main()
