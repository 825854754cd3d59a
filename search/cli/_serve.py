"""``alphasmith serve``: the integer model of a run behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from alphasmith.objectives.extras import require_extra
from alphasmith.objectives.literals import MediaKind
from alphasmith.search.cli._options import PATH, options, place_options, seconds, storage_option
from alphasmith.search.config import parse_bytes


def _size(context: click.Context, option: click.Parameter, value: str) -> int:
    """A positive number of bytes, also as ``32 MiB``."""
    try:
        size = parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", context, option) from error
    if not isinstance(size, int) or size < 1:
        raise click.BadParameter(f"{value!r} is not above 0.", context, option)
    return size


_model_options = options(
    click.option("--labels", metavar="FILE", type=PATH, help="Names of the classes, where the model has none."),
    click.option("--kind", metavar="text|image|audio|video", help="What the model takes, where it does not say."),
    click.option(
        "--output", metavar="logits|probabilities", help="What the model answers with, where it does not say."
    ),
)
_address_options = options(
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option("--port", default=8090, show_default=True, type=click.IntRange(0, 65535), help="Port; 0: a free one."),
    click.option("--allow-host", "hosts", metavar="NAME", multiple=True, help="One more host name; repeatable."),
    click.option(
        "--token",
        envvar="ALPHASMITH_SERVE_TOKEN",
        help="What requests must carry; default: nothing on loopback, a new one elsewhere. "
        "Better as ALPHASMITH_SERVE_TOKEN.",
    ),
)
_limit_options = options(
    click.option("--batch", metavar="N", type=click.IntRange(1, 4096), default=32, show_default=True, help="Items that share a forward call at most."),
    click.option("--wait", metavar="SECONDS", type=seconds(0.0), default=0.003, show_default=True, help="How long the first of them waits for others."),
    click.option("--queue", metavar="N", type=click.IntRange(1, 10**6), default=512, show_default=True, help="Items that are accepted and not answered yet, at most."),
    click.option("--max-bytes", metavar="SIZE", callback=_size, default="32 MiB", show_default=True, help="Largest request."),
    click.option("--max-items", metavar="N", type=click.IntRange(1, 10**5), default=64, show_default=True, help="Items of a request."),
    click.option("--max-pixels", metavar="N", type=click.IntRange(1), default=2**26, show_default=True, help="Largest picture, and all frames of a clip."),
    click.option("--max-seconds", metavar="SECONDS", type=seconds(0.001), default=30.0, show_default=True, help="Longest piece of a sound that is used."),
    click.option("--upload-time", metavar="SECONDS", type=seconds(0.001), default=30.0, show_default=True, help="Longest time of a request on its way."),
    click.option("--answer-time", metavar="SECONDS", type=seconds(0.001), default=60.0, show_default=True, help="Longest time of an answer."),
)  # fmt: skip


@click.command()
@click.argument("source", metavar="RUN|DIR")
@storage_option
@_address_options
@_model_options
@place_options
@_limit_options
def serve(
    source: str,
    host: str,
    port: int,
    hosts: tuple[str, ...],
    token: str | None,
    labels: Path | None,
    kind: MediaKind | None,
    output: Any,
    batch: int,
    wait: float,
    queue: int,
    max_bytes: int,
    max_items: int,
    max_pixels: int,
    max_seconds: float,
    upload_time: float,
    answer_time: float,
    **place: Any,
) -> None:
    """Serve the integer model of a run over HTTP: media or texts in, probabilities and classes out.

    SIGTERM or Ctrl-C stops it when all that was accepted is answered; a second Ctrl-C at once.
    """
    require_extra("serve", "serve")
    from alphasmith.objectives.media.items import ItemLimits
    from alphasmith.search.processing.classifier import Classifier
    from alphasmith.search.processing.service.server import BatchSettings, RequestLimits
    from alphasmith.search.processing.service.server import serve as serve_model

    def load() -> Classifier:
        limits = ItemLimits(bytes=max_bytes, pixels=max_pixels, seconds=max_seconds)
        return Classifier.opened(
            source, labels=labels, kind=kind, output=output or "auto", batch=batch, limits=limits, **place
        )

    def ready(url: str) -> None:
        click.echo(f"serving {source}; its page is {url}, Ctrl-C stops it", err=True)

    requests = RequestLimits(
        bytes=max_bytes, held=max(16 * max_bytes, 2**29), items=max_items, upload=upload_time, answer=answer_time
    )
    serve_model(
        load,
        host=host,
        port=port,
        hosts=hosts,
        token=token or None,
        batch=BatchSettings(most=batch, wait=wait, places=queue),
        requests=requests,
        ready=ready,
    )
