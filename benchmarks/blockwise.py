"""A model block by block against the same model in memory as a whole: peak resident memory, tokens per second, what was predicted.

    python benchmarks/blockwise.py [--work DIR] [--layers 6 47 | --gib 0.5 6] [--hidden 2560] [--intermediate 6912] [--out FILE]

LLaMA-shaped models of random weights in bfloat16, written layer by layer so that none is ever held whole, with 1 % loud channels
behind every norm. Each pass is a process of its own; its memory is the kernel's peak resident size (VmHWM), libraries included, of it or
of the largest process it started; its tokens are those of all samples, its time is that from the call to the written ``quantized/``. The whole
model is run in memory, too, up to ``--most`` layers: both passes then start together, so that both see the same machine, one thread each.
The work folder takes five bytes a parameter and more; it is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alphasmith.objectives.judge.memory import peak_bytes
from alphasmith.search import RunConfig, run
from alphasmith.search.large_pages import large_pages
from alphasmith.search.progress import Silent

HIDDEN, INTERMEDIATE, HEADS, GROUPS, VOCABULARY = 2560, 6912, 20, 5, 4096
LENGTH, BATCH = 64, 4
SPLITS = {"samples": 8, "tuning": 0, "held_out": 4, "proof": 2}
#: Stages of the whole model that have no counterpart block by block.
LEFT_OUT = (
    "one alpha for the whole model",
    "outputs of the float model",
    "what sites add",
    "shares of the output error",
)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One run.

    Attributes:
        seconds: From the call to the result.
        alike: The same without stages that only the whole model has.
        cpu: Processor time of the same [s].
        peak: The kernel's peak resident size of the process, or of the largest one that it started [bytes].
        predicted: Of the run, beyond the libraries [bytes].
        measured: Likewise.
        parameters: Of the model.
        loss: Loss at the model's output with the winners.
    """

    seconds: float
    alike: float
    cpu: float
    peak: int
    predicted: int
    measured: int
    parameters: int
    loss: float


class StageSeconds(Silent):
    """Seconds of every stage, and each on standard error as it begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._since = "", time.perf_counter()

    def stage(self, name: str, total: int | None = None) -> None:
        now = time.perf_counter()
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._since
        self._name, self._since = name, now
        print(f"{now:10.1f} s {name} ({total}), peak {peak_bytes() / 2**20:.0f} MiB", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(f"# {text}", file=sys.stderr, flush=True)


def write_llama(folder: Path, layers: int, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> None:
    """A LLaMA-shaped checkpoint, one layer a shard.

    Args:
        folder: Made.
        layers: How many.
        hidden: Width.
        intermediate: Width of the MLP.
    """
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    narrow = hidden * GROUPS // HEADS
    loud = torch.randperm(hidden, generator=generator)[: max(hidden // 100, 1)]

    def weight(rows: int, columns: int, *, undone: bool = False, scale: float = 1.0) -> torch.Tensor:
        made = torch.randn(rows, columns, generator=generator).mul_(scale * columns**-0.5)
        if undone:
            made[:, loud] /= 40
        return made.to(torch.bfloat16)

    def norm() -> torch.Tensor:
        made = torch.ones(hidden)
        made[loud] = 40
        return made.to(torch.bfloat16)

    places: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor], number: int) -> None:
        name = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    for layer in range(layers):
        below = f"model.layers.{layer}"
        save(
            {
                f"{below}.input_layernorm.weight": norm(),
                f"{below}.self_attn.q_proj.weight": weight(hidden, hidden, undone=True),
                f"{below}.self_attn.k_proj.weight": weight(narrow, hidden, undone=True),
                f"{below}.self_attn.v_proj.weight": weight(narrow, hidden, undone=True),
                f"{below}.self_attn.o_proj.weight": weight(hidden, hidden, scale=layers**-0.5),
                f"{below}.post_attention_layernorm.weight": norm(),
                f"{below}.mlp.gate_proj.weight": weight(intermediate, hidden, undone=True),
                f"{below}.mlp.up_proj.weight": weight(intermediate, hidden, undone=True),
                f"{below}.mlp.down_proj.weight": weight(hidden, intermediate, scale=layers**-0.5),
            },
            layer + 1,
        )
    ends = {
        "model.embed_tokens.weight": weight(VOCABULARY, hidden) * hidden**0.5,
        "model.norm.weight": norm(),
        "lm_head.weight": weight(VOCABULARY, hidden, undone=True),
    }
    save(ends, layers + 1)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def measure(model: Path, work: Path, mode: str) -> Pass:
    """One run in this process."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (sum(SPLITS.values()), LENGTH), generator=generator)
    values: dict[str, Any] = {
        "model": {"path": model},
        "memory": {"mode": mode},
        "storage": f"sqlite:///{work}/{mode}.db",
        "out": work / mode,
        "data": {**SPLITS, "batch_size": BATCH},
        "search": {"trials": 4, "rows": 128, "refine": False, "guard": "site", "shift": "none"},
        "groups": {"k": 1},
    }
    progress = StageSeconds()
    start, used = time.perf_counter(), time.process_time()
    result = run(RunConfig.build(values), batches=[{"input_ids": ids}], progress=progress)
    seconds = time.perf_counter() - start
    progress.stage("end")
    left_out = sum(s for name, s in progress.seconds.items() if name.startswith(LEFT_OUT))
    manifest = result.manifest
    return Pass(
        seconds=seconds,
        alike=seconds - left_out,
        cpu=time.process_time() - used,
        peak=max(peak_bytes(), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss),
        predicted=manifest.memory.predicted,
        measured=manifest.memory.measured or 0,
        parameters=manifest.model.parameter_count,
        loss=manifest.output.ours or 0.0,
    )


