"""Cost of one candidate at the model's output, in units of a float forward pass, with and without what is remembered.

    python -m benchmarks.model_candidate_cost [--repeats 5] [--out]

An encoder of MiniLM's shape with random weights. A candidate differs from the incumbent at one site of the first, the middle
or the last block. "Rest" is the float forward pass from that block on. Everything takes turns on one thread, in processor time,
so that other work on the machine disturbs it little; medians. Remembered and computed losses are compared to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.media.batch import Batch, call
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.objectives.text import size_text
from benchmarks.timing import machine, median, parser, publish, table, torch_threads

BLOCKS, WIDTH, SAMPLES, TOKENS, BATCHES = 6, 384, 8, 48, 8
SCHEMES = ("w8a8-channel-token", "w4a16-g128")
#: Operators that read the site which changes, within a block.
CHANGES = ("attention.self.query", "output.dense")
#: Bytes that may be remembered, named: everything, or what forces a choice.
MEMORIES = (2**30, 2**25)


def encoder() -> tuple[nn.Module, list[Batch]]:
    """The float model and its batches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # module initialisers take no generator
        sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 12}
        model = BertModel(BertConfig(num_hidden_layers=BLOCKS, vocab_size=1000, attn_implementation="eager", **sizes))
        batches = [Batch(kwargs={"input_ids": torch.randint(0, 1000, (SAMPLES, TOKENS))}) for _ in range(BATCHES)]
    return model.eval().requires_grad_(False), batches


def drawn(site: Site, seed: int) -> Smoothing:
    """Random scales between 1/2 and 2."""
    _, tie = torch.unique(site.ties, return_inverse=True)
    free = torch.rand(int(tie.max()) + 1, generator=torch.Generator().manual_seed(seed))
    return Smoothing(scales=torch.exp2(2 * free - 1)[tie])


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call [s]."""
    start = time.process_time()
    work()
    return time.process_time() - start


def from_block(model: nn.Module, batches: Sequence[Batch], first: int) -> Callable[[], None]:
    """The float forward pass from a block on; from the first one, embeddings included."""
    layers = model.get_submodule("encoder.layer")
    hidden = torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))

    def run() -> None:
        with torch.no_grad():
            for batch in batches:
                if not first:
                    call(model, batch)
                    continue
                x = hidden
                for layer in list(layers.children())[first:]:
                    out = layer(x)
                    x = out[0] if isinstance(out, tuple) else out

    return run


def rows(repeats: int) -> Iterator[tuple[object, ...]]:
    """One line of the table after another."""
    for name in SCHEMES:
        model, batches = encoder()
        sites = [site for site in discover(model, batches[0].narrow(0, 1)).sites if site.mode != "left"]
        base = {site.name: drawn(site, index) for index, site in enumerate(sites)}
        floats = {first: from_block(model, batches, first) for first in (0, BLOCKS // 2, BLOCKS - 1)}
        taken = {first: median([seconds(run) for _ in range(repeats)]) for first, run in floats.items()}
        candidate = CandidateModel(model, sites, {}, Scheme.parse(name))
        judges = [ModelObjective(candidate, batches, remembered=memory) for memory in (0, *MEMORIES)]
        for judge in judges:
            judge.remember(base)
        for block in floats:
            for operator in CHANGES:
                yield (name, *measured(judges, sites, base, f"encoder.layer.{block}.{operator}", taken, block, repeats))


def measured(
    judges: Sequence[ModelObjective],
    sites: Sequence[Site],
    base: Mapping[str, Smoothing],
    operator: str,
    taken: Mapping[int, float],
    block: int,
    repeats: int,
) -> tuple[str, ...]:
    """Costs of candidates that differ from the incumbent at the site which an operator reads."""
    site = next(site for site in sites if operator in {o.name for o in site.operators})
    costs: list[list[float]] = [[] for _ in judges]
    for repeat in range(repeats + 1):
        changed = {**base, site.name: drawn(site, 100 + repeat)}
        found: list[Tensor] = []

        def score(judge: ModelObjective, changed: Mapping[str, Smoothing], found: list[Tensor]) -> None:
            found.append(judge.sample_errors(changed))

        for judge, cost in zip(judges, costs, strict=True):
            judge.candidate.apply(base)  # each judge pays for the weights of the changed site
            cost.append(seconds(partial(score, judge, changed, found)))
        if not all(torch.equal(errors, found[0]) for errors in found):
            raise RuntimeError("what is remembered changes a loss")
    plain, *remembered = (median(cost[1:]) for cost in costs)
    return (
        operator.removeprefix("encoder."),
        f"{taken[0] * 1e3:.0f}",
        f"{taken[block] / taken[0]:.3f}",
        f"{plain / taken[0]:.3f}",
        *(f"{cost / taken[0]:.3f}" for cost in remembered),
        f"{remembered[0] / taken[block]:.2f}",
    )


def main() -> None:
    """Print the table, and write it where ``--out`` says."""
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, default=5, help="rounds per line")
    arguments = made.parse_args()
    lines = []
    with torch_threads(1):
        where = machine()
        for line in rows(arguments.repeats):
            lines.append(line)
            print(*line, sep="  ", flush=True)
    limits = (f"{size_text(memory)} remembered" for memory in MEMORIES)
    header = ("scheme", "changed site", "float forward [ms]", "rest", "computed", *limits, "of the rest")
    publish("MODEL_CANDIDATE_COST", f"{where}\n\n{table(header, lines)}", arguments.out)


if __name__ == "__main__":
    main()
