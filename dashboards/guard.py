"""Access rules of the Optuna dashboard: who may ask, what may be changed, what artifacts may do.

The dashboard itself answers any Host (DNS rebinding reaches a loopback bind), lets every caller rename and delete
studies, offers a schema upgrade to a plain form, and serves uploaded HTML as a page of the same origin. All that stops here.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, parse_qsl, quote, urlencode, urlsplit

from alphasmith.objectives.errors import InputError

if TYPE_CHECKING:
    from types import TracebackType
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    ExcInfo = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]

_COOKIE = "alphasmith-token"
#: Shortest token [characters].
_SHORTEST = 16
_TOKEN = re.compile(rf"[A-Za-z0-9_-]{{{_SHORTEST},256}}")
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
_READS = frozenset({"GET", "HEAD"})
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
        token: What requests must carry: once in the address, as ``?token=``, from then on in a cookie, or as
            ``Authorization: Bearer``; None: nothing.

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
        if token is not None and _TOKEN.fullmatch(token) is None:
            raise InputError(
                "token",
                "is no token",
                f"use at least {_SHORTEST} letters, digits, '-' and '_', as new_token() makes them",
            )
        self._token = token
        self._application = application
        self._hosts = LOCAL_HOSTS | {_checked_host(host) for host in hosts}
        self._allow_write = allow_write

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request: refuse with 400 or 403 and a JSON reason, or pass it on and harden the answer."""
        method = environ.get("REQUEST_METHOD", "GET")
        path = environ.get("PATH_INFO", "") or "/"
        if not path.isascii() or "//" in path:
            # The framework drops bytes that are not UTF-8 and so would read another path than the one checked here.
            return _refuse(start_response, "400 Bad Request", "unexpected characters in the path")
        host = environ.get("HTTP_HOST", "")
        if _host_name(host) not in self._hosts:
            return _refuse(start_response, "403 Forbidden", "this host name is not served; allow it with --allow-host")
        if self._token is not None:
            query = environ.get("QUERY_STRING", "")
            if method == "GET" and self._is_token(parse_qs(query).get("token", [""])[-1]):
                return self._enter(start_response, path, query)
            if not self._is_token(_carried(environ)):
                told = "open the address that alphasmith dashboard printed: its token is missing or wrong"
                return _refuse(start_response, "401 Unauthorized", told)
        if method not in _READS:
            reason = self._refusal(method, path.rstrip("/"), host, environ.get("HTTP_ORIGIN"))
            if reason:
                return _refuse(start_response, "403 Forbidden", reason)
        # The dashboard looks the header up without a default and answers 500 to clients that send none.
        environ.setdefault("HTTP_ACCEPT_ENCODING", "")
        return self._application(environ, _hardened(start_response, artifact=path.startswith("/artifacts/")))

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), str(self._token).encode())

    def _enter(self, start_response: StartResponse, path: str, query: str) -> Iterable[bytes]:
        """Keep the token in a cookie, and leave it out of the address, which histories and logs hold."""
        rest = urlencode([(name, value) for name, value in parse_qsl(query) if name != "token"])
        place = quote(path) + (f"?{rest}" if rest else "")
        cookie = f"{_COOKIE}={self._token}; Path=/; HttpOnly; SameSite=Strict"
        headers = [("Location", place), ("Set-Cookie", cookie), ("Cache-Control", "no-store"), ("Content-Length", "0")]
        start_response("303 See Other", [*headers, ("Referrer-Policy", "no-referrer")])
        return [b""]

    def _refusal(self, method: str, path: str, host: str, origin: str | None) -> str:
        if not self._allow_write:
            return "this dashboard is read-only"
        if not _WRITE.fullmatch(f"{method} {path}"):
            return "studies are not renamed, deleted or migrated here; use alphasmith or optuna on the command line"
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return "the request comes from another site"
        return ""


def new_token() -> str:
    """A random token that nobody guesses."""
    return secrets.token_urlsafe(24)


def _carried(environ: WSGIEnvironment) -> str:
    """The token that a request carries in a header; empty where it carries none."""
    kind, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if kind.lower() == "bearer":
        return str(given.strip())
    cookies = (part.strip().partition("=") for part in environ.get("HTTP_COOKIE", "").split(";"))
    return next((value for name, _, value in cookies if name == _COOKIE), "")


def _checked_host(host: str) -> str:
    name = _host_name(f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host)
    if not name or re.fullmatch(r"[0-9a-z.:_-]+", name) is None or host.rpartition(":")[0].strip("[]") == name:
        raise InputError(
            "host", f"{host!r} is not a host name", "give a name or an address without port, e.g. box.example"
        )
    return name


def _host_name(header: str) -> str:
    """The host of a Host header, lower case, without port and brackets; empty when it is malformed."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/@\[\]]+))(?::[0-9]{1,5})?", header)
    if match is None:
        return ""
    return str(match[1] or match[2]).lower().rstrip(".")


def _refuse(start_response: StartResponse, status: str, reason: str) -> Iterable[bytes]:
    body = json.dumps({"reason": reason}).encode()
    headers = [
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("X-Content-Type-Options", "nosniff"),
        ("Cache-Control", "no-store"),
    ]
    start_response(status, headers)
    return [body]


def _hardened(start_response: StartResponse, *, artifact: bool) -> StartResponse:
    def respond(
        status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        dropped = {"access-control-allow-origin", "x-content-type-options", "x-frame-options", "referrer-policy"}
        if artifact:
            dropped |= {"content-disposition", "content-security-policy"}
        kept = [(name, value) for name, value in headers if name.lower() not in dropped]
        kept += [
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "SAMEORIGIN"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ]
        if artifact:
            kept = [(name, _artifact_type(value) if name.lower() == "content-type" else value) for name, value in kept]
            kept += [("Content-Disposition", "attachment"), ("Content-Security-Policy", "sandbox; default-src 'none'")]
        return start_response(status, kept, exc_info)

    return respond


def _artifact_type(given: str) -> str:
    kind = given.partition(";")[0].strip().lower()
    return kind if kind in _ARTIFACT_TYPES else "application/octet-stream"
