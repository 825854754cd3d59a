"""Peak memory of a run: predicted before it starts, measured when it ends, each case in a process of its own.

    python benchmarks/memory.py [--out docs/memory.md] [--large]

Cases are random LLaMA-architecture models of growing width, so that nothing but this repository is needed. ``--large`` adds
a stack of linear layers of 2 GiB, searched with a budget of 4 GiB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphasmith.search import RunConfig, run

#: hidden size, layers, samples per batch, rows per site
CASES = ((128, 4, 8, 1024), (256, 4, 8, 1024), (512, 4, 8, 1024), (512, 8, 4, 2048))
_LENGTH = 128

#: The large model: width and layers (4 width^2 layers bytes = 2 GiB), rows per site, and the budget it is given.
LARGE_WIDTH, LARGE_LAYERS, LARGE_ROWS = 4096, 32, 256
BUDGET = "4 GiB"


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """One run's memory [bytes].

    Attributes:
        predicted: Before it started, the model included.
        measured: At its end, likewise.
        model: Parameters of the model.
        site: Working set of the largest site: rows, float output and candidate output of both splits, and the weight in
            float, smoothed and quantized as floats.
    """

    predicted: int
    measured: int
    model: int
    site: int


def measure(hidden: int, layers: int, batch: int, rows: int) -> MemoryUse:
    """One run of a language model in this process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
        use_cache=False,
        attn_implementation="eager",
    )
    ids = torch.randint(0, 512, (batch * 12, _LENGTH))
    model = LlamaForCausalLM(config)
    values = {
        "search": {"trials": 4, "rows": rows},
        "data": {"batch_size": batch, "samples": batch * 6, "held_out": batch * 4, "proof": batch},
    }
    # gate and up projection read the same rows.
    return _run(values, rows, hidden, 2 * (hidden * 8 // 3), model=model, batches=[{"input_ids": ids}])


def large_model() -> nn.Module:
    """A stack of wide linear layers with a few loud channels."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(LARGE_LAYERS):
        linear = nn.Linear(LARGE_WIDTH, LARGE_WIDTH, device="meta")
        weight = torch.randn(LARGE_WIDTH, LARGE_WIDTH, generator=generator).mul_((2 / LARGE_WIDTH) ** 0.5)
        weight[::64] *= 20
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = nn.Parameter(torch.zeros(LARGE_WIDTH), requires_grad=False)
        norm = nn.LayerNorm(LARGE_WIDTH, elementwise_affine=True).requires_grad_(False)
        layers += [norm, linear, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def large_batches() -> list[torch.Tensor]:
    """Vectors for :func:`large_model`."""
    return [torch.randn(768, LARGE_WIDTH, generator=torch.Generator().manual_seed(1))]


def measure_large() -> MemoryUse:
    """One run of the large model in this process, loaded by the run itself so that no second one is held."""
    here = Path(__file__)
    values: dict[str, Any] = {
        "model": {"factory": f"{here.stem}:large_model", "factory_path": str(here.parent)},
        "data": {
            "factory": f"{here.stem}:large_batches",
            "batch_size": 64,
            "samples": 384,
            "held_out": 320,
            "proof": 64,
        },
        "search": {"trials": 4, "rows": LARGE_ROWS, "refine": False},
        "hardware": {"search_memory": BUDGET},
    }
    return _run(values, LARGE_ROWS, LARGE_WIDTH, LARGE_WIDTH)


def _run(values: dict[str, Any], rows: int, inputs: int, outputs: int, **keywords: Any) -> MemoryUse:
    with tempfile.TemporaryDirectory() as folder:
        places = {"storage": f"sqlite:///{folder}/trials.db", "out": f"{folder}/out"}
        manifest = run(RunConfig.build({**places, **values}), **keywords).manifest
    return MemoryUse(
        predicted=manifest.memory.predicted,
        measured=manifest.memory.measured or 0,
        model=4 * manifest.model.parameter_count,
        site=4 * (2 * rows * (inputs + 2 * outputs) + 3 * inputs * outputs),
    )


def _in_own_process(*arguments: str) -> MemoryUse:
    answer = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return MemoryUse(**json.loads(answer.stdout.splitlines()[-1]))


def _row(case: tuple[object, ...], found: MemoryUse) -> str:
    mebibytes = (found.model, found.site, found.predicted, found.measured)
    cells = (
        *case,
        *(f"{value / 2**20:.0f}" for value in mebibytes),
        f"{found.predicted / found.measured:.2f}",
        f"{found.measured / (1.5 * found.site + found.model):.2f}",
    )
    return f"| {' | '.join(str(c) for c in cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    if arguments.case is not None:
        found = measure_large() if arguments.case == "large" else measure(*CASES[int(arguments.case)])
        print(json.dumps(asdict(found)))
        return
    sizes = tuple(f"{what} [MiB]" for what in ("model", "largest site", "predicted", "measured"))
    ratios = ("predicted / measured", "measured / (1.5 site + model)")
    columns = ("hidden", "layers", "batch", "rows", *sizes, *ratios)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    print("\n".join(lines))
    cases: list[tuple[str, tuple[object, ...]]] = [(str(index), case) for index, case in enumerate(CASES)]
    if arguments.large:
        cases.append(("large", (LARGE_WIDTH, LARGE_LAYERS, 64, f"{LARGE_ROWS} of {BUDGET}")))
    for name, case in cases:
        lines.append(_row(case, _in_own_process("--case", name)))
        print(lines[-1], flush=True)
    if arguments.out:
        text = "<!-- made by benchmarks/memory.py -->\n# Peak memory\n\n" + "\n".join(lines) + "\n"
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
