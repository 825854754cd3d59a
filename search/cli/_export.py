"""``alphasmith export`` and ``alphasmith recipe``: a result in the format of another tool, or as a script for its quantizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alphasmith.objectives.text import listed, number, size_text
from alphasmith.search.cli._options import PATH, json_option, print_answer, storage_option

if TYPE_CHECKING:
    from alphasmith.search.exports.export import ExportResult


@click.command()
@click.argument("source", metavar="RUN|DIR")
@click.option("--format", "format_", metavar="compressed-tensors|onnx", required=True, help="What to write.")
@click.option(
    "--layout", metavar="ort-u8|ort-s8|qdq", help="Of onnx: for ONNX Runtime (default), for it and VNNI, or portable."
)
@click.option("--out", metavar="DIR2", type=PATH, required=True, help="Where it goes; must be empty.")
@storage_option
@click.option(
    "--unsmoothed-sites",
    is_flag=True,
    help="Write sites with a division at run time as if no alpha had been found, where the format has no place for it.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export in DIR2.")
@click.option("--data", type=PATH, help="With --unsmoothed-sites or onnx: the run's media, when they have moved.")
@click.option(
    "--allow-code",
    metavar="MODULE:FUNCTION|DIR",
    multiple=True,
    help="With --unsmoothed-sites or onnx: let code that the manifest names run; repeatable.",
)
@json_option
def export(source: str, format_: str, out: Path, as_json: bool, **places: Any) -> None:
    """Write the integer model of a run or training in the format of another tool.

    compressed-tensors: a folder that transformers and vLLM load. onnx: graphs for ONNX Runtime, OpenVINO and others.
    """
    from alphasmith.search.exports.export import export as exported

    result = exported(source, format_, out, **places)
    record = json.loads(result.record.to_json())
    answer = {"folder": str(result.folder), "bytes": result.bytes, "record": record}
    print_answer(answer, as_json, lambda: _text(result))


@click.command()
@click.argument("tool", metavar="TOOL")
@click.argument("source", metavar="RUN|DIR")
@click.option("--out", metavar="FILE.py", type=PATH, help="Write the script to a file, too.")
@storage_option
@json_option
def recipe(tool: str, source: str, out: Path | None, storage: str | None, as_json: bool) -> None:
    """Print the script with which a tool quantizes smoothed/ of a run, its own smoothing switched off.

    TOOL is llm-compressor, modelopt, inc (Neural Compressor), torchao or ctranslate2.
    """
    from alphasmith.search.exports.recipes.recipe import recipe as written

    text = written(tool, source, out, storage=storage)
    print_answer({"tool": tool, "script": text}, as_json, lambda: text.rstrip("\n"))


def _text(result: ExportResult) -> str:
    record = result.record
    lines = [
        f"{record.format}{'' if record.layout is None else f' ({record.layout})'} in {result.folder}: {len(record.operators)} quantized operators, {size_text(result.bytes)}",
    ]
    if record.left:
        reasons = sorted({one.reason for one in record.left})
        lines.append(f"float here: {listed([one.name for one in record.left])} ({listed(reasons)})")
    for site in record.unsmoothed:
        without, found = (number(value) for value in (site.loss_unsmoothed, site.loss))
        lines.append(f"unsmoothed: {site.name}, loss {without} in place of {found}")
    lines += [f"note: {note}" for note in record.notes]
    return "\n".join(lines)
