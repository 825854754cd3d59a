"""Storage addresses: which driver, where, and how to print them without their password."""

from __future__ import annotations

import re

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.reading import is_regular, usable_path

_REMEDY = "use sqlite:///FILE, postgresql://USER:PASSWORD@HOST/NAME or mysql://USER:PASSWORD@HOST/NAME"
_PERCENT = "percent-encode the special characters of user and password ('@' is %40, '/' is %2F)"
_SECRET = re.compile(r"pass|pwd|secret|token|key", re.IGNORECASE)
_SECRET_QUERY = re.compile(r"(?i)([?&][^=&]*(?:pass|pwd|secret|token|key)[^=&]*=)[^&]*")

#: Driver taken when the address names only the database.
_DRIVERS = {
    "sqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mysql+pymysql",
    "mariadb+pymysql": "mysql+pymysql",
}


def mask(url: str) -> str:
    """The address as it may be printed: every password and secret option replaced by ``***``.

    Never fails: what cannot be parsed loses everything between its scheme and its last ``@``.

    Args:
        url: A storage address, well formed or not.
    """
    parsed = _parsed(url)
    if parsed is None:
        return _SECRET_QUERY.sub(r"\1***", _mask_text(url))
    if parsed.get_backend_name() == "sqlite" and not parsed.query:
        return url
    secret = {key: "***" for key in parsed.query if _SECRET.search(key)}
    return parsed.update_query_dict(secret).render_as_string(hide_password=True).replace("%2A%2A%2A", "***")


def secrets_of(url: URL) -> tuple[str, ...]:
    """Everything in an address that must not be printed, longest first."""
    found = [str(url.password)] if url.password else []
    for key, value in url.query.items():
        if _SECRET.search(key):
            found += [value] if isinstance(value, str) else list(value)
    return tuple(sorted({value for value in found if value}, key=len, reverse=True))


def parse(url: str) -> URL:
    """Read a storage address and fill in the driver.

    SQLite paths become absolute, so that a later change of folder cannot point at another file.

    Args:
        url: ``sqlite:///FILE``, ``postgresql://...`` or ``mysql://...``; ``postgres`` and ``mariadb`` are understood.

    Raises:
        InputError: Not an address, an unknown database, or an SQLite database without a file.
    """
    parsed = _parsed(url)
    if parsed is None:
        if "://" in url and "@" in url:
            raise InputError("storage", f"{mask(url)!r} cannot be read as an address", _PERCENT)
        raise InputError("storage", f"{mask(url)!r} is not an address", _REMEDY)
    driver = _DRIVERS.get(parsed.drivername, parsed.drivername)
    if driver.partition("+")[0] not in {"sqlite", "postgresql", "mysql"}:
        raise InputError("storage", f"database {parsed.drivername!r} is not supported", _REMEDY)
    parsed = parsed.set(drivername=driver)
    if parsed.get_backend_name() == "sqlite":
        return _with_file(parsed)
    if not parsed.database:
        raise InputError("storage", f"{mask(url)!r} names no database", "append /NAME to the address")
    return parsed


def _parsed(url: str) -> URL | None:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return None
    # An unescaped '@', '/' or '?' in user or password sends the rest of it into host, path or options, where masking
    # would show it. One '@' that ends a user is the only one that is unambiguous.
    if parsed.get_backend_name() != "sqlite" and "@" in url and (url.count("@") > 1 or parsed.username is None):
        return None
    return parsed


def _mask_text(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, separator, rest = url.partition(":")
    return f"{scheme}{separator}***@{rest.rpartition('@')[2]}" if "@" in rest else url


def _with_file(url: URL) -> URL:
    name = url.database
    if not name or name == ":memory:" or name.startswith("file:"):
        raise InputError("storage", "an SQLite database needs a plain file", "use sqlite:///FILE")
    if url.host:
        raise InputError("storage", f"SQLite has no host {url.host!r}", "use three slashes: sqlite:///FILE")
    file = usable_path("storage", name)
    if file.exists() and not file.is_dir() and not is_regular(file):
        raise InputError("storage", f"{file} is not a plain file", "use sqlite:///FILE")
    # Links are followed: by two names one file would have two sets of locks.
    return url.set(database=str(file))
