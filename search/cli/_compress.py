"""``alphasmith compress``: a model made smaller by sparse, low-rank and codebook forms together, as a study."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.text import counted
from alphasmith.search.cli._options import PATH, interruptible, json_option, print_answer, storage_option
from alphasmith.search.toml_values import apply_overrides

if TYPE_CHECKING:
    from alphasmith.search.compression.compress import CompressionResult
    from alphasmith.search.progress import Progress


@click.command()
@click.argument("source", metavar="[CONFIG.toml|ID]", required=False)
@click.option("--set", "overrides", metavar="a.b=c", multiple=True, help="Set any field; repeatable.")
@click.option(
    "--tolerance", "tolerances", metavar="METRIC=DROP", multiple=True, help="How much worse it may be; repeatable."
)
@click.option("--trials", type=int, help="Trials of the study; short for --set study.trials=N.")
@storage_option
@click.option("--engine", metavar="local|ray", help="Where trials are worked on.")
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=1),
    help="Worker processes, with Ray workers at once; short for --set workers.count=N.",
)
@click.option("--out", metavar="DIR", type=PATH, help="Output folder; must not exist.")
@click.option("--pick", "picked", metavar="TRIAL", type=int, help="Write this trial of a finished compression's front.")
@click.option(
    "--allow-code",
    metavar="MODULE:FUNCTION|DIR",
    multiple=True,
    help="With an ID: let code that its record names run: this function, or what lies in this folder; repeatable.",
)
@click.option("--new", "fresh", is_flag=True, help="Begin a new compression even if an unfinished one is there.")
@json_option
def compress(
    source: str | None,
    overrides: tuple[str, ...],
    tolerances: tuple[str, ...],
    trials: int | None,
    storage: str | None,
    engine: str | None,
    workers: int | None,
    out: Path | None,
    picked: int | None,
    allow_code: tuple[str, ...],
    fresh: bool,
    as_json: bool,
) -> None:
    """Make a model smaller by sparse, low-rank and codebook forms together.

    A study chooses strengths, energies or rank and alpha, and entries of tables; what a model may lose is a limit. The smallest
    model within the limits is written, and any other of the front with --pick. Without a configuration: the embedded speech
    enhancement. An unfinished compression of the same model and settings is continued; with an ID, this one. Other processes join
    with `alphasmith worker ID`.
    """
    from alphasmith.storage.runs.compressions import is_compression_id

    given = (*overrides, *(f"drop.tolerances.{told}" for told in tolerances))
    given += () if trials is None else (f"study.trials={trials}",)
    given += () if workers is None else (f"workers.count={workers}",)
    given += () if engine is None else (f"engine={json.dumps(engine)}",)
    with interruptible() as (progress, stop):
        if picked is not None:
            result = _picked(source, picked, given, storage, out, allow_code, progress, stop)
        elif source is not None and is_compression_id(source):
            if out is not None or fresh:
                raise InputError("--out" if out else "--new", "given with an ID", "leave it out")
            result = resume_compression(source, storage, progress, stop, allow_code=allow_code, overrides=given)
        else:
            result = _compressed(source, given, storage, out, fresh, progress, stop)
    print_compression(result, as_json)


def resume_compression(
    compression: str, storage: str | None, progress: Progress, stop: Callable[[], bool], **places: Any
) -> CompressionResult:
    """``alphasmith resume`` of a compression.

    Args:
        compression: Its id, or the beginning of it.
        storage: Its database.
        progress: Receives stages and notes.
        stop: Polled.
        places: ``allow_code``, and ``overrides`` of the configuration.
    """
    from alphasmith.search.compression.compress import resume_compression as resumed

    changes = apply_overrides({}, places.pop("overrides", ()))
    return resumed(compression, storage=storage, changes=changes, progress=progress, stop=stop, **places)


def join_compression(compression: str, as_json: bool, options: Mapping[str, Any]) -> None:
    """``alphasmith worker`` on a compression.

    Args:
        compression: Its id, or the beginning of it.
        as_json: Whether to answer as JSON.
        options: Of the command.
    """
    if options["artifacts"] is not None:
        raise InputError(
            "--artifacts", "given with a compression", "leave it out: its stages are in files of its folder"
        )
    given = {name: value for name, value in options.items() if name != "artifacts"}
    with interruptible() as (progress, stop):
        from alphasmith.search.compression.worker import work

        done = work(compression, progress=progress, stop=stop, **given)

    def text() -> str:
        result = "result" if done.finished else "its result is, or will be,"
        return (
            f"{counted(done.trials, 'trial')} of {done.compression} made here; {done.note}\n{result} in {done.folder}"
        )

    print_answer(asdict(done), as_json, text)


def print_compression(result: CompressionResult, as_json: bool) -> None:
    """What a compression came to.

    Args:
        result: Of the compression.
        as_json: Whether as JSON.
    """
    from alphasmith.search.cli.answers import compression_text

    manifest = json.loads(result.manifest.to_json())
    answer: dict[str, Any] = {"compression": result.id, "folder": str(result.folder), "storage": result.storage}
    answer |= {"front": list(result.front), "manifest": manifest}
    print_answer(answer, as_json, lambda: compression_text(manifest, str(result.folder)))


def _compressed(
    source: str | None,
    overrides: tuple[str, ...],
    storage: str | None,
    out: Path | None,
    fresh: bool,
    progress: Progress,
    stop: Callable[[], bool],
) -> CompressionResult:
    from alphasmith.search.compression.compress import compress as made
    from alphasmith.search.compression.config import CompressConfig

    places = {"storage": storage, "out": None if out is None else str(out)}
    given = {name: value for name, value in places.items() if value is not None}
    if source is None:
        config = CompressConfig.build(apply_overrides({}, overrides) | given)
    else:
        read = CompressConfig.from_toml(Path(source), overrides)
        config = CompressConfig.build(read.model_dump() | given)
    return made(config=config, progress=progress, fresh=fresh, stop=stop)


def _picked(
    source: str | None,
    trial: int,
    overrides: tuple[str, ...],
    storage: str | None,
    out: Path | None,
    allow_code: tuple[str, ...],
    progress: Progress,
    stop: Callable[[], bool],
) -> CompressionResult:
    from alphasmith.search.compression.compress import pick
    from alphasmith.storage.runs.compressions import is_compression_id

    if overrides:
        raise InputError(overrides[0].partition("=")[0], "given with --pick", "leave it out: a trial is what it was")
    if out is None:
        raise InputError("--out", "is missing", "name the folder for the model of this trial")
    if source is None or not is_compression_id(source):
        raise InputError("ID", "is missing", "say which compression: alphasmith compress ID --pick TRIAL --out DIR")
    return pick(source, trial, out, storage=storage, allow_code=allow_code, progress=progress, stop=stop)
