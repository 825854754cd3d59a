"""The service as an ASGI application: routes, what they refuse, and how long an answer may take."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException as StarletteHTTPException

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.media import NamedBytes
from alphasmith.objectives.media.items import MediaItem
from alphasmith.objectives.text import one_line
from alphasmith.search.processing.classifier import Classified
from alphasmith.search.processing.service._batching import Batcher, BatchSettings, QueueFull, Stopping
from alphasmith.search.processing.service._bodies import PART, Bodies
from alphasmith.search.processing.service._metrics import CONTENT_TYPE, Metrics
from alphasmith.search.processing.service._schemas import (
    Answer,
    ClassShare,
    Health,
    ItemClassified,
    ItemRefused,
    MetricPair,
    ModelFacts,
    Problem,
    Texts,
)
from alphasmith.search.processing.service._types import Model, RequestLimits

_LOG = logging.getLogger(__name__)
#: Threads that decode media: a picture takes far longer than a small model, and its library leaves the interpreter to others.
_DECODERS = min(4, os.cpu_count() or 1)
#: Classes that are named unless more or fewer are asked for.
_TOP = 5
_ABOUT = """\
A model that Alphasmith quantized, as a classifier. Media and texts stay in memory. One bad item fails alone: its result says why,
and the status is 200 unless every item of the request failed."""
#: Reasons of refusals, as the OpenAPI page tells them.
_REFUSALS = {
    400: "The body cannot be read.",
    401: "The token is missing or wrong.",
    403: "The host name is not served, or the request comes from another site.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The type of the body is not taken.",
    429: "The queue is full; come again after Retry-After seconds.",
    500: "A defect; the log of the service tells more.",
    503: "The service stops, or the answer took too long.",
}


@dataclass(frozen=True, kw_only=True)
class _Job:
    """An item in the queue, and how many classes are to be named."""

    item: MediaItem
    top: int


class Service:
    """A model behind HTTP, without the server. Close it when it is not used any more.

    Args:
        model: What is served; one thread runs it, several decode. Its classes are known.
        batch: How items are taken together.
        requests: What requests may ask for.
        clock: Seconds, monotonic.

    Attributes:
        application: The ASGI application, without access rules.
        metrics: What it counts.
        routes: Paths that it answers.

    Raises:
        InputError: Nobody says which classes the model has.
    """

    def __init__(
        self,
        model: Model,
        *,
        batch: BatchSettings,
        requests: RequestLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not model.classes:
            raise InputError("--labels", "is missing, and the model does not name its classes", "give a file of names")
        self._model = model
        self._classes = list(model.classes)
        self._limits = requests
        self._clock = clock
        self.metrics = Metrics(model.description)
        self._batcher: Batcher[_Job, Classified] = Batcher(
            partial(_classify, model), batch, seen=self.metrics.forward, clock=clock
        )
        self._bodies = Bodies(limits=requests, texts=model.description.kind == "text")
        self._decoders = anyio.CapacityLimiter(_DECODERS)
        self.metrics.gauge("queue_items", "Items that wait for a forward call.", lambda: self._batcher.waiting)
        self.metrics.gauge("accepted_items", "Items accepted and not answered yet.", lambda: self._batcher.taken)
        self.metrics.gauge("held_bytes", "Bodies that are being read or decoded.", lambda: self._bodies.held)
        self.application = self._made()
        self.routes = sorted({str(getattr(route, "path", "")) for route in self.application.routes})

    def close(self, timeout: float | None = None) -> None:
        """Answer what was accepted, and accept nothing any more.

        Args:
            timeout: Longest wait for that [s].
        """
        self._batcher.close(timeout)

    def _made(self) -> FastAPI:
        app = FastAPIOffline(
            title="Alphasmith",
            version="1",
            description=_ABOUT,
            redoc_url=None,
            responses=_problems(401, 403, 500),
            exception_handlers={
                StarletteHTTPException: _on_refusal,
                RequestValidationError: _on_invalid,
                QueueFull: _on_full,
                Stopping: _on_stopping,
                Exception: _on_defect,
            },
        )
        app.add_api_route(
            "/v1/classify",
            self._classify_route(),
            methods=["POST"],
            response_class=Response,
            summary="Classify items",
            responses={
                200: {"model": Answer, "description": "At least one item was classified."},
                422: {"model": Answer | Problem, "description": "Every item failed, or the request cannot be used."},
                500: {"model": Answer | Problem, "description": _REFUSALS[500]},
                **_problems(400, 408, 413, 415, 429, 503),
            },
            openapi_extra={"requestBody": self._body_schema()},
        )
        app.add_api_route("/v1/model", self._facts, response_model=ModelFacts, summary="What is served")
        app.add_api_route(
            "/healthz",
            self._health,
            response_class=Response,
            summary="Whether requests are answered",
            responses={200: {"model": Health}, 503: {"model": Health, "description": "It stops."}},
        )
        app.add_api_route(
            "/metrics",
            self._counted,
            response_class=Response,
            summary="Counters for Prometheus",
            responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "As text."}},
        )
        return app

    def _body_schema(self) -> dict[str, Any]:
        most = self._limits.items
        binary = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1, "maxItems": most}
        files = {"type": "object", "properties": {PART: binary}, "required": [PART], "additionalProperties": False}
        content: dict[str, Any] = {"multipart/form-data": {"schema": files}}
        if self._bodies.texts:
            schema = Texts.model_json_schema()
            schema["properties"]["texts"]["maxItems"] = most
            content["application/json"] = {"schema": schema}
        return {"required": True, "content": content}

    def _classify_route(self) -> Callable[..., Any]:
        count = len(self._classes)
        # Not written as annotations, which are looked up outside of this function.
        named: int = Query(min(_TOP, count), ge=1, le=count, description="Classes to name.")
        whole: bool = Query(False, description="Also tell the probabilities of all classes.")

        async def classify(request: Request, top: int = named, probabilities: bool = whole) -> Response:
            self._batcher.check()
            async with self._bodies.items(request) as items:
                with self._batcher.places(len(items)) as put:
                    deadline = self._clock() + self._limits.answer
                    futures = await self._queued(items, top, put, deadline)
                    found = await self._found(request, futures, deadline)
                    return self._answered([name for name, _ in items], found, top, probabilities)

        return classify

    async def _queued(
        self,
        items: Sequence[tuple[str, NamedBytes | str]],
        top: int,
        put: Callable[[_Job], Future[Classified]],
        deadline: float,
    ) -> list[Future[Classified]]:
        """Decode items in a thread; each goes into the queue as soon as it is ready."""

        def one(name: str, item: NamedBytes | str) -> Future[Classified]:
            try:
                return put(_Job(item=self._model.decode(item, name), top=top))
            except Exception as error:  # noqa: BLE001  this item's own; told in its place
                if not isinstance(error, AlphasmithError):
                    _LOG.error("an item could not be decoded", exc_info=error)
                failed: Future[Classified] = Future()
                failed.set_exception(error)
                return failed

        def decode() -> list[Future[Classified]]:
            futures: list[Future[Classified]] = []
            for name, item in items:
                if self._clock() > deadline:
                    for future in futures:
                        future.cancel()
                    raise self._late()
                futures.append(one(name, item))
            return futures

        return await anyio.to_thread.run_sync(decode, limiter=self._decoders)

    async def _found(
        self, request: Request, futures: Sequence[Future[Classified]], deadline: float
    ) -> list[Classified | BaseException]:
        """What became of every item; nobody goes on with them where the client has gone or the time is over."""
        answers = [asyncio.wrap_future(future) for future in futures]
        every = asyncio.gather(*answers, return_exceptions=True)
        gone = asyncio.ensure_future(_until_gone(request))
        either: set[asyncio.Future[Any]] = {every, gone}
        try:
            left = max(0.0, deadline - self._clock())
            done, _ = await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            # The futures themselves, now: a cancelled answer passes that on a turn of the loop later, and until then a
            # forward call could still take the item.
            for future in futures:
                future.cancel()
            for answer in answers:
                answer.cancel()
        if every in done:
            return every.result()
        if gone in done:
            raise HTTPException(400, "the client has gone")  # which nobody hears
        raise self._late()

    def _late(self) -> HTTPException:
        told = f"the answer took longer than {self._limits.answer:g} s; send less at once, or come again later"
        return HTTPException(503, told, {"Retry-After": "1"})

    def _answered(
        self, names: Sequence[str], found: Sequence[Classified | BaseException], top: int, probabilities: bool
    ) -> Response:
        results: list[ItemClassified | ItemRefused] = []
        defects = 0
        for name, answer in zip(names, found, strict=True):
            if isinstance(answer, Classified):
                results.append(_classified(name, answer, top, probabilities))
            elif isinstance(answer, AlphasmithError):
                results.append(ItemRefused(name=name, error=one_line(str(answer), 500)))
            else:
                defects += 1
                told = "item: could not be classified, through no fault of its own; see the log of the service"
                results.append(ItemRefused(name=name, error=told))
        good = sum(isinstance(result, ItemClassified) for result in results)
        self.metrics.item("classified", good)
        self.metrics.item("failed", defects)
        self.metrics.item("refused", len(results) - good - defects)
        body = Answer(run=self._model.description.run, results=results).model_dump_json()
        status = 200 if good else 500 if defects else 422
        return Response(body, status, media_type="application/json")

    async def _facts(self) -> ModelFacts:
        about = self._model.description
        return ModelFacts(
            run=about.run,
            run_name=about.run_name,
            name=about.name,
            kind=about.kind,
            classes=self._classes,
            scheme=about.scheme,
            parameters=about.parameters,
            finished=about.finished,
            metrics={name: MetricPair.model_validate(values) for name, values in about.metrics.items()},
            digests=dict(about.digests),
            notes=list(about.notes),
        )

    async def _health(self) -> Response:
        accepts = self._batcher.accepts
        body = Health(status="ok" if accepts else "stopping").model_dump_json()
        return Response(body, 200 if accepts else 503, media_type="application/json")

    async def _counted(self) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _classify(model: Model, jobs: Sequence[_Job]) -> Sequence[Classified]:
    """One forward call for items of several requests."""
    return model.classify([job.item for job in jobs], top=max(job.top for job in jobs))


def _classified(name: str, answer: Classified, top: int, probabilities: bool) -> ItemClassified:
    return ItemClassified(
        name=name,
        top=[ClassShare(index=one.index, name=one.name, probability=one.probability) for one in answer.top[:top]],
        probabilities=list(answer.probabilities) if probabilities else None,
        notes=list(answer.notes),
    )


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem, "description": _REFUSALS[status]} for status in statuses}


def _problem(reason: str, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(Problem(reason=reason).model_dump_json(), status, headers, media_type="application/json")


async def _on_refusal(request: Request, error: Exception) -> Response:
    refusal = error if isinstance(error, StarletteHTTPException) else StarletteHTTPException(500)
    return _problem(str(refusal.detail), refusal.status_code, dict(refusal.headers or {}))


async def _on_invalid(request: Request, error: Exception) -> Response:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": (), "msg": str(error)}
    place = ".".join(map(str, first["loc"]))
    return _problem(one_line(f"{place}: {first['msg']}", 300), 422)


async def _on_full(request: Request, error: Exception) -> Response:
    seconds = error.retry_after if isinstance(error, QueueFull) else 1
    return _problem(str(error), 429, {"Retry-After": str(seconds)})


async def _on_stopping(request: Request, error: Exception) -> Response:
    return _problem(str(error), 503, {"Retry-After": "1", "Connection": "close"})


async def _on_defect(request: Request, error: Exception) -> Response:
    return _problem("a defect; the log of the service tells more", 500)
