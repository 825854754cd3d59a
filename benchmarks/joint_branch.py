"""Smoothing, a low-rank branch and a quantized residual: alpha and rank together against either alone, at equal bytes.

    python -m benchmarks.joint_branch [--data SHARED_DATA] [--minilm FOLDER] [--models dtln kwt1 ...] [--out docs/joint.md]

First on synthetic tensors; then, with SHARED_DATA (the folder with zoo.py and zoo_eval.py, which are not part of this repository) or the
folder of a MiniLM, on their linear layers and gate matrices. Alpha and rank are chosen on rows of one half of the samples, and
every error is measured on rows of the other half.
"""

from __future__ import annotations

import argparse
import importlib
import math
import random
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.joint.branch.choice import ALPHAS, LayerErrors, Tried, choose_alpha_and_rank
from alphasmith.objectives.joint.branch.encoding import output_error
from alphasmith.objectives.joint.branch.layers import BranchModule
from alphasmith.objectives.joint.branch.placement import branch_layers
from alphasmith.objectives.joint.branch.rows import LayerRows, collect_rows
from alphasmith.objectives.joint.branch.settings import BranchSettings
from alphasmith.objectives.joint.branch.stored import stored_size
from alphasmith.objectives.joint.low_rank.decomposition import decompose
from alphasmith.objectives.joint.low_rank.factorization import LowRankSettings
from alphasmith.objectives.joint.low_rank.spectrum import fallback_layers
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model.plain_operators import rewrite
from alphasmith.objectives.text import matches
from benchmarks.timing import machine, parser, publish, table, torch_threads

MODELS = ("dtln", "kwt1", "charlstm_shakespeare", "stories260k_outlier")
#: Smallest weight that is studied [numbers]: below, scales and tables are most of what is stored.
LEAST = 4096
#: Rows kept of a layer, in either half.
ROWS = 512
#: Coefficients that are tried for real layers, where a candidate costs more.
FEW = (None, 0.1, 0.3, 0.5, 0.7, 0.9)
BOOK = BranchSettings(alpha=None, rank=0, residual="codebook", k=16)
CODES = replace(BOOK, residual="int4")
#: Rows of the synthetic table: what, and the settings but for alpha and activations.
VARIANTS = (
    ("int4", CODES),
    ("codebook 16", BOOK),
    ("codebook 32", replace(BOOK, k=32)),
    ("rank 8 + codebook 16", replace(BOOK, rank=8)),
    ("rank 8 + int4", replace(CODES, rank=8)),
    ("rank 8 + codebook 16, 4 refits", replace(BOOK, rank=8, refits=4)),
    ("codebook 64", replace(BOOK, k=64)),
    ("rank 16 + codebook 16", replace(BOOK, rank=16)),
)


