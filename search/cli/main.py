"""The command line, ``alphasmith``. Every input error is one line with field and remedy and exit code 2."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from alphasmith.objectives.errors import AlphasmithError, EquivalenceError, InputError
from alphasmith.objectives.text import one_line
from alphasmith.search.cli._compress import compress, join_compression, print_compression, resume_compression
from alphasmith.search.cli._db import db
from alphasmith.search.cli._export import export, recipe
from alphasmith.search.cli._finetune import finetune, print_training, resume_training
from alphasmith.search.cli._options import (
    PATH,
    interruptible,
    json_option,
    options,
    print_answer,
    seconds,
    storage_option,
)
from alphasmith.search.cli._processing import classify, generate
from alphasmith.search.cli._serve import serve
from alphasmith.search.config import RunConfig
from alphasmith.search.idle_threads import passive_waiting
from alphasmith.search.interruption import Interrupted
from alphasmith.search.large_pages import large_pages
from alphasmith.search.toml_values import apply_overrides

if TYPE_CHECKING:
    from alphasmith.search.launch.recorder import RunResult
    from alphasmith.storage.runs.compressions import CompressionRecord
    from alphasmith.storage.runs.records import RunRecord
    from alphasmith.storage.runs.trainings import TrainingRecord
    from alphasmith.storage.upkeep.garbage import Removal

# Every command imports what it does when it is called: `alphasmith list` must not wait for torch and transformers.

factory_options = options(
    click.option("--factory", metavar="MODULE:FUNCTION", help="Function that returns the model; runs your code."),
    click.option("--factory-path", type=PATH, help="Folder put on the module search path for --factory."),
)
allow_code_option = click.option(
    "--allow-code",
    metavar="MODULE:FUNCTION|DIR",
    multiple=True,
    help="Let code that the record names run: this function, or what lies in this folder; repeatable.",
)
engine_options = options(
    click.option("--engine", metavar="local|ray", help="Where candidates are evaluated."),
    click.option("--workers", metavar="N", type=int, help="Worker processes; short for --set workers.count=N."),
    click.option("--batch-size", metavar="N", type=int, help="Samples per forward call; fewer need less memory."),
    click.option("--dtype", metavar="own|float32", help="Type of the weights in smoothed/; default the model's own."),
)
config_options = options(
    click.argument("config", metavar="[CONFIG.toml]", required=False, type=PATH),
    click.option("--set", "overrides", metavar="a.b=c", multiple=True, help="Override one field; repeatable."),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="alphasmith")
def app() -> None:
    """Search smoothing coefficients for quantized neural networks, with every trial on record."""


app.add_command(db)
app.add_command(classify)
app.add_command(generate)
app.add_command(serve)
app.add_command(finetune)
app.add_command(compress)
app.add_command(export)
app.add_command(recipe)


@app.command()
@config_options
@click.option("--demo", metavar="image|text", help="Run an embedded demo.")
@click.option("--model", type=PATH, help="Model folder; short for --set model.path=DIR.")
@click.option("--data", type=PATH, help="Media file or folder; short for --set data.path=PATH.")
@factory_options
@click.option("--name", help="Free name of the run.")
@storage_option
@engine_options
@click.option("--out", metavar="DIR", type=PATH, help="Output folder; must not exist.")
@click.option("--round-scales", metavar="none|pow2", help="Round the scales of folded sites: undo is then bit exact.")
@click.option(
    "--new", "fresh", is_flag=True, help="Begin a new run even if an unfinished one of the same kind is there."
)
@json_option
def run(config: Path | None, overrides: tuple[str, ...], fresh: bool, as_json: bool, **flags: Any) -> None:
    """Search, smooth, quantize and keep a model.

    Without a configuration: the embedded image demo. An unfinished run of the same configuration, model and data is
    continued.
    """
    settings = _settings(config, (*overrides, *_as_overrides(flags)))
    with interruptible() as (progress, stop):
        from alphasmith.search.launch.pipeline import run as run_pipeline

        result = run_pipeline(settings, progress=progress, fresh=fresh, stop=stop)
    _print_result(result, as_json)


@app.command()
@click.argument("run", metavar="RUN")
@storage_option
@engine_options
@factory_options
@allow_code_option
@json_option
def resume(run: str, storage: str | None, allow_code: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Resume a run, a training or a compression that was interrupted, killed or failed, and finish it."""
    from alphasmith.storage.runs.compressions import is_compression_id
    from alphasmith.storage.runs.trainings import is_training_id

    changes = apply_overrides({}, _as_overrides(flags))
    with interruptible() as (progress, stop):
        if is_compression_id(run):
            compressed = resume_compression(
                run, storage, progress, stop, allow_code=allow_code, overrides=_as_overrides(flags)
            )
            print_compression(compressed, as_json)
            return
        if is_training_id(run):
            places = {name: flags[name] for name in ("factory", "factory_path")}
            trained = resume_training(run, storage, progress, stop, allow_code=allow_code, **places)
            print_training(trained, as_json)
            return
        from alphasmith.search.launch.pipeline import resume as resume_pipeline

        result = resume_pipeline(
            run, storage=storage, changes=changes, allow_code=allow_code, progress=progress, stop=stop
        )
    _print_result(result, as_json)


