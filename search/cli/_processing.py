"""``alphasmith classify`` and ``alphasmith generate``: the compressed model at work."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.reading import read_text
from alphasmith.objectives.text import counted, one_line, visible
from alphasmith.search.cli._options import PATH, F, place_options, storage_option

if TYPE_CHECKING:
    from alphasmith.search.processing.classifier import Classified
    from alphasmith.search.processing.generator import Generated


def _placed(function: F) -> F:
    """The options that say where a model is and how it is built."""
    return storage_option(place_options(function))


#: Columns of ``--csv``.
_COLUMNS = ("item", "rank", "index", "class", "probability")


class Top(click.ParamType[Any]):
    """A number of classes, or all of them."""

    name = "top"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A number, or ``all`` as it is."""
        if value == "all":
            return value
        if isinstance(value, int) or (str(value).isascii() and str(value).isdecimal() and int(value) > 0):
            return int(value)
        self.fail(f"{value!r} is neither a number above 0 nor 'all'.", param, ctx)


@click.command()
@click.argument("run", metavar="RUN|DIR")
@click.argument("files", metavar="[FILES]...", nargs=-1)
@click.option("--text", "texts", metavar="TEXT", multiple=True, help="A text itself; repeatable.")
@click.option("--files-from", metavar="FILE", help="File with one path a line; - for standard input.")
@click.option("--lines", is_flag=True, help="Take every line of a text file as a text of its own.")
@click.option(
    "--column", metavar="NAME", default="text", show_default=True, help="Field of a table that holds the text."
)
@click.option(
    "--top", metavar="N|all", type=Top(), help="Classes that are named; default 5, or all where there are fewer."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line for each item.")
@click.option("--csv", "as_csv", is_flag=True, help="Print a table with one line for each class that is named.")
@click.option(
    "--batch",
    metavar="N",
    type=click.IntRange(1, 2**16),
    default=32,
    show_default=True,
    help="Items in a forward call at most.",
)
@click.option("--labels", metavar="FILE", type=PATH, help="Names of the classes: one a line, or JSON with id2label.")
@click.option("--kind", metavar="text|image|audio|video", help="What the model takes, where nothing says it.")
@click.option(
    "--output",
    metavar="logits|probabilities|auto",
    default="auto",
    show_default=True,
    help="What the model answers with.",
)
@click.option(
    "--max-seconds", metavar="S", type=float, default=30.0, show_default=True, help="Longest sound that is heard."
)
@click.option("--max-tokens", metavar="N", type=int, help="Longest text that is read; default: as the model takes.")
@_placed
@click.pass_context
def classify(
    context: click.Context,
    /,
    run: str,
    files: tuple[str, ...],
    texts: tuple[str, ...],
    files_from: str | None,
    lines: bool,
    column: str,
    top: Any,
    as_json: bool,
    as_csv: bool,
    max_seconds: float,
    max_tokens: int | None,
    **settings: Any,
) -> None:
    """Classify media with the quantized model of a run.

    FILES are files, folders, patterns or - for standard input. An item that cannot be used is reported, the others are
    done, and the exit code is 1.
    """
    if as_json and as_csv:
        raise InputError("--csv", "is given together with --json", "choose one of them")
    from alphasmith.objectives.media.items import ItemLimits
    from alphasmith.search.processing.classifier import Classifier, Refused
    from alphasmith.search.processing.sources import ItemSource

    source = ItemSource(texts=texts, places=files, listed=files_from, column=column, lines=lines)
    source.check()
    limits = ItemLimits(seconds=max_seconds, tokens=max_tokens)
    classifier = Classifier.opened(run, limits=limits, **settings)
    source.check_kind(classifier.description.kind)
    for note in classifier.description.notes:
        _note(note)
    refused = done = 0
    print_one = _as_json if as_json else _as_csv if as_csv else _as_text
    if as_csv:
        click.echo(_csv_line(_COLUMNS))
    items = source.items(classifier.description.kind, limits, sys.stdin.buffer)
    for answer in classifier.stream(items, top=top):
        done += 1
        if isinstance(answer, Refused):
            refused += 1
            told = f"{answer.error.problem}; {answer.error.remedy}"
            _told("error", told if answer.name in told else f"{answer.name}: {told}")
            if as_json:
                click.echo(_json_line({"item": answer.name, "error": told}))
        else:
            for note in answer.notes:
                _note(f"{answer.name}: {note}")
            click.echo(print_one(answer))
    if not done:
        raise InputError("FILES", "there is nothing in them", "give files that are not empty")
    if refused:
        _note(f"{refused} of {counted(done, 'item')} could not be classified")
        context.exit(1)


@click.command()
@click.argument("run", metavar="RUN|DIR")
@click.option("--prompt", "prompts", metavar="TEXT", multiple=True, help="What the text follows; repeatable.")
@click.option("--prompts", "listed", metavar="FILE", help="File with one prompt a line; - for standard input.")
@click.option("--chat", is_flag=True, help="Put each prompt into the model's chat template.")
@click.option(
    "--max-tokens", metavar="N", type=int, default=128, show_default=True, help="Tokens that are written at most."
)
@click.option(
    "--temperature",
    metavar="T",
    type=float,
    default=0.0,
    show_default=True,
    help="Draw tokens; 0: the most probable ones.",
)
@click.option(
    "--top-p", metavar="P", type=float, default=1.0, show_default=True, help="Draw out of this share of them."
)
@click.option("--seed", metavar="N", type=int, default=0, show_default=True, help="Of the first prompt's drawing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line for each prompt.")
@_placed
def generate(
    run: str,
    prompts: tuple[str, ...],
    listed: str | None,
    chat: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    as_json: bool,
    **place: Any,
) -> None:
    """Write texts that follow prompts with the quantized language model of a run.

    A single text is printed as it is; of several, each comes after its prompt.
    """
    given = [*prompts, *_prompts_of(listed)]
    if not given:
        raise InputError("--prompt", "is missing", "give one, or --prompts FILE")
    from alphasmith.search.processing.generator import Decoding, Generator

    decoding = Decoding(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    generator = Generator.opened(run, **place)
    for number, text in enumerate(generator.generate(given, chat=chat, decoding=decoding)):
        for note in text.notes:
            _note(note)
        if as_json:
            click.echo(_json_line(_generated(text)))
        else:
            shown = [text.text] if len(given) == 1 else [*([""] * bool(number)), f"> {text.prompt}", text.text]
            click.echo(visible("\n".join(shown)))


def _prompts_of(listed: str | None) -> Iterator[str]:
    if listed is None:
        return
    if listed == "-":
        text = sys.stdin.buffer.read().decode(errors="replace")
    else:
        text = read_text(Path(listed), field="--prompts", remedy="give a file with one prompt a line")
    yield from (line for line in text.splitlines() if line.strip())


def _as_text(answer: Classified) -> str:
    named = ", ".join(f"{found.name} {found.probability:.4f}" for found in answer.top)
    return one_line(f"{answer.name}: {named}")


def _as_csv(answer: Classified) -> str:
    return "\n".join(
        _csv_line((answer.name, rank, found.index, found.name, repr(found.probability)))
        for rank, found in enumerate(answer.top, 1)
    )


def _as_json(answer: Classified) -> str:
    top = [{"index": c.index, "class": c.name, "probability": c.probability} for c in answer.top]
    return _json_line({"item": answer.name, **top[0], "top": top, "notes": list(answer.notes)})


def _generated(text: Generated) -> dict[str, Any]:
    return {
        "prompt": text.prompt,
        "text": text.text,
        "tokens": text.tokens,
        "stopped": text.stopped,
        "notes": list(text.notes),
    }


def _json_line(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, allow_nan=False)


def _csv_line(cells: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow([visible(cell) if isinstance(cell, str) else cell for cell in cells])
    return line.getvalue()


def _note(text: str) -> None:
    _told("note", text)


def _told(what: str, text: str) -> None:
    print(f"{what}: {one_line(text)}", file=sys.stderr, flush=True)
