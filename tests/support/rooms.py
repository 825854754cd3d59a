"""The rooms of the product and who imports whom, read from the source; ``python -m tests.support.rooms`` prints the picture."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("search", "objectives", "storage", "dashboards")


def product_files(top: str) -> list[Path]:
    """Python files of a top-level folder, relative to the project's root."""
    return sorted(file.relative_to(ROOT) for file in (ROOT / top).rglob("*.py"))


@functools.cache
def imported_modules(source: Path) -> set[str]:
    """Full names of what a file imports anywhere in it.

    Args:
        source: Relative to the project's root, or absolute.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            # `from alphasmith.storage.runs import records` imports a module by a name of the package.
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def room_of(parts: tuple[str, ...]) -> str | None:
    """The folder, or the file at the door, that ``search.cli.main`` lies in: ``cli``, or ``config``; None for a top folder."""
    return parts[1] if len(parts) > 1 else None


def room_imports(top: str) -> dict[str, set[str]]:
    """Room -> other rooms of the same top-level folder that it imports."""
    rooms = {room for file in product_files(top) if (room := room_of(file.with_suffix("").parts)) != "__init__"}
    found: dict[str, set[str]] = {str(room): set() for room in rooms}
    for file in product_files(top):
        here = room_of(file.with_suffix("").parts)
        for module in imported_modules(file):
            first, *rest = module.split(".")
            there = room_of(tuple(rest))
            if first == "alphasmith" and rest[0] == top and here in found and there in rooms - {here}:
                found[str(here)].add(str(there))
    return found


def top_imports() -> dict[str, set[str]]:
    """Top-level folder -> other top-level folders that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for top in TOPS:
        modules = (module.split(".") for file in product_files(top) for module in imported_modules(file))
        found[top] = {m[1] for m in modules if m[0] == "alphasmith" and len(m) > 1} & set(TOPS) - {top}
    return dict(found)


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same graph without arrows that a longer way says already; it must have no circle."""

    def reached(start: str) -> set[str]:
        return {start}.union(*(reached(after) for after in graph[start]))

    return {
        a: {b for b in after if not any(b in reached(c) for c in after - {b})} for a, after in sorted(graph.items())
    }


def picture() -> str:
    """Who imports whom as Mermaid text, one box a top-level folder; arrows that a longer way says are left out."""
    lines = ["flowchart TD"]
    for top in TOPS:
        graph = room_imports(top)
        for a, b in both_ways(graph):
            graph[b].discard(a)
        lines.append(f"  subgraph {top}")
        lines += [f"    {top}.{room}[{room}]" for room in sorted(graph)]
        lines += [f"    {top}.{a} --> {top}.{b}" for a, after in reduced(graph).items() for b in sorted(after)]
        lines.append("  end")
    lines += [f"  {a} ==> {b}" for a, after in reduced(top_imports()).items() for b in sorted(after)]
    return "\n".join(lines)


def users_outside(file: Path) -> set[Path]:
    """Files of the product, the benchmarks and the examples that import a product file from another folder than its own."""
    name = ".".join(("alphasmith", *file.with_suffix("").parts))
    others = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").rglob("*.py")]
    candidates = [f for top in TOPS for f in product_files(top)] + [f.relative_to(ROOT) for f in others]
    return {f for f in candidates if f.parent != file.parent and name in imported_modules(f)}


def both_ways(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Pairs of rooms that import each other, each pair once."""
    return sorted((a, b) for a, after in graph.items() for b in after if a < b and a in graph[b])


if __name__ == "__main__":
    print(picture())