@app.command()
@click.argument("run", metavar="RUN|COMPRESSION")
@storage_option
@click.option("--workers", metavar="N", type=click.IntRange(min=0), default=0, help="Worker processes; 0: this one.")
@click.option("--artifacts", metavar="PLACE", help="Where the run's objects are, if not where its driver had them.")
@click.option("--device", help="Torch device of the searches; default: the first GPU, else the CPU.")
@click.option(
    "--wait",
    metavar="SECONDS",
    type=seconds(0.0),
    default=0.0,
    help="Wait so long for the run to appear, where driver and workers are launched together.",
)
@allow_code_option
@click.option("--no-finish", is_flag=True, help="Leave the writing of the result to the driver or to `resume`.")
@json_option
def worker(run: str, storage: str | None, no_finish: bool, as_json: bool, **options: Any) -> None:
    """Search sites of a run together with its driver and other workers, through its database. Or work on trials of a compression.

    For a run it needs neither the model nor the data, for a compression both and its folder. The last one to be done writes the
    result where no driver is alive to do it.
    """
    from alphasmith.storage.runs.compressions import is_compression_id

    if is_compression_id(run):
        join_compression(run, as_json, {**options, "storage": storage, "finish": not no_finish})
        return
    with interruptible() as (progress, stop):
        from alphasmith.search.launch.worker import work

        answer = work(run, storage=storage, finish=not no_finish, progress=progress, stop=stop, **options)
    from alphasmith.search.cli import answers

    print_answer(asdict(answer), as_json, lambda: answers.worker_text(answer))


def _print_result(result: RunResult, as_json: bool) -> None:
    from alphasmith.search.cli import tables as texts

    answer = {"run": result.id, "folder": str(texts.near(result.folder)), "storage": result.storage}
    print_answer(
        answer | {"manifest": json.loads(result.manifest.to_json())}, as_json, lambda: texts.result_text(result)
    )


@app.command("list")
@storage_option
@json_option
def list_(storage: str | None, as_json: bool) -> None:
    """List the runs in a storage, newest first."""
    from alphasmith.search.cli import answers, commands

    rows, compressions = commands.list_runs(storage), commands.list_compressions(storage)
    print_answer([*rows, *compressions], as_json, lambda: answers.runs_table(rows, compressions))


@app.command()
@click.argument("run", metavar="RUN")
@storage_option
@click.option("--watch", is_flag=True, help="Keep showing how far it is, until it ends or Ctrl-C.")
@click.option(
    "--interval",
    metavar="SECONDS",
    type=seconds(0.1),
    default=2.0,
    show_default=True,
    help="Time between two looks of --watch.",
)
@json_option
def show(run: str, storage: str | None, watch: bool, interval: float, as_json: bool) -> None:
    """Show one run: what was asked, what was found at every site; with --watch how far it is. Or one training, or one compression."""
    from alphasmith.search.cli import answers, commands
    from alphasmith.search.cli import tables as texts
    from alphasmith.search.cli.watching.watch import watch_run
    from alphasmith.storage.runs.compressions import is_compression_id
    from alphasmith.storage.runs.trainings import is_training_id

    if is_compression_id(run) and not watch:
        facts = commands.show_compression(run, storage)
        print_answer(facts, as_json, lambda: answers.compressions_text([facts]))
        return
    if is_training_id(run) and not watch:
        rows = commands.show_training(run, storage)
        print_answer(rows, as_json, lambda: answers.trainings_text([rows]))
        return
    if watch:
        watch_run(run, storage, interval=interval, as_json=as_json)
        return
    shown = commands.show_run(run, storage)
    print_answer(commands.shown_facts(shown) if as_json else None, as_json, lambda: texts.run_text(shown))


