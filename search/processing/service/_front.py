"""ASGI middleware before everything else: access, hardened answers, and the count of requests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alphasmith.dashboards.access import HARDENING, READS, UNCACHED, Access, Asked, Entry
from alphasmith.search.processing.service._metrics import Metrics

#: What nginx counts a client as that went away before it was answered.
_GONE = 499
#: The OpenAPI page loads only what this server has; its own script is written into it.
_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_HEADERS = [
    (name.lower().encode(), value.encode()) for name, value in (*HARDENING, ("Content-Security-Policy", _POLICY))
]


class Front:
    """Refuses with 400, 401 or 403 and a JSON reason, or passes a request on and hardens and counts its answer.

    Args:
        application: What answers.
        access: Who may ask.
        metrics: Where requests are counted.
        routes: Paths that are counted by name.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        application: ASGIApp,
        *,
        access: Access,
        metrics: Metrics,
        routes: Collection[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._application = application
        self._access = access
        self._metrics = metrics
        self._routes = frozenset(routes)
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        start, status = self._clock(), _GONE

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        try:
            if not await self._refused(_asked(scope), answer):
                await self._application(scope, receive, answer)
        finally:
            path = scope["path"]
            route = path if path in self._routes else "other"
            self._metrics.request(route, status, self._clock() - start)

    async def _refused(self, asked: Asked, send: Send) -> bool:
        verdict = self._access.judge(asked)
        if isinstance(verdict, Entry):
            await _respond(send, HTTPStatus.SEE_OTHER, verdict.headers, b"")
        elif verdict is not None:
            await _refuse(send, verdict.status, verdict.reason)
        elif asked.method not in READS and asked.from_another_site:
            await _refuse(send, HTTPStatus.FORBIDDEN, "the request comes from another site")
        else:
            return False
        return True


def _asked(scope: Scope) -> Asked:
    headers = Headers(scope=scope)
    return Asked(
        method=scope["method"],
        path=scope["path"],
        query=scope["query_string"].decode("latin-1"),
        host=headers.get("host", ""),
        authorization=headers.get("authorization", ""),
        cookie=headers.get("cookie", ""),
        origin=headers.get("origin"),
    )


async def _refuse(send: Send, status: HTTPStatus, reason: str) -> None:
    body = json.dumps({"reason": reason}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), UNCACHED]
    if status == HTTPStatus.UNAUTHORIZED:
        headers.append(("WWW-Authenticate", "Bearer"))
    await _respond(send, status, headers, body)


async def _respond(send: Send, status: HTTPStatus, headers: Collection[tuple[str, str]], body: bytes) -> None:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    await send({"type": "http.response.start", "status": status.value, "headers": raw})
    await send({"type": "http.response.body", "body": body})
