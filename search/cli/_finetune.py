"""``alphasmith finetune``: a compressed model trained further on labelled media."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alphasmith.search.cli._options import (
    PATH,
    interruptible,
    json_option,
    options,
    place_options,
    print_answer,
    storage_option,
)
from alphasmith.search.toml_values import apply_overrides, merged

if TYPE_CHECKING:
    from alphasmith.search.interruption import Interruption
    from alphasmith.search.progress import Progress
    from alphasmith.search.training.finetune import TrainingResult

data_options = options(
    click.option("--data", type=PATH, help="Labelled media: a folder with a folder for each class, or a table."),
    click.option("--files", metavar="COLUMN", help="Column of the table that names media files."),
    click.option("--column", metavar="COLUMN", help="Column or field that holds the text; default text."),
    click.option("--label", metavar="COLUMN", help="Column or field that holds the class; default by the usual names."),
    click.option("--labels", metavar="FILE", type=PATH, help="Names of the model's classes, one a line, in its order."),
    click.option("--partial-classes", is_flag=True, help="Allow that classes of the model are missing in the data."),
    click.option("--fraction", type=float, help="Share of the data to train on; default 0.05."),
    click.option("--held-out", type=float, help="Share of the data to hold out; default 0.1."),
)
training_options = options(
    click.option("--loss", metavar="cross_entropy|mse|hinge", help="What a sample costs."),
    click.option("--distill", type=float, help="Share of the distance from the float model in the loss; default 0."),
    click.option("--learning-rate", type=float, help="Largest learning rate; default 2e-4."),
    click.option("--steps", type=int, help="Updates of the weights; default as many as --epochs ask for."),
    click.option("--epochs", type=float, help="Passes over the samples to train on; default 3."),
    click.option("--batch-size", type=int, help="Samples of a forward pass; default 16."),
    click.option("--seed", type=int, help="Of the samples drawn, their order and dropout."),
    click.option("--set", "overrides", metavar="a.b=c", multiple=True, help="Any field, e.g. training.clip=0.5."),
    click.option("--study", metavar="N", type=int, help="First try N settings around these, as an Optuna study."),
)
#: Option -> field.
_FIELDS = {
    "data": "data.path",
    **{
        name: f"data.{name}"
        for name in ("files", "column", "label", "labels", "partial_classes", "fraction", "held_out")
    },
    **{
        name: f"training.{name}"
        for name in ("loss", "distill", "learning_rate", "steps", "epochs", "batch_size", "seed")
    },
}


@click.command()
@click.argument("run", metavar="RUN|DIR")
@data_options
@training_options
@click.option("--out", metavar="DIR", type=PATH, help="Output folder; must not exist. Default: beside the run's.")
@storage_option
@place_options
@click.option("--new", "fresh", is_flag=True, help="Begin a new training even if an unfinished one is there.")
@json_option
def finetune(run: str, overrides: tuple[str, ...], fresh: bool, as_json: bool, **given: Any) -> None:
    """Train the compressed model of a run further, through its quantizers.

    RUN is a finished run, or its output folder; nothing of it is changed. The result is an integer model again, in a folder of
    its own; where training makes nothing better on held-out samples, the untrained model stays. An unfinished training of the
    same settings, model and data is continued from its last checkpoint.
    """
    places = {name: given.pop(name) for name in ("path", "factory", "factory_path", "allow_code")}
    values = _values(given, overrides)
    with interruptible() as (progress, stop):
        result = _finetune(run, values, progress, stop, fresh=fresh, **places)
    print_training(result, as_json)


def resume_training(
    training: str, storage: str | None, progress: Progress, stop: Interruption, **places: Any
) -> TrainingResult:
    """``alphasmith resume`` of a training.

    Args:
        training: Its id, or the beginning of it.
        storage: Its database.
        progress: Receives stages and notes.
        stop: Polled.
        places: Where the architecture comes from.
    """
    from alphasmith.search.training.finetune import resume_training as resumed

    return resumed(training, storage=storage, progress=progress, stop=stop, **places)


def print_training(result: TrainingResult, as_json: bool) -> None:
    """What a training came to.

    Args:
        result: Of the training.
        as_json: Whether as JSON.
    """
    from alphasmith.search.cli.answers import training_text

    answer = {"training": result.id, "folder": str(result.folder), "storage": result.storage, "kept": result.kept}
    manifest = json.loads(result.manifest.to_json())
    text = training_text(manifest["training"], str(result.folder))
    print_answer(answer | {"manifest": manifest}, as_json, lambda: text)


def _finetune(
    run: str, values: dict[str, Any], progress: Progress, stop: Callable[[], bool], **places: Any
) -> TrainingResult:
    from alphasmith.search.training.config import FinetuneConfig
    from alphasmith.search.training.finetune import finetune as train

    source = Path(run) if Path(run).is_dir() else run
    return train(source, FinetuneConfig.build(values), progress=progress, stop=stop, **places)


def _values(given: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a configuration from options; what an option says goes before ``--set``."""
    values = apply_overrides({}, overrides)
    for name, value in given.items():
        if value is None or value is False:
            continue
        section, _, field = _FIELDS.get(name, name).partition(".")
        values = merged(values, {section: {field: value} if field else value})
    return values
