"""How much faster two workers are than one, and Ray than two local workers, on real runs.

    python -m benchmarks.strong_scaling [--layers 6] [--hidden 256] [--engines local-1,local-2,ray-2] [--out docs/scaling.md]

A LLaMA of random weights with loud channels is searched from end to end by each engine, every worker on one thread. The rate
is that of the records: sites over the time from the first claim to the last accepted result, so starting processes does not
count ("once warm"). Engines take turns, ``--repeat`` times, and the best rate of each counts.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from alphasmith.search import RunConfig, run
from alphasmith.storage.board import Board
from alphasmith.storage.database import open_existing
from benchmarks.timing import machine, parser, publish, table


def llama(layers: int, hidden: int) -> torch.nn.Module:
    """A LLaMA of random weights; a few channels of every norm are 30 times louder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    model: torch.nn.Module = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight[: hidden // 64] *= 30.0
    return model


def rate(engine: str, workers: int, model: torch.nn.Module, trials: int, rows: int) -> tuple[float, float]:
    """(sites per second, seconds of searching per site) of one run."""
    generator = torch.Generator().manual_seed(1)
    tokens = list(torch.randint(0, 512, (56, 64), generator=generator).split(8))
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'runs.db'}"
        values: dict[str, Any] = {
            "storage": url,
            "out": Path(folder) / "out",
            "engine": engine,
            "workers": {"count": workers, "threads": 1},
            "data": {"samples": 32, "held_out": 16, "proof": 8},
            "search": {"trials": trials, "rows": rows, "refine": False, "reuse": False, "threads": 1},
        }
        result = run(RunConfig.build(values), model=model, batches=tokens)
        database = open_existing(url)
        tickets = Board(database, result.id, role="driver").tickets()
        database.close()
        began = min(t.started for t in tickets if t.started is not None)
        ended = max(t.ended for t in tickets if t.ended is not None)
        return len(tickets) / (ended - began).total_seconds(), float(result.sites["seconds"].sum()) / len(tickets)


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--layers", type=int, default=6)
    arguments_of.add_argument("--hidden", type=int, default=256)
    arguments_of.add_argument("--trials", type=int, default=24)
    arguments_of.add_argument("--rows", type=int, default=1024)
    arguments_of.add_argument("--engines", default="local-1,local-2,ray-2")
    arguments_of.add_argument("--repeat", type=int, default=2)
    arguments = arguments_of.parse_args()
    where = machine()
    os.environ["OMP_NUM_THREADS"] = "1"
    model = llama(arguments.layers, arguments.hidden)
    found: dict[str, tuple[float, float]] = {}
    for _ in range(arguments.repeat):
        for name in arguments.engines.split(","):
            engine, _, workers = name.partition("-")
            now = rate(engine, int(workers), model, arguments.trials, arguments.rows)
            print(f"{name}: {now[0]:.2f} sites/s, {now[1]:.2f} s of searching per site", flush=True)
            found[name] = max(found.get(name, now), now)
    one, two = found.get("local-1"), found.get("local-2")
    lines = [
        (
            name,
            f"{found_rate:.2f}",
            f"{seconds:.2f}",
            f"{found_rate / one[0]:.2f}" if one else "",
            f"{found_rate / two[0]:.2f}" if two else "",
        )
        for name, (found_rate, seconds) in found.items()
    ]
    head = ("engine", "sites/s", "s of searching per site", "times one local worker", "times two local workers")
    title = f"{4 * arguments.layers + 1} sites, hidden {arguments.hidden}, {arguments.rows} rows, one thread a worker."
    publish("STRONG_SCALING", f"{where} {title}\n\n{table(head, lines)}", arguments.out)


if __name__ == "__main__":
    main()
