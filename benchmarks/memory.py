"""Peak memory of a run: predicted before it starts, measured when it ends, each case in a process of its own.

    python benchmarks/memory.py [--out docs/memory.md]

Cases are random LLaMA-architecture models of growing width, so that nothing but this repository is needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from alphasmith.search import RunConfig, run

#: hidden size, layers, samples per batch, rows per site
CASES = ((128, 4, 8, 1024), (256, 4, 8, 1024), (512, 4, 8, 1024), (512, 8, 4, 2048))
_LENGTH = 128


def measure(hidden: int, layers: int, batch: int, rows: int) -> dict[str, int]:
    """One run in this process."""
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
    with tempfile.TemporaryDirectory() as folder:
        settings = RunConfig.build(
            {
                "storage": f"sqlite:///{folder}/trials.db",
                "out": f"{folder}/out",
                "search": {"trials": 4, "rows": rows},
                "data": {"batch_size": batch, "samples": batch * 6, "held_out": batch * 4, "proof": batch},
            }
        )
        result = run(settings, model=LlamaForCausalLM(config), batches=[{"input_ids": ids}])
    memory = result.manifest.memory
    return {"predicted": memory.predicted, "measured": memory.measured or 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(*CASES[arguments.case])))
        return
    lines = [
        "| hidden | layers | batch | rows | predicted [MiB] | measured [MiB] | predicted / measured |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for index, case in enumerate(CASES):
        answer = subprocess.run(
            [sys.executable, __file__, "--case", str(index)], check=True, capture_output=True, text=True
        )
        found = json.loads(answer.stdout.splitlines()[-1])
        predicted, measured = found["predicted"] / 2**20, found["measured"] / 2**20
        cells = (*case, f"{predicted:.0f}", f"{measured:.0f}", f"{predicted / measured:.2f}")
        lines.append(f"| {' | '.join(str(c) for c in cells)} |")
        print(lines[-1], flush=True)
    if arguments.out:
        text = "<!-- made by benchmarks/memory.py -->\n# Peak memory\n\n" + "\n".join(lines) + "\n"
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
