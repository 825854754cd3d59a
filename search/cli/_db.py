"""``alphasmith db``: making, upgrading, checking, cleaning and copying the trial database."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alphasmith.objectives.text import size_text
from alphasmith.search.cli._options import PATH, json_option, print_answer, storage_option
from alphasmith.search.config import DEFAULT_STORAGE

if TYPE_CHECKING:
    from alphasmith.storage.database.connection import Database
    from alphasmith.storage.upkeep.check import Heads
    from alphasmith.storage.upkeep.garbage import Removal

# As in `main`, every command imports what it does when it is called.

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SHOWN = 20


def _age(_context: click.Context, _option: click.Parameter, value: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,6})([smhd])", value.strip())
    if found is None:
        raise click.BadParameter(f"{value!r} is no length of time; write 90s, 30m, 1h or 7d.")
    return timedelta(seconds=int(found[1]) * _UNITS[found[2]])


@click.group()
def db() -> None:
    """Make, upgrade, check, clean and copy the trial database."""


@db.command()
@storage_option
@json_option
def init(storage: str | None, as_json: bool) -> None:
    """Make the tables, or bring ours up to date."""
    from alphasmith.storage.database.connection import opened
    from alphasmith.storage.upkeep.check import heads

    with opened(storage or DEFAULT_STORAGE, create=True) as database:
        found = heads(database)
        answer = {"storage": database.masked, **_revisions(found)}
    print_answer(answer, as_json, lambda: f"{answer['storage']} is ready: {_schemas(found)}")


@db.command()
@storage_option
@click.option("--backup", metavar="FILE", type=PATH, help="Copy the database there first; SQLite: always copied.")
@click.option("--force", is_flag=True, help="Upgrade even while runs go on.")
@json_option
def upgrade(storage: str | None, backup: Path | None, force: bool, as_json: bool) -> None:
    """Bring Optuna's tables and ours up to date, after a copy."""
    from alphasmith.storage.upkeep.upgrade import upgrade as upgrade_schema

    with _as_it_is(storage) as database:
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

    print_answer(answer, as_json, text)


@db.command()
@storage_option
@click.option("--deep", is_flag=True, help="Read every artifact and compare its digest.")
@json_option
def check(storage: str | None, deep: bool, as_json: bool) -> None:
    """Check schemas, records, trials and artifacts against each other; exit code 1 where something is wrong."""
    from alphasmith.storage.upkeep.check import violations

    with _as_it_is(storage) as database:
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

    print_answer(answer, as_json, text)
    if found:
        click.get_current_context().exit(1)


@db.command()
@storage_option
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option(
    "--older-than", metavar="AGE", callback=_age, default="1h", show_default=True, help="Spare what is younger."
)
@click.option("--shared", is_flag=True, help="Clean artifact stores that other databases use, too.")
@json_option
def gc(storage: str | None, dry_run: bool, older_than: timedelta, shared: bool, as_json: bool) -> None:
    """Remove what nothing refers to: artifacts of finished runs, temporaries, rows and studies of deleted runs."""
    from alphasmith.storage.database.connection import opened
    from alphasmith.storage.upkeep.garbage import collect

    with opened(storage or DEFAULT_STORAGE) as database:
        removed = collect(database, older_than=older_than, dry_run=dry_run, shared=shared)
        masked = database.masked
    answer = {
        "storage": masked,
        "dry_run": dry_run,
        **removed_facts(removed),
    }
    print_answer(answer, as_json, lambda: removed_text(removed, dry_run))


@db.command()
@click.argument("file", metavar="FILE", type=PATH)
@storage_option
@json_option
def backup(file: Path, storage: str | None, as_json: bool) -> None:
    """Copy the whole database into a new FILE while others may write."""
    from alphasmith.storage.upkeep.backup import back_up

    with _as_it_is(storage) as database:
        size = back_up(database, file)
        answer = {"storage": database.masked, "file": str(file), "bytes": size}
    print_answer(answer, as_json, lambda: f"{answer['storage']} copied to {file} ({size_text(size)})")


@contextmanager
def _as_it_is(storage: str | None) -> Iterator[Database]:
    """The database, neither made nor brought up to date."""
    from alphasmith.storage.database.connection import check_exists, open_database

    check_exists(storage or DEFAULT_STORAGE)
    with closing(open_database(storage or DEFAULT_STORAGE)) as database:
        yield database


def _revisions(found: Heads) -> dict[str, str | None]:
    return {"alphasmith": found.ours, "optuna": found.optuna}


def _schemas(found: Heads) -> str:
    return f"schema {found.ours}, Optuna's {found.optuna}"


def removed_facts(removed: Sequence[Removal]) -> dict[str, Any]:
    """What was removed, as JSON values."""
    return {
        "bytes": sum(item.bytes for item in removed),
        "removed": [{"what": item.what, "name": item.name, "bytes": item.bytes} for item in removed],
    }


def removed_text(removed: Sequence[Removal], dry_run: bool) -> str:
    """What was removed, by kind, and how much it freed."""
    groups: defaultdict[str, list[Removal]] = defaultdict(list)
    for item in removed:
        groups[item.what].append(item)
    lines = [f"spared {item.name}" for item in groups.pop("spared", [])]
    for what, items in groups.items():
        size = sum(item.bytes for item in items)
        lines.append(f"{len(items)} x {what}" + (f", {size_text(size)}" if size else ""))
        lines += [f"  {item.name}" for item in items[:_SHOWN]]
        lines += [f"  ... and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    total = size_text(sum(item.bytes for item in removed))
    lines.append(f"{total} would be freed" if dry_run else f"{total} freed")
    return "\n".join(lines)
