"""Access rules of the Optuna dashboard: who may ask, what may be changed, what artifacts may do.

The dashboard itself answers any Host (DNS rebinding reaches a loopback bind), lets every caller rename and delete
studies, offers a schema upgrade to a plain form, and serves uploaded HTML as a page of the same origin. All that stops here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING

from alphasmith.dashboards.access import HARDENING, READS, UNCACHED, Access, Asked, Entry

if TYPE_CHECKING:
    from types import TracebackType
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    ExcInfo = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]

#: What ``allow_write`` opens, and nothing else. Missing on purpose: rename and delete of studies (a rename is copy and
#: delete: new ids, figures and artifacts lost) and the schema upgrade.
_WRITES = (
    ("POST", r"/api/studies"),
    ("PUT", r"/api/studies/[0-9]+/note"),
    ("PUT", r"/api/studies/[0-9]+/[0-9]+/note"),
    ("POST", r"/api/studies/[0-9]+/preference"),
    ("PUT", r"/api/studies/[0-9]+/preference_feedback_component"),
    ("(POST|DELETE)", r"/api/studies/[0-9]+/preference/[0-9A-Za-z-]+"),
    ("POST", r"/api/studies/[0-9]+/[0-9]+/skip"),
    ("POST", r"/api/trials/[0-9]+/(tell|user-attrs)"),
    ("POST", r"/api/artifacts/[0-9]+(/[0-9]+)?"),
    ("DELETE", r"/api/artifacts/[0-9]+(/[0-9]+)?/[0-9a-fA-F-]+"),
)
_WRITE = re.compile("|".join(f"{method} {path}" for method, path in _WRITES))
#: Artifact types a browser may know by name; everything else becomes a download of unknown type.
_ARTIFACT_TYPES = frozenset(
    {
        "application/json",
        "application/pdf",
        "audio/flac",
        "audio/mpeg",
        "audio/wav",
        "audio/x-wav",
        "image/gif",
        "image/jpeg",
        "image/png",
        "image/webp",
        "text/csv",
        "text/plain",
        "video/mp4",
        "video/webm",
    }
)


class Guard:
    """WSGI middleware around the dashboard. Keeps no state; safe under any number of threads.

    Args:
        application: The dashboard.
        hosts: Names and addresses that requests may be addressed to, besides localhost; without port.
        allow_write: Also pass notes, tells, new studies and artifacts. Never rename or delete of a study.
        token: What requests must carry, see :class:`~alphasmith.dashboards.access.Access`; None: nothing.

    Raises:
        InputError: A host is empty or holds more than a host name, or the token is short or holds other characters.
    """

    def __init__(
        self,
        application: WSGIApplication,
        *,
        hosts: Iterable[str] = (),
        allow_write: bool = False,
        token: str | None = None,
    ) -> None:
        self._access = Access(hosts=hosts, token=token, cookie="alphasmith-token", command="alphasmith dashboard")
        self._application = application
        self._allow_write = allow_write

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request: refuse with 400, 401 or 403 and a JSON reason, or pass it on and harden the answer."""
        asked = _asked(environ)
        verdict = self._access.judge(asked)
        if isinstance(verdict, Entry):
            start_response("303 See Other", [*verdict.headers, *HARDENING])
            return [b""]
        if verdict is not None:
            return _refuse(start_response, verdict.status, verdict.reason)
        if asked.method not in READS:
            reason = self._refusal(asked)
            if reason:
                return _refuse(start_response, HTTPStatus.FORBIDDEN, reason)
        # The dashboard looks the header up without a default and answers 500 to clients that send none.
        environ.setdefault("HTTP_ACCEPT_ENCODING", "")
        return self._application(environ, _hardened(start_response, artifact=asked.path.startswith("/artifacts/")))

    def _refusal(self, asked: Asked) -> str:
        if not self._allow_write:
            return "this dashboard is read-only"
        if not _WRITE.fullmatch(f"{asked.method} {asked.path.rstrip('/')}"):
            return "studies are not renamed, deleted or migrated here; use alphasmith or optuna on the command line"
        return "the request comes from another site" if asked.from_another_site else ""


def _asked(environ: WSGIEnvironment) -> Asked:
    return Asked(
        method=environ.get("REQUEST_METHOD", "GET"),
        path=environ.get("PATH_INFO", "") or "/",
        query=environ.get("QUERY_STRING", ""),
        host=environ.get("HTTP_HOST", ""),
        authorization=environ.get("HTTP_AUTHORIZATION", ""),
        cookie=environ.get("HTTP_COOKIE", ""),
        origin=environ.get("HTTP_ORIGIN"),
    )


def _refuse(start_response: StartResponse, status: HTTPStatus, reason: str) -> Iterable[bytes]:
    body = json.dumps({"reason": reason}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), UNCACHED, *HARDENING]
    start_response(f"{status.value} {status.phrase}", headers)
    return [body]


def _hardened(start_response: StartResponse, *, artifact: bool) -> StartResponse:
    def respond(
        status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        dropped = {"access-control-allow-origin", *(name.lower() for name, _ in HARDENING)}
        if artifact:
            dropped |= {"content-disposition", "content-security-policy"}
        kept = [(name, value) for name, value in headers if name.lower() not in dropped]
        kept += HARDENING
        if artifact:
            kept = [(name, _artifact_type(value) if name.lower() == "content-type" else value) for name, value in kept]
            kept += [("Content-Disposition", "attachment"), ("Content-Security-Policy", "sandbox; default-src 'none'")]
        return start_response(status, kept, exc_info)

    return respond


def _artifact_type(given: str) -> str:
    kind = given.partition(";")[0].strip().lower()
    return kind if kind in _ARTIFACT_TYPES else "application/octet-stream"