@app.command()
@click.argument("run", metavar="RUN|TRAINING|COMPRESSION")
@storage_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def delete(run: str, storage: str | None, yes: bool, as_json: bool) -> None:
    """Delete a run: its records, its trainings, their studies and the objects nothing else needs. Its output folder stays.

    Or one training alone, by its id (t-...): its record, study and checkpoints. Or one compression (c-...): its study.
    """
    from alphasmith.search.cli import commands
    from alphasmith.search.cli._db import removed_facts, removed_text
    from alphasmith.storage.runs.compressions import is_compression_id
    from alphasmith.storage.runs.trainings import is_training_id

    def sure(record: RunRecord | TrainingRecord | CompressionRecord, would: Sequence[Removal]) -> bool:
        if yes:
            return True
        if not sys.stdin.isatty():
            raise InputError("--yes", "is missing, and there is no terminal to ask on", "give it to delete unasked")
        name = f"{record.id} {getattr(record, 'name', '')}".strip()
        question = f"{name}, {record.status}\n{removed_text(would, dry_run=True)}\nDelete it?"
        return click.confirm(question, err=True)

    done = commands.delete(run, storage, sure=sure)
    if done is None:
        click.echo("nothing was deleted", err=True)
        click.get_current_context().exit(1)
    record, removed = done
    stays = f"\nits output folder stays: {record.folder}" if record.folder and Path(record.folder).exists() else ""
    kind = "training" if is_training_id(record.id) else "compression" if is_compression_id(record.id) else "run"
    answer = {kind: record.id, "folder": record.folder, **removed_facts(removed)}
    print_answer(answer, as_json, lambda: f"{record.id} is deleted\n{removed_text(removed, dry_run=False)}{stays}")


@app.command()
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--model", type=PATH, help="The original model folder, when it has moved.")
@click.option("--data", type=PATH, help="The run's media, when they have moved.")
@click.option("--run", metavar="RUN", help="Of an export: the run to compare its codes and scales with.")
@storage_option
@factory_options
@allow_code_option
@json_option
def verify(folder: Path, as_json: bool, run: str | None, storage: str | None, **places: Any) -> None:
    """Check every digest and prove that the smoothed model computes what the original does.

    Of a compression: every digest. Of an export: every digest, and that codes and scales are the run's.
    """
    from alphasmith.search.checkpoints import verification
    from alphasmith.search.cli import answers
    from alphasmith.storage.output.compressed_folder import is_compressed
    from alphasmith.storage.output.export_record import is_export

    if is_compressed(folder):
        from alphasmith.search.compression.artifact import verify_compressed

        checked = verify_compressed(folder)
        print_answer(checked, as_json, lambda: answers.verify_text(checked))
        return
    if is_export(folder):
        from alphasmith.search.exports.verification import verify_export

        checked = verify_export(folder, run=run, storage=storage)
        print_answer(checked, as_json, lambda: answers.verify_text(checked))
        return
    if run is not None:
        raise InputError("--run", f"is for exports, and {folder} is none", "leave it out")
    answer = verification.verify(folder, **places)
    print_answer(answer, as_json, lambda: answers.verify_text(answer))


@app.command()
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--out", metavar="DIR2", type=PATH, required=True, help="Where the model goes; must not exist.")
@json_option
def undo(folder: Path, out: Path, as_json: bool) -> None:
    """Take the scales out of a smoothed model again."""
    from alphasmith.search.checkpoints import verification

    answer = verification.undo(folder, out)
    print_answer(answer, as_json, lambda: f"{answer['parameters']} parameters restored in {answer['out']}")


@app.command()
@click.argument("run", metavar="RUN|DIR")
@click.option("--pick", "picked", metavar="POINT", type=int, help="Write the model of this point of the front.")
@click.option("--out", metavar="DIR2", type=PATH, help="With --pick: where it goes; must not exist.")
@storage_option
@json_option
def formats(run: str, picked: int | None, out: Path | None, storage: str | None, as_json: bool) -> None:
    """Show what formats of sites a run could choose from, at which cost; with --pick write the model of another point.

    Neither the model nor the data are needed: the run has kept what its points differ in.
    """
    from alphasmith.search.cli import answers, commands

    if (picked is None) != (out is None):
        missing = "--out" if out is None else "--pick"
        raise InputError(missing, "is missing", "give --pick POINT and --out DIR2 together, or neither")
    if picked is None or out is None:
        entry = commands.formats(run, storage)
        print_answer(entry.model_dump(mode="json"), as_json, lambda: answers.formats_text(entry))
        return
    answer = commands.pick_formats(run, picked, out, storage)
    print_answer(answer, as_json, lambda: f"point {answer['point']} is written to {answer['out']}")


