"""docs/formulas.md and the code agree: every id that is cited is defined, every id that is defined is cited, no page is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORMULAS = ROOT / "docs" / "formulas.md"
ROOMS = ("search", "objectives", "storage", "dashboards", "tests", "benchmarks", "examples", "docs")
#: Formula, claim or trap; after ``to`` the last of a range.
CITED = re.compile(r"\b(f[AB]|[AB]-|T)(\d+)\b(?: to \1(\d+)\b)?")
SOURCES = sorted(
    path
    for path in (ROOT / "README.md", *(path for room in ROOMS for path in (ROOT / room).rglob("*")))
    if path.suffix in {".py", ".md", ".html", ".toml", ".yaml", ".sh"} and path not in (FORMULAS, Path(__file__))
)


def cited(text: str) -> set[str]:
    """Ids in ``text``, ranges written out."""
    return {
        f"{kind}{number}"
        for kind, first, last in CITED.findall(text)
        for number in range(int(first), int(last or first) + 1)
    }


def definitions() -> list[str]:
    return re.findall(r"^(?:### |\| )(f[AB]\d+|[AB]-\d+|T\d+)\b", FORMULAS.read_text(encoding="utf-8"), re.MULTILINE)


def test_ranges_are_written_out() -> None:
    assert cited("claims A-2 to A-4, A-12; formulas fA2, fA7 to fA8 (T3)") == {
        *("A-2", "A-3", "A-4", "A-12"),
        *("fA2", "fA7", "fA8", "T3"),
    }


def test_every_cited_id_is_defined_once_and_every_defined_one_is_cited() -> None:
    found = {name for path in SOURCES for name in cited(path.read_text(encoding="utf-8"))}
    assert sorted(definitions()) == sorted(found)


def test_ids_are_cited_in_full() -> None:
    """``claim 3`` or ``trap 4`` would pass the comparison unseen."""
    short = re.compile(r"\b(?:claims?|formulas?|traps?|section|item|rule)s? \d", re.IGNORECASE)
    found = {path.relative_to(ROOT).as_posix(): short.findall(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_every_formula_names_its_source() -> None:
    sections = re.split(r"^### ", FORMULAS.read_text(encoding="utf-8").split("\n## Claims")[0], flags=re.MULTILINE)[1:]
    assert len(sections) == 32
    assert [section.splitlines()[0] for section in sections if "Source: " not in section] == []


@pytest.mark.parametrize("room", ROOMS)
def test_only_pages_of_this_repository_are_cited(room: str) -> None:
    missing = [
        (path.relative_to(ROOT).as_posix(), page)
        for path in SOURCES
        if path.is_relative_to(ROOT / room)
        for page in re.findall(r"[\w./-]*\w\.md\b", path.read_text(encoding="utf-8"))
        if not (ROOT / page).is_file() and not (path.parent / page).is_file()
    ]
    assert missing == []