def synthetic(seed: int, size: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, fitting rows, other rows): rank 24 and noise of a third of the energy; of the channels 90 % reach 10, 9 % 20 and 1 % 100."""
    generator = torch.Generator().manual_seed(seed)
    left, right, noise = (torch.randn(size, columns, generator=generator) for columns in (24, 24, size))
    weight = left @ right.t() / 24**0.5 + 0.7 * noise
    few, some = round(0.01 * size), round(0.09 * size)
    low = torch.cat([torch.full((few,), 91.0), torch.full((some,), 10.0), torch.zeros(size - few - some)])
    width = torch.cat([torch.full((few,), 9.0), torch.full((size - few,), 10.0)])
    reach = (low + width * torch.rand(size, generator=generator))[torch.randperm(size, generator=generator)]
    rows = torch.randn(2 * ROWS, size, generator=generator) / 3 * reach
    return weight, rows[:ROWS], rows[ROWS:]


def judged(errors: LayerErrors, settings: BranchSettings, weight: Tensor, others: Tensor | LayerRows) -> float:
    """Relative error of the output on other rows, as a ratio of sizes (the root of formula fA5)."""
    return math.sqrt(output_error(errors.encode(settings), weight, others))


def toy_rows(seeds: int) -> list[list[str]]:
    """A row a variant: errors without smoothing and with the alpha that is best on fitting rows, for 8 and 4 bits of activations."""
    tensors = [synthetic(seed) for seed in range(seeds)]
    measured = [LayerErrors(weight, rows) for weight, rows, _ in tensors]
    found = []
    for name, variant in VARIANTS:
        line = [f"{8 * stored_size((256, 256), replace(variant, activation_bits=8)) / 256**2:.2f}", name]
        for bits in (8, 4):
            plain, smoothed, alphas = [], [], []
            for (weight, _, others), errors in zip(tensors, measured, strict=True):
                base = replace(variant, activation_bits=bits)
                tried = [errors.error(replace(base, alpha=alpha)) for alpha in ALPHAS if alpha is not None]
                best = min(tried, key=lambda one: math.inf if one.error is None else one.error).settings
                plain.append(judged(errors, base, weight, others))
                smoothed.append(judged(errors, best, weight, others))
                alphas.append(best.alphas[0])
            line += [spread(plain), f"{spread(smoothed)} ({min(alphas):g} to {max(alphas):g})"]
        found.append(line)
    for rank in (8, 16, 32):
        lost = []
        for weight, _, others in tensors:
            made = decompose(weight, rank=rank)
            wanted = others @ weight.t()
            lost.append(float((others @ (made.left @ made.right).t() - wanted).norm() / wanted.norm()))
        found.append(
            [f"{16 * 2 * rank / 256:.2f}", f"truncation to rank {rank}, float activations", spread(lost), "", "", ""]
        )
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


@dataclass(frozen=True)
class Arms:
    """Errors of one layer on other rows under what each way chose, and the joint choice."""

    plain: float
    alpha: float
    rank: float
    after: float
    joint: float
    chosen: BranchSettings


def arms(weight: Tensor, rows: LayerRows, others: LayerRows, bits: Any, name: str) -> Arms:
    """Alpha alone, rank alone, rank after alpha, and both together, all within the bytes of a smoothed codebook of 32 entries."""
    residuals = [replace(one, activation_bits=bits) for one in (replace(BOOK, k=32), BOOK, CODES)]
    budget = stored_size(weight.shape, replace(residuals[0], alpha=0.5))
    errors = LayerErrors(weight, rows, name=name)

    def best(**limits: Any) -> Tried:
        given = {"alphas": FEW, **limits}
        return choose_alpha_and_rank(weight, rows, budget, residuals, errors=errors, name=name, **given).best

    alone = best(ranks=[0])
    ways = {
        "plain": best(alphas=[None], ranks=[0]),
        "alpha": alone,
        "rank": best(alphas=[None]),
        "after": best(alphas=[alone.settings.alpha]),
        "joint": best(),
    }
    return Arms(
        **{way: judged(errors, one.settings, weight, others) for way, one in ways.items()},
        chosen=ways["joint"].settings,
    )


def halves(batches: Iterable[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Samples of even and of odd number."""
    samples = [batch.narrow(i, i + 1) for batch in batches for i in range(batch.size)]
    return samples[::2], samples[1::2]


def ratio(pairs: Sequence[tuple[float, float]]) -> str:
    """Geometric mean of ratios, and the standard error of its logarithm over layers [%]."""
    logs = [math.log(a / b) for a, b in pairs]
    error = statistics.stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else math.nan
    return f"{math.exp(statistics.mean(logs)):.3f} ± {100 * error:.1f} %"


WAYS = ("plain", "alpha", "rank", "after", "joint")


def summary(name: str, bits: int, found: Sequence[Arms]) -> list[str]:
    """A row of the table of real layers."""
    wins = sum(one.joint < min(one.alpha, one.rank) for one in found)
    alphas = [one.chosen.alphas[0] if one.chosen.alphas else 0.0 for one in found]
    ranks = [one.chosen.rank for one in found]
    return [
        name,
        str(len(found)),
        str(bits),
        *(f"{math.exp(statistics.mean(math.log(getattr(one, way)) for one in found)):.4f}" for way in WAYS),
        ratio([(one.joint, one.alpha) for one in found]),
        ratio([(one.joint, one.rank) for one in found]),
        ratio([(one.joint, one.after) for one in found]),
        f"{wins} of {len(found)}",
        f"{min(alphas):g}, {statistics.median(alphas):g}, {max(alphas):g}",
        f"{min(ranks)}, {statistics.median(ranks):g}, {max(ranks)}",
    ]


def real_rows(name: str, model: nn.Module, batches: Iterable[Batch], most: int, pattern: str) -> list[list[str]]:
    """A row for 8 and one for 4 bits of activations, over at most so many layers of a pattern, drawn."""
    rewrite(model)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.numel() >= LEAST}
    layers = [n for n in linear if matches(n, [pattern])]
    layers = sorted(random.Random(0).sample(layers, min(most, len(layers))), key=layers.index)
    fitting, others = (
        collect_rows(model, half, count=ROWS, seed=seed, layers=layers) for seed, half in enumerate(halves(batches))
    )
    lines = []
    for bits in (8, 4):
        found = []
        for layer in (one for one in layers if one in fitting and one in others):
            weight = model.get_submodule(layer).get_parameter("weight")
            found.append(arms(weight, fitting[layer], others[layer], bits, layer))
            print(f"{name} {layer} {bits}: {found[-1]}", file=sys.stderr, flush=True)
        lines.append(summary(name, bits, found))
    return lines


