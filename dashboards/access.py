"""Who may ask a server of this package: by Host, token and origin, the same for the dashboard and for the service of a model.

No Host but those that were named, since DNS rebinding reaches a loopback bind; a token wherever more than this machine can
reach the socket; and no request that changes or costs something from a page of another site. Nothing here knows how a
framework hands requests over: :class:`Access` judges an :class:`Asked`.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qs, parse_qsl, quote, urlencode, urlsplit

from alphasmith.objectives.errors import InputError

#: Shortest token [characters].
_SHORTEST = 16
_TOKEN = re.compile(rf"[A-Za-z0-9_-]{{{_SHORTEST},256}}")
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
READS = frozenset({"GET", "HEAD"})
#: Headers of every answer: no guessing of types, no frame of another site, no address told to others.
HARDENING = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "SAMEORIGIN"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
#: Header of what must be asked for again: refusals, and answers with a token in them.
UNCACHED = ("Cache-Control", "no-store")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What decides about a request. Headers that it does not carry are empty, ``origin`` is None.

    Attributes:
        method: Upper case.
        path: With escapes taken out.
        query: Without the question mark.
        host: ``Host``.
        authorization: ``Authorization``.
        cookie: ``Cookie``.
        origin: ``Origin``.
    """

    method: str
    path: str
    query: str
    host: str
    authorization: str
    cookie: str
    origin: str | None

    @property
    def from_another_site(self) -> bool:
        """Whether a page of another site sent it; programs send no origin."""
        return self.origin is not None and urlsplit(self.origin).netloc.lower() != self.host.lower()


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A request that is not answered, and why."""

    status: HTTPStatus
    reason: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The token was in the address: these headers, with status 303, put it into a cookie and take it out of the address."""

    headers: tuple[tuple[str, str], ...]


class Access:
    """The rules. Keeps no state; safe under any number of threads.

    Args:
        hosts: Names and addresses that requests may be addressed to, besides localhost; without port.
        token: What requests must carry: once in the address, as ``?token=``, from then on in a cookie, or as
            ``Authorization: Bearer``; None: nothing.
        cookie: Name of that cookie; one of its own for every kind of server, since the ports of a host share cookies.
        command: Which command printed the address with the token.

    Raises:
        InputError: A host is empty or holds more than a host name, or the token is short or holds other characters.
    """

    def __init__(self, *, hosts: Iterable[str], token: str | None, cookie: str, command: str) -> None:
        if token is not None and _TOKEN.fullmatch(token) is None:
            raise InputError(
                "token",
                "is no token",
                f"use at least {_SHORTEST} letters, digits, '-' and '_', as new_token() makes them",
            )
        self._token = token
        self._hosts = _LOCAL_HOSTS | {_checked_host(host) for host in hosts}
        self._cookie = cookie
        self._command = command

    def judge(self, asked: Asked) -> Refusal | Entry | None:
        """What to do with a request before anything else; None: go on with it."""
        if not asked.path.isascii() or "//" in asked.path:
            # A framework may drop bytes that are not UTF-8 and so would read another path than the one checked here.
            return Refusal(status=HTTPStatus.BAD_REQUEST, reason="unexpected characters in the path")
        if _host_name(asked.host) not in self._hosts:
            told = "this host name is not served; allow it with --allow-host"
            return Refusal(status=HTTPStatus.FORBIDDEN, reason=told)
        if self._token is not None:
            if asked.method == "GET" and self._is_token(parse_qs(asked.query).get("token", [""])[-1]):
                return Entry(headers=self._entry(asked.path, asked.query))
            if not self._is_token(self._carried(asked)):
                told = f"open the address that {self._command} printed: its token is missing or wrong"
                return Refusal(status=HTTPStatus.UNAUTHORIZED, reason=told)
        return None

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), str(self._token).encode())

    def _carried(self, asked: Asked) -> str:
        """The token that a request carries in a header; empty where it carries none."""
        kind, _, given = asked.authorization.partition(" ")
        if kind.lower() == "bearer":
            return given.strip()
        cookies = (part.strip().partition("=") for part in asked.cookie.split(";"))
        return next((value for name, _, value in cookies if name == self._cookie), "")

    def _entry(self, path: str, query: str) -> tuple[tuple[str, str], ...]:
        """Keep the token in a cookie, and leave it out of the address, which histories and logs hold."""
        rest = urlencode([(name, value) for name, value in parse_qsl(query) if name != "token"])
        return (
            ("Location", quote(path) + (f"?{rest}" if rest else "")),
            ("Set-Cookie", f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"),
            ("Content-Length", "0"),
            UNCACHED,
        )


def new_token() -> str:
    """A random token that nobody guesses."""
    return secrets.token_urlsafe(24)


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