def layers_of(gib: float, hidden: int, intermediate: int) -> int:
    """Layers with which the whole model in bfloat16 has at least so many GiB."""
    narrow = hidden * GROUPS // HEADS
    layer = 2 * hidden * (hidden + narrow) + 3 * hidden * intermediate + 2 * hidden
    ends = 2 * VOCABULARY * hidden + hidden
    return max(2, math.ceil((gib * 2**30 / 2 - ends) / layer))


def _started(model: Path, work: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--one", str(model), str(work), mode]
    environment = {**os.environ, **large_pages(os.environ), "OMP_NUM_THREADS": "1"}  # as the command line has it
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def _ended(process: subprocess.Popen[str]) -> Pass:
    answer, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return Pass(**json.loads(answer.splitlines()[-1]))


def _row(layers: int, mode: str, found: Pass) -> str:
    tokens = sum(SPLITS.values()) * LENGTH
    cells = (
        layers,
        f"{2 * found.parameters / 2**30:.2f}",
        mode,
        f"{found.peak / 2**30:.2f}",
        f"{found.predicted / 2**30:.2f}",
        f"{found.measured / 2**30:.2f}",
        f"{found.predicted / found.measured:.2f}",
        f"{tokens / found.seconds:.2f}",
        f"{tokens / found.alike:.2f}",
        f"{tokens / found.cpu:.2f}",
        f"{found.loss:.6g}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 47])
    parser.add_argument("--gib", type=float, nargs="+", help="sizes in bfloat16, in place of --layers")
    parser.add_argument("--most", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--intermediate", type=int, default=INTERMEDIATE)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if given.one:
        model, work, mode = given.one
        print(json.dumps(asdict(measure(Path(model), Path(work), mode))))
        return
    columns = ("layers", "model, bfloat16 [GiB]", "mode", "peak resident [GiB]", "predicted [GiB]", "measured [GiB]")
    more = (
        "predicted / measured",
        "tokens/s",
        "tokens/s without what only the whole model has",
        "tokens/s of processor time",
        "output loss",
    )
    lines = [f"| {' | '.join((*columns, *more))} |", "|---" * len((*columns, *more)) + "|"]
    print("\n".join(lines))
    sizes = given.layers
    if given.work is not None:
        given.work.mkdir(parents=True, exist_ok=True)
    if given.gib:
        sizes = [layers_of(gib, given.hidden, given.intermediate) for gib in given.gib]
    for layers in sizes:
        with tempfile.TemporaryDirectory(dir=given.work, prefix="blockwise-") as made:
            model = Path(made) / "model"
            write_llama(model, layers, given.hidden, given.intermediate)
            modes = ("blockwise", "resident")[: 2 if layers <= given.most else 1]
            started = [(mode, _started(model, Path(made), mode)) for mode in modes]
            for mode, process in started:
                lines.append(_row(layers, mode, _ended(process)))
                print(lines[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
