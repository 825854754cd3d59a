"""How much faster two workers are than one, and Ray than two local workers, on real runs.

    python -m benchmarks.strong_scaling [--layers 6] [--hidden 256] [--engines local-1,local-2,ray-2] [--runs RUNS.json]
        [--out docs/scaling.md]

A LLaMA of random weights with loud channels is searched from end to end by each engine, every worker on one thread. The rate is that
of the records "once warm": starting workers, which import torch after the first claim, does not count. So the clock runs from the
second accepted result to the last one, over the sites in between. Engines take turns, ``--repeat`` times, and the best rate of each counts. ``--runs`` keeps those of local workers
for ``benchmarks.cluster_simulation --measured``.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from alphasmith.search import RunConfig
from alphasmith.search import run as run_alphasmith
from alphasmith.storage.database.connection import open_existing
from alphasmith.storage.queue.board import Board
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


#: Results until every worker of up to two has begun.
_COLD = 2


@dataclass(frozen=True)
class StageMeasurement:
    """The search stage of one real run, as ``benchmarks.cluster_simulation`` reads it.

    Attributes:
        engine: Who records: a ``driver``.
        workers: How many search.
        seconds: From the second accepted result to the last one [s].
        site_seconds: Of the search of every site that was accepted in that time, in the order of the search [s].
        after: Per such site, positions of those it waited for.
    """

    engine: str
    workers: int
    seconds: float
    site_seconds: tuple[float, ...]
    after: tuple[tuple[int, ...], ...]

    @property
    def rate(self) -> float:
        """Sites per second."""
        return len(self.site_seconds) / self.seconds

    @property
    def searching(self) -> float:
        """Seconds of searching per site."""
        return sum(self.site_seconds) / len(self.site_seconds)


def measured(engine: str, workers: int, model: torch.nn.Module, trials: int, rows: int) -> StageMeasurement:
    """The search stage of one run."""
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
        result = run_alphasmith(RunConfig.build(values), model=model, batches=tokens)
        database = open_existing(url)
        tickets = Board(database, result.id, role="driver").tickets()
        database.close()
        ended = sorted(t.ended for t in tickets if t.ended is not None)
        warm = ended[_COLD - 1]
        later = [t for t in tickets if t.ended is not None and t.ended > warm]
        seconds = dict(zip(result.sites["site"], result.sites["seconds"], strict=True))
        place = {ticket.site: number for number, ticket in enumerate(later)}
        return StageMeasurement(
            engine="driver",
            workers=workers,
            seconds=(ended[-1] - warm).total_seconds(),
            site_seconds=tuple(float(seconds[t.site]) for t in later),
            after=tuple(tuple(place[d] for d in t.depends_on if d in place) for t in later),
        )


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--layers", type=int, default=6)
    arguments_of.add_argument("--hidden", type=int, default=256)
    arguments_of.add_argument("--trials", type=int, default=24)
    arguments_of.add_argument("--rows", type=int, default=1024)
    arguments_of.add_argument("--engines", default="local-1,local-2,ray-2")
    arguments_of.add_argument("--repeat", type=int, default=2)
    arguments_of.add_argument("--runs", type=Path, help="keep the runs of local workers in this file, as JSON")
    arguments = arguments_of.parse_args()
    where = machine()
    os.environ["OMP_NUM_THREADS"] = "1"
    model = llama(arguments.layers, arguments.hidden)
    found: dict[str, StageMeasurement] = {}
    for _ in range(arguments.repeat):
        for name in arguments.engines.split(","):
            engine, _, workers = name.partition("-")
            now = measured(engine, int(workers), model, arguments.trials, arguments.rows)
            print(f"{name}: {now.rate:.2f} sites/s, {now.searching:.2f} s of searching per site", flush=True)
            found[name] = max(found.get(name, now), now, key=lambda run: run.rate)
    if arguments.runs is not None:
        local = [asdict(run) for name, run in found.items() if name.startswith("local-")]
        arguments.runs.write_text(json.dumps(local, indent=1), encoding="utf-8")
    one, two = found.get("local-1"), found.get("local-2")
    lines = [
        (
            name,
            f"{run.rate:.2f}",
            f"{run.searching:.2f}",
            f"{run.rate / one.rate:.2f}" if one else "",
            f"{run.rate / two.rate:.2f}" if two else "",
        )
        for name, run in found.items()
    ]
    head = ("engine", "sites/s", "s of searching per site", "times one local worker", "times two local workers")
    title = f"{4 * arguments.layers + 1} sites, hidden {arguments.hidden}, {arguments.rows} rows, one thread a worker."
    publish("STRONG_SCALING", f"{where} {title}\n\n{table(head, lines)}", arguments.out)


if __name__ == "__main__":
    main()
