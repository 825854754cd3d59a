"""Models to serve, and services that run in a thread of the test."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from alphasmith.dashboards.listening import Listener
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import MediaKind
from alphasmith.objectives.media import Content, NamedBytes
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.items import MediaItem
from alphasmith.search.processing.classifier import Classified, ClassProbability
from alphasmith.search.processing.description import ModelDescription
from alphasmith.search.processing.service.server import ModelServer, access_to

BOUNDARY = "3f1c0e5b7a"


class Spelling:
    """A model without weights: the class of an item is the number of its letters, the last class for all longer ones.

    ``refused`` is an item that it refuses to decode, ``poison`` one that fails in the forward call, ``defect`` one that fails
    as only a defect does.
    """

    def __init__(self, kind: MediaKind = "text", classes: int = 8) -> None:
        self.classes: tuple[str, ...] | None = tuple(f"{number} letters" for number in range(classes))
        self.description = ModelDescription(
            run="r-20260101-abcdef",
            run_name="spelling",
            name="Spelling",
            folder="nowhere",
            kind=kind,
            classes=self.classes,
            scheme="w8a8-channel-static",
            parameters=0,
            finished="2026-01-01T00:00:00+00:00",
            metrics={"accuracy": {"float": 1.0, "quantized": 0.5}},
            digests={"float model": "0" * 64},
        )
        self.calls: list[list[str]] = []
        #: A call waits for a permit each time, where there is a gate.
        self.gate: threading.Semaphore | None = None
        self.entered = threading.Semaphore(0)

    def decode(self, item: Content | str, name: str = "") -> MediaItem:
        """Its text as the name of the item."""
        text = (
            item
            if isinstance(item, str)
            else item.data.decode("utf-8", "replace")
            if isinstance(item, NamedBytes)
            else item.name
        )
        if text == "refused":
            raise InputError("item", f"{name} is refused", "give another one")
        return MediaItem(name=text, batch=Batch(kwargs={"x": torch.zeros(1, 1)}))

    def classify(self, items: Sequence[MediaItem], *, top: int | None = None) -> Sequence[Classified]:
        """Answers that depend on nothing but the item."""
        self.calls.append([item.name for item in items])
        self.entered.release()
        if self.gate is not None:
            assert self.gate.acquire(timeout=120)
        if any(item.name == "defect" for item in items):
            raise ZeroDivisionError("a defect")
        if any(item.name == "poison" for item in items):
            raise InputError("item", "the model answers with NaN", "give another one")
        return [self._answer(item, top or 5) for item in items]

    def _answer(self, item: MediaItem, top: int) -> Classified:
        names = self.classes or ()
        best = min(len(item.name), len(names) - 1)
        shares = [0.0] * len(names)
        shares[best], shares[best - 1] = 0.75, 0.25
        ranked = sorted(range(len(names)), key=lambda number: -shares[number])[:top]
        return Classified(
            name=item.name,
            probabilities=tuple(shares),
            top=tuple(ClassProbability(index=i, name=names[i], probability=shares[i]) for i in ranked),
        )


@contextmanager
def served(model: Any, *, hosts: Sequence[str] = (), token: str | None = None, **settings: Any) -> Iterator[int]:
    """The port of a service of a model, while it serves."""
    listener = Listener("127.0.0.1", 0)
    port = int(listener.socket.getsockname()[1])
    server = ModelServer(model, listener, access=access_to(listener, hosts=hosts, token=token), **settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield port
    finally:
        if (gate := getattr(model, "gate", None)) is not None:
            gate.release(10_000)
        server.close()
        thread.join(60)
        assert not thread.is_alive()


def multipart(files: Sequence[tuple[str, bytes]], part: str = "file") -> tuple[bytes, dict[str, str]]:
    """A body with files, and the header that goes with it."""
    body = b""
    for name, data in files:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{part}"; filename="{name}"\r\n\r\n'
        body += head.encode() + data + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def as_json(*texts: str) -> tuple[bytes, dict[str, str]]:
    """A body with texts, and the header that goes with it."""
    return json.dumps({"texts": texts}).encode(), {"Content-Type": "application/json"}


def ask(
    port: int, method: str = "GET", path: str = "/v1/model", body: bytes | None = None, headers: Mapping[str, str] = {}
) -> tuple[int, dict[str, str], Any]:
    """One request; answers (status, headers with lower-case names, JSON or bytes)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, body=body, headers=dict(headers))
        response = connection.getresponse()
        content = response.read()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return response.status, fields, json.loads(content) if "json" in fields.get("content-type", "") else content
    finally:
        connection.close()


def classify(port: int, *texts: str, query: str = "") -> tuple[int, dict[str, str], Any]:
    """One request with texts."""
    body, headers = as_json(*texts)
    return ask(port, "POST", f"/v1/classify{query}", body, headers)
