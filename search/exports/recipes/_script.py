"""The lines that all recipes share: what the script is, its imports, the smoothed model and what the run knows of its layers."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from alphasmith.objectives.text import listed
from alphasmith.search.exports.recipes._facts import RecipeFacts

_WIDTH = 110

#: The float model, and the scales that the run stored beside its codes.
_LOADED = """\
model = {architecture}.from_pretrained(RESULT / "smoothed").eval()
record = json.loads((RESULT / "quantized" / "quantization.json").read_text())
linear = [one for one in record["operators"] if one["kind"] == "linear" and not one["transposed"]]
operators = {{one["name"]: one["scheme"] for one in linear}}
files = sorted((RESULT / "quantized").glob("*.safetensors"))
ours = {{name: tensor for file in files for name, tensor in load_file(file).items()}}
ours |= {{name: ours[stored] for name, stored in record["aliases"].items()}}  # tensors that several layers share
"""


def head(facts: RecipeFacts, tool: str, *, checked: str, about: Sequence[str], imports: Sequence[str]) -> str:
    """What the script is, its imports, and where it reads and writes.

    Args:
        facts: Of the result.
        tool: Name and version of the tool.
        checked: How Alphasmith knows that the script is right.
        about: Sentences on what the tool does with the result.
        imports: Lines with the imports.
    """
    schemes = ", ".join(scheme.name for scheme in facts.schemes)
    left = f"In float, for they are no linear layers: {listed(facts.elsewhere)}." if facts.elsewhere else ""
    out = f"{facts.folder}-{tool.split()[0].lower()}"
    return "\n".join(
        (
            f'"""Run {facts.run} ({schemes}) with {tool}.',
            "",
            *_wrapped(" ".join(filter(None, (*about, left)))),
            "",
            *_wrapped(checked),
            '"""',
            "",
            *imports,
            "",
            f"RESULT = Path({literal(str(facts.folder))})",
            f"OUT = Path({literal(out)})",
            "",
        )
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False)


def loaded(facts: RecipeFacts) -> str:
    """Lines that load ``smoothed/``, the tensors of ``quantized/``, and the schemes of the linear layers by their names."""
    return _LOADED.format(architecture=facts.architecture)


def beside(facts: RecipeFacts) -> str:
    """Lines that copy the files beside the weights, e.g. of the tokenizer; none where there are none."""
    files = [name for name in facts.companions if Path(name).name == name]
    return f'for file in {literal(files)}:\n    shutil.copy(RESULT / "smoothed" / file, OUT / file)\n' if files else ""


def executed(tool: str) -> str:
    """The words for a recipe that tests run."""
    return f"Alphasmith's tests run this script with {tool}."


def compared(tool: str) -> str:
    """The words for a recipe whose tool wants an environment of its own, where tests run it only where there is one."""
    return (
        f"Wants an environment of its own with {tool}. Alphasmith's tests compare names and arguments with its signatures; "
        "`python -m benchmarks.recipes` of its repository runs the script."
    )


def literal(value: object) -> str:
    """Strings, numbers and lists of them as Python writes them, with double quotes."""
    return json.dumps(value, ensure_ascii=False)
