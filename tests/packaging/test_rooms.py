"""The rooms inside the four folders: which may import which, how large they are, what their doors say."""

from __future__ import annotations

import ast

import pytest

from tests.support.rooms import ROOT, TOPS, both_ways, picture, product_files, room_imports, users_outside

#: From the lowest floor up: a room imports only what stands before it. Opening a database reads the head of its migrations, and
#: migrations read the tables, so these two share a floor.
FLOORS: dict[str, list[set[str]]] = {
    "objectives": [
        {"dead_channels", "errors", "finite", "literals", "partition", "stored_types"},
        {"text", "extras"},
        {"smoothing", "reading"},
        {"groups", "media"},
        {"sites", "model"},
        {"blocks", "calibration"},
        {"quantization"},
        {"judge"},
        {"noise", "sensitivity", "training"},
        {"joint"},
        {"demo"},
    ],
    "storage": [
        {"files"},
        {"database", "migrations"},
        {"runs"},
        {"queue"},
        {"artifacts", "output"},
        {"upkeep"},
    ],
    "dashboards": [
        {"text", "checked_frames", "access", "connections", "listening", "verdict"},
        {"figures", "site_table", "guard", "_page"},
        {"server"},
        {"report", "compression_report"},
        {"study_views"},
    ],
    "search": [
        {"toml_values", "sections", "idle_threads", "interruption", "large_pages"},
        {"budget"},
        {"config"},
        {"progress", "devices"},
        {"study"},
        {"site"},
        {"inputs"},
        {"engines"},
        {"work"},
        {"model"},
        {"formats"},
        {"checkpoints", "compression", "launch"},
        {"exports", "processing"},
        {"training"},
        {"cli"},
    ],
}
TIED = {"storage": [("database", "migrations")]}
MOST_LINES, MOST_FILES = 600, 14


@pytest.mark.parametrize("top", TOPS)
def test_every_room_has_a_floor(top: str) -> None:
    assert set().union(*FLOORS[top]) == set(room_imports(top))


@pytest.mark.parametrize("top", TOPS)
def test_rooms_import_only_lower_floors(top: str) -> None:
    graph = room_imports(top)
    assert any(graph.values())
    assert both_ways(graph) == TIED.get(top, [])
    tied = {pair for a, b in TIED.get(top, []) for pair in ((a, b), (b, a))}
    floor = {room: number for number, rooms in enumerate(FLOORS[top]) for room in rooms}
    wrong = [(a, b) for a, after in graph.items() for b in after if floor[b] >= floor[a] and (a, b) not in tied]
    assert wrong == []


@pytest.mark.parametrize("top", TOPS)
def test_no_file_and_no_folder_is_too_large(top: str) -> None:
    lines = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in product_files(top)}
    folders = [file.parent for file in lines if file.name != "__init__.py"]
    assert {file: n for file, n in lines.items() if n > MOST_LINES} == {}
    assert {folder for folder in folders if folders.count(folder) > MOST_FILES} == set()


def test_the_contributors_page_shows_the_real_imports() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"```mermaid\n{picture()}\n```" in page, (
        "put what `python -m tests.support.rooms` prints into CONTRIBUTING.md"
    )


@pytest.mark.parametrize("top", TOPS)
def test_the_contributors_page_names_every_room(top: str) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {file.parts[1] for file in product_files(top) if len(file.parts) > 2}
    assert {room for room in rooms if f"`{room}/`" not in page} == set()


#: Started from outside Python: the console script, and the script of a worker process.
ENTRIES = {"search/cli/main.py", "search/cli/__main__.py", "search/engines/local/worker_process.py"}


@pytest.mark.parametrize("top", TOPS)
def test_an_underscore_says_that_only_its_folder_uses_a_file(top: str) -> None:
    files = [
        f for f in product_files(top) if len(f.parts) > 2 and f.name != "__init__.py" and "migrations" not in f.parts
    ]
    assert [f for f in files if f.name.startswith("_") and f.as_posix() not in ENTRIES and users_outside(f)] == []
    public = [f for f in files if not f.name.startswith("_") and f.as_posix() not in ENTRIES]
    assert [f for f in public if not users_outside(f)] == []


@pytest.mark.parametrize("top", TOPS)
def test_the_door_of_every_room_is_its_table_of_contents(top: str) -> None:
    doors = [f for f in product_files(top) if f.name == "__init__.py" and f.parent.name != "versions"]
    assert doors
    for door in doors:
        tree = ast.parse((ROOT / door).read_text(encoding="utf-8"))
        contents = ast.get_docstring(tree) or ""
        rooms = {f.parent for f in product_files(top) if f.parent.parent == door.parent}
        entries = {f.stem for f in product_files(top) if f.parent == door.parent and not f.name.startswith("__")}
        entries |= {room.name for room in rooms}
        assert {entry for entry in entries if f"- ``{entry}``: " not in contents} == set(), door
        assert contents.count("- ``") == len(entries), door
        assert "__all__" in {
            t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
        }
