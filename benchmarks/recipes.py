"""Every recipe as it stands, in an environment of its tool, on the text demo.

    python -m benchmarks.recipes [--tools torchao ...] [--scheme w8a8-channel-static] [--environments FOLDER]
                                 [--out [docs/exports.md]]

The demo, a small model of the LLaMA architecture, is searched as ``alphasmith run`` would do it, without sites that are divided at run time. Each script
is printed by ``alphasmith recipe`` and run in an environment that holds what ``benchmarks/tools/requirements`` asks for, then its model is
asked for the logits of the demo's held-out texts. A tool that does not install or whose script breaks down is a row that says so. Errors are relative squared
errors of the logits, against the float model and against the integer model of the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from alphasmith.objectives.demo import load_demo, write_hf_folder, write_media
from alphasmith.objectives.literals import RecipeTool
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search import RunConfig, load_quantized, load_smoothed, recipe, run
from benchmarks.timing import machine, publish, table
from benchmarks.tools.environments import InstallError, environment, environments_folder, isolated, last_line

_ROOT = Path(__file__).resolve().parents[1]
_DOCUMENT = _ROOT / "docs/exports.md"
_RUNNER = _ROOT / "benchmarks/tools/adapters/recipe.py"
TOOLS: tuple[RecipeTool, ...] = get_args(RecipeTool)
#: Tool -> requirements file of its environment.
ENVIRONMENTS: dict[RecipeTool, str] = {
    "llm-compressor": "llm_compressor",
    "modelopt": "modelopt",
    "inc": "neural_compressor_graphs",
    "torchao": "torchao",
    "ctranslate2": "ctranslate2",
}
_PATIENCE = 900.0


class RecipeError(Exception):
    """A script broke down; the message is its last line."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a tool, the logits of its model, or why there are none."""

    name: str
    logits: Tensor | None = None
    note: str = ""


def requirements(tool: RecipeTool) -> Path:
    """The requirements file of a tool's environment."""
    return _ROOT / "benchmarks/tools/requirements" / f"{ENVIRONMENTS[tool]}.txt"


def answered(python: Path, tool: RecipeTool, folder: Path, ids: Tensor) -> Tensor:
    """Logits of what a recipe makes of ``folder/result``.

    Args:
        python: Of the environment that it runs in.
        tool: Whose recipe.
        folder: Where the script is written and run; it holds the result of a run, ``result``.
        ids: (B, L) int64.

    Raises:
        RecipeError: It broke down.
    """
    script, asked, reply = (folder / f"{tool}{end}" for end in (".py", "-ids.safetensors", "-logits.safetensors"))
    recipe(tool, folder / "result", script)
    save_file({"ids": ids.contiguous()}, asked)
    command = [str(python), str(_RUNNER), str(script), str(asked), str(reply)]
    done = subprocess.run(
        command, cwd=folder, env=isolated(), check=False, capture_output=True, text=True, timeout=_PATIENCE
    )
    if done.returncode:
        raise RecipeError(last_line(done.stderr))
    found: Tensor = load_file(reply)["logits"]
    return found


def _answer(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def _rows(tools: Sequence[RecipeTool], scheme: str, environments: Path, folder: Path) -> tuple[list[Row], Tensor]:
    """The float model, the run's own and every tool's, on the demo's held-out texts (B, L)."""
    demo = load_demo("text")
    write_hf_folder(demo, folder / "model")
    write_media(demo, folder / "media")
    values = {name: value for name, value in dataclasses.asdict(Scheme.parse(scheme)).items() if value is not None}
    config = RunConfig.build(
        {
            "model": {"path": folder / "model"},
            "data": {"path": folder / "media/text.jsonl"},
            "storage": f"sqlite:///{folder}/trials.db",
            "out": str(folder / "result"),
            "scheme": values,
            "sites": {"explicit": "never"},
            "search": {"trials": 8, "refine": False, "shift": ["none"]},
        }
    )
    run(config)
    ids = _held_out(folder)
    smoothed = load_smoothed(folder / "result")
    rows = [Row(name="float", logits=_answer(smoothed, ids))]
    rows += [Row(name="Alphasmith", logits=_answer(load_quantized(folder / "result"), ids))]
    for tool in tools:
        try:
            python = environment(requirements(tool), environments / ENVIRONMENTS[tool])
            rows.append(Row(name=tool, logits=answered(python, tool, folder, ids)))
        except InstallError as error:
            rows.append(Row(name=tool, note=f"not installed: {error}"))
        except (RecipeError, subprocess.TimeoutExpired) as error:
            rows.append(Row(name=tool, note=f"broke down: {str(error)[:150]}"))
        print(rows[-1].name, rows[-1].note or "done", flush=True)
    return rows, ids


def _held_out(folder: Path) -> Tensor:
    """(16, 64) token ids of the demo's last texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    lines = (folder / "media/text.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines[-64:])
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    found: Tensor = ids[: len(ids) // 64 * 64].reshape(-1, 64)[:16]
    return found


def _text(rows: Sequence[Row], ids: Tensor, scheme: str) -> str:
    plain, ours = (row.logits for row in rows[:2])
    if plain is None or ours is None:
        raise RuntimeError("the run has no answer")
    cells = []
    for row in rows:
        if row.logits is None:
            cells.append((row.name, "-", "-", "-", row.note))
            continue
        found = row.logits[..., : plain.shape[-1]]
        surprise = cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        each = surprise.reshape(len(ids), -1).mean(1)
        error = f"{each.mean():.4f} ± {each.std() / len(each) ** 0.5:.4f}"
        cells.append((row.name, _relative(found, plain), _relative(found, ours), error, row.note))
    names = ("", "error against float", "against Alphasmith's module", "cross entropy [nats]", "")
    return "\n\n".join((machine(), f"Text demo, {scheme}, {len(ids)} windows of {ids.shape[1]}.", table(names, cells)))


def _relative(found: Tensor, reference: Tensor) -> str:
    return f"{float((found - reference).double().square().sum() / reference.double().square().sum()):.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--scheme", default="w8a8-channel-static")
    parser.add_argument("--environments", type=Path, default=environments_folder(), help="where tools are installed")
    parser.add_argument("--out", type=Path, nargs="?", const=_DOCUMENT, help="document; alone: docs/exports.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows, ids = _rows(arguments.tools, arguments.scheme, arguments.environments.resolve(), Path(work))
        publish("RECIPES", _text(rows, ids, arguments.scheme), arguments.out)


if __name__ == "__main__":
    main()