def fallback_row(name: str, model: nn.Module, batches: Iterable[Batch], energy: float) -> list[str]:
    """Layers that truncation does not make smaller, and what a branch makes of them."""
    rewrite(model)
    flat = fallback_layers(model, LowRankSettings(energy=energy))
    names = [one.name for one in flat]
    count = sum(isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) for module in model.modules())
    linear = [one for one in names if isinstance(model.get_submodule(one), nn.Linear)]
    rows = collect_rows(model, halves(batches)[0], count=ROWS, seed=0, layers=linear)
    settings = BranchSettings(alpha=0.5, rank=4, residual="int4", activation_bits=8)
    report = branch_layers(model, rows, settings, why={one.name: one.reason for one in flat})
    made = [one for one in report if isinstance(model.get_submodule(one.name), BranchModule)]
    before, after = (sum(getattr(one, size) for one in made) for size in ("float_bytes", "stored_bytes"))
    error = statistics.median(math.sqrt(one.error) for one in made) if made else math.nan
    return [name, f"{len(flat)} of {count}", str(len(made)), f"{before / max(after, 1):.2f}x", f"{error:.4f}"]


def shared_model(name: str, data: Path) -> tuple[nn.Module, list[Batch]]:
    """A shared model and batches of its calibration data."""
    zoo, zoo_eval = (importlib.import_module(module) for module in ("zoo", "zoo_eval"))
    model: nn.Module = zoo.load_model(str(data / name))[0]
    return model.eval(), [Batch(args=tuple(args)) for args in zoo_eval.calib_batches(str(data / name))]


def minilm(folder: Path, data: Path) -> tuple[nn.Module, list[Batch]]:
    """MiniLM and sentences of SST-2."""
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: nn.Module = transformers.AutoModel.from_pretrained(folder).eval()
    texts = (data / "texts" / "sst2_dev.txt").read_text(encoding="utf-8").splitlines()[:64]
    batches = []
    for text in texts:
        coded = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
        batches.append(Batch(kwargs=dict(coded)))
    return model, batches


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="folder with zoo.py, zoo_eval.py and texts")
    made.add_argument("--minilm", type=Path, help="folder of a MiniLM; its sentences are those of --data")
    made.add_argument("--models", nargs="*", default=list(MODELS), help="folders of --data")
    made.add_argument("--seeds", type=int, default=4, help="synthetic tensors; 0: none")
    made.add_argument("--layers", type=int, default=1000, help="most layers of a model, drawn without repetition")
    made.add_argument("--match", default="*", help="fnmatch pattern of the layers")
    made.add_argument("--energy", type=float, default=0.99, help="share asked of truncation")
    given: argparse.Namespace = made.parse_args()
    where = machine()
    with torch_threads(1):
        if given.seeds:
            header = [
                "bits a weight",
                "variant",
                "8 bit, plain",
                "8 bit, smoothed (alphas)",
                "4 bit, plain",
                "4 bit, smoothed (alphas)",
            ]
            publish("BRANCH_TOY", f"{where}\n\n{table(header, toy_rows(given.seeds))}", given.out)
        if given.data:
            sys.path.insert(0, str(given.data))
            names = [*given.models, *(["MiniLM"] if given.minilm else [])]
            lines, flat = [], []
            for name in names:
                model, batches = (
                    minilm(given.minilm, given.data) if name == "MiniLM" else shared_model(name, given.data)
                )
                lines += real_rows(name, model, batches, given.layers, given.match)
                flat.append(fallback_row(name, model, batches, given.energy))
            header = [
                "model", "layers", "activation bits", *WAYS, "joint / alpha", "joint / rank", "joint / after",
                "joint best", "alphas", "ranks",
            ]  # fmt: skip
            publish("BRANCH_REAL", f"{where}\n\n{table(header, lines)}", given.out)
            header = ["model", "flat layers", "now branches", "fewer bytes", "median error"]
            publish("BRANCH_FALLBACK", f"{where}\n\n{table(header, flat)}", given.out)


if __name__ == "__main__":
    main()
