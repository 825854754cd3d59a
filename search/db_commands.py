"""``alphasmith db``: making, upgrading, checking, cleaning and copying the trial database."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from alphasmith.search.defaults import DEFAULT_STORAGE
from alphasmith.storage.backup import back_up
from alphasmith.storage.database import Database, check_exists, initialise, open_database, open_existing
from alphasmith.storage.garbage import Removed, collect
from alphasmith.storage.maintenance import Heads, heads, violations
from alphasmith.storage.upgrade import upgrade as upgrade_schema

_PATH = click.Path(path_type=Path)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SHOWN = 20

_storage = click.option("--storage", metavar="URL", help="Trial database (SQLAlchemy URL); default alphasmith.db.")
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")


def _age(_context: click.Context, _option: click.Parameter, value: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,6})([smhd])", value.strip())
    if found is None:
        raise click.BadParameter(f"{value!r} is no length of time; write 90s, 30m, 1h or 7d.")
    return timedelta(seconds=int(found[1]) * _UNITS[found[2]])


@click.group()
def db() -> None:
    """Make, upgrade, check, clean and copy the trial database."""


@db.command()
@_storage
@_json
def init(storage: str | None, as_json: bool) -> None:
    """Make the tables, or bring ours up to date."""
    with _opened(open_database, storage) as database:
        initialise(database)
        found = heads(database)
        answer = {"storage": database.masked, **_revisions(found)}
    _print(answer, as_json, lambda: f"{answer['storage']} is ready: {_schemas(found)}")


@db.command()
@_storage
@click.option("--backup", metavar="FILE", type=_PATH, help="Copy the database there first; SQLite: always copied.")
@click.option("--force", is_flag=True, help="Upgrade even while runs go on.")
@_json
def upgrade(storage: str | None, backup: Path | None, force: bool, as_json: bool) -> None:
    """Bring Optuna's tables and ours up to date, after a copy."""
    with _opened(_existing, storage) as database:
        done = upgrade_schema(database, backup=backup, force=force)
        answer = {
            "storage": database.masked,
            "before": _revisions(done.before),
            "after": _revisions(done.after),
            "backup": None if done.backup is None else str(done.backup),
        }

    def text() -> str:
        copy = f"; the database before it is in {done.backup}" if done.backup else ""
        if done.before.current:
            return f"nothing to upgrade: {_schemas(done.after)}{copy}"
        return f"upgraded from {_schemas(done.before)} to {_schemas(done.after)}{copy}"

    _print(answer, as_json, text)


@db.command()
@_storage
@click.option("--deep", is_flag=True, help="Read every artifact and compare its digest.")
@_json
def check(storage: str | None, deep: bool, as_json: bool) -> None:
    """Check schemas, records, trials and artifacts against each other; exit code 1 where something is wrong."""
    with _opened(_existing, storage) as database:
        found = violations(database, deep=deep)
        masked = database.masked
    answer = {
        "storage": masked,
        "violations": [{"check": v.check, "subject": v.subject, "problem": v.problem} for v in found],
    }

    def text() -> str:
        if not found:
            return f"{masked} is in order"
        lines = [str(violation) for violation in found[:_SHOWN]]
        more = [f"... and {len(found) - _SHOWN} more (--json shows all)"] if len(found) > _SHOWN else []
        return "\n".join([*lines, *more, f"{len(found)} things are wrong in {masked}"])

    _print(answer, as_json, text)
    if found:
        click.get_current_context().exit(1)


@db.command()
@_storage
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option(
    "--older-than", metavar="AGE", callback=_age, default="1h", show_default=True, help="Spare what is younger."
)
@click.option("--shared", is_flag=True, help="Clean artifact stores that other databases use, too.")
@_json
def gc(storage: str | None, dry_run: bool, older_than: timedelta, shared: bool, as_json: bool) -> None:
    """Remove what nothing refers to: artifacts of finished runs, temporaries, rows and studies of deleted runs."""
    with _opened(open_existing, storage) as database:
        removed = collect(database, older_than=older_than, dry_run=dry_run, shared=shared)
        masked = database.masked
    answer = {
        "storage": masked,
        "dry_run": dry_run,
        "bytes": sum(item.bytes for item in removed),
        "removed": [{"what": item.what, "name": item.name, "bytes": item.bytes} for item in removed],
    }
    _print(answer, as_json, lambda: _removed_text(removed, dry_run))


@db.command()
@click.argument("file", metavar="FILE", type=_PATH)
@_storage
@_json
def backup(file: Path, storage: str | None, as_json: bool) -> None:
    """Copy the whole database into a new FILE while others may write."""
    with _opened(_existing, storage) as database:
        size = back_up(database, file)
        answer = {"storage": database.masked, "file": str(file), "bytes": size}
    _print(answer, as_json, lambda: f"{answer['storage']} copied to {file} ({_size(size)})")


@contextmanager
def _opened(opener: Callable[[str], Database], storage: str | None) -> Iterator[Database]:
    database = opener(storage or DEFAULT_STORAGE)
    try:
        yield database
    finally:
        database.close()


def _existing(url: str) -> Database:
    """As it is: neither made nor brought up to date."""
    check_exists(url)
    return open_database(url)


def _revisions(found: Heads) -> dict[str, str | None]:
    return {"alphasmith": found.ours, "optuna": found.optuna}


def _schemas(found: Heads) -> str:
    return f"schema {found.ours}, Optuna's {found.optuna}"


def _removed_text(removed: list[Removed], dry_run: bool) -> str:
    groups: defaultdict[str, list[Removed]] = defaultdict(list)
    for item in removed:
        groups[item.what].append(item)
    lines = [f"spared {item.name}" for item in groups.pop("spared", [])]
    for what, items in groups.items():
        size = sum(item.bytes for item in items)
        lines.append(f"{len(items)} x {what}" + (f", {_size(size)}" if size else ""))
        lines += [f"  {item.name}" for item in items[:_SHOWN]]
        lines += [f"  ... and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    total = _size(sum(item.bytes for item in removed))
    lines.append(f"{total} would be freed" if dry_run else f"{total} freed")
    return "\n".join(lines)


def _size(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _print(answer: Any, as_json: bool, text: Callable[[], str]) -> None:
    click.echo(json.dumps(answer, indent=2, sort_keys=True, allow_nan=False) if as_json else text())