@app.command()
@config_options
@click.option("--probe", is_flag=True, help="Ask the libraries of this machine how they multiply 8-bit integers.")
@json_option
def hardware(config: Path | None, overrides: tuple[str, ...], probe: bool, as_json: bool) -> None:
    """Show the detected budget and what the given one does to the alpha ranges."""
    from alphasmith.search.cli import answers, commands

    answer = commands.hardware(_settings(config, overrides), probe=probe)
    print_answer(answer, as_json, lambda: answers.hardware_text(answer))


@app.command()
@click.argument("run", metavar="RUN")
@click.option("--out", metavar="FILE.html", type=PATH, required=True, help="Where the report goes.")
@storage_option
@json_option
def report(run: str, out: Path, storage: str | None, as_json: bool) -> None:
    """Write one self-contained HTML page about a run."""
    from alphasmith.search.cli import commands

    commands.report(run, out, storage)
    print_answer({"report": str(out)}, as_json, lambda: f"report written to {out}")


@app.command()
@storage_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option(
    "--allow-host",
    "hosts",
    metavar="NAME",
    multiple=True,
    help="One more host name that requests may carry; repeatable.",
)
@click.option("--allow-write", is_flag=True, help="Let visitors write notes and tell trials.")
@click.option(
    "--token",
    envvar="ALPHASMITH_DASHBOARD_TOKEN",
    help="What requests must carry; default: nothing on loopback, a new one elsewhere. Better as ALPHASMITH_DASHBOARD_TOKEN.",
)
def dashboard(
    storage: str | None, host: str, port: int, hosts: tuple[str, ...], allow_write: bool, token: str | None
) -> None:
    """Serve the Optuna dashboard on a storage; read-only by default, with a token on any address but loopback."""

    from alphasmith.search.cli import commands

    def ready(url: str) -> None:
        click.echo(f"dashboard at {url}, Ctrl-C stops it", err=True)

    commands.dashboard(storage, host=host, port=port, hosts=hosts, allow_write=allow_write, token=token, ready=ready)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: errors a user can act on become one line on standard error."""
    if arguments is None:  # this process is ours, and has not imported torch yet
        os.environ.update({**passive_waiting(os.environ), **large_pages(os.environ)})
    try:
        code = app.main(args=arguments, prog_name="alphasmith", standalone_mode=False)
    except Interrupted as error:
        _fail(str(error), 130)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        # click turns KeyboardInterrupt into an Abort that says nothing.
        _fail(str(error) or str(error.__cause__ or "") or "interrupted", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "alphasmith"
        _fail(f"{command}: {error.format_message()} See `{command} --help`.", 2)
    except (InputError, EquivalenceError) as error:
        _fail(str(error), 2)
    except AlphasmithError as error:
        _fail(str(error), 1)
    sys.exit(code if isinstance(code, int) else 0)


def _settings(config: Path | None, overrides: tuple[str, ...]) -> RunConfig:
    if config is None:
        return RunConfig.build(apply_overrides({}, overrides))
    return RunConfig.from_toml(config, overrides)


def _as_overrides(flags: dict[str, Any]) -> list[str]:
    fields = {
        "demo": "model.demo",
        "model": "model.path",
        "data": "data.path",
        "factory": "model.factory",
        "factory_path": "model.factory_path",
        "workers": "workers.count",
        "batch_size": "data.batch_size",
    }
    given = {fields.get(flag, flag): value for flag, value in flags.items() if value is not None}
    return [f"{name}={_as_toml(value)}" for name, value in given.items()]


def _as_toml(value: Any) -> str:
    """A value as TOML writes it. JSON does likewise, but for characters beyond the first 65 536 and one control character."""
    text = json.dumps(value if isinstance(value, int) else str(value), ensure_ascii=False)
    return "".join(c if c.isprintable() or c == " " else f"\\U{ord(c):08x}" for c in text)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
