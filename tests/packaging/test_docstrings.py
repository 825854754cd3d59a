"""Docstrings name what is there: arguments of the signature, attributes of the class, and targets of references."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path.relative_to(ROOT)
    for room in ("search", "objectives", "storage", "dashboards", "tests", "benchmarks")
    for path in (ROOT / room).rglob("*.py")
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def entries(docstring: str, title: str) -> list[str]:
    """Names that a section describes, ``*`` and types left out."""
    section = re.search(rf"^{title}:\n((?:    .*\n|\n)*)", docstring + "\n", flags=re.MULTILINE)
    heads = re.findall(r"^    (\S[\w, *]*?)(?: \(.*?\))?:(?:\s|$)", section.group(1) if section else "", re.MULTILINE)
    return [name.strip(" *") for head in heads for name in head.split(",")]


def parameters(function: Function) -> set[str]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return {argument.arg for argument in every if argument} - {"self", "cls"}


def attributes(node: ast.ClassDef) -> set[str]:
    """Fields, properties and what is set on ``self`` or on the class."""
    return {
        *(
            part.target.id
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        ),
        *(part.name for part in node.body if isinstance(part, Function)),
        *(part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)),
        *(part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)),
    }


def drifted(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, Function | ast.ClassDef):
            continue
        docstring = ast.get_docstring(node) or ""
        function: ast.stmt | None = node
        if isinstance(node, ast.ClassDef):
            function = next((p for p in node.body if isinstance(p, Function) and p.name == "__init__"), None)
            if described := entries(docstring, "Attributes"):
                yield from (f"{node.name}.{name}" for name in sorted(set(described) - attributes(node)))
        if isinstance(function, Function) and (described := entries(docstring, "Args")):
            yield from (f"{node.name}({name})" for name in sorted(set(described) ^ parameters(function)))


def test_drift_is_found() -> None:
    code = '''
class A:
    """A.

    Attributes:
        kept: Yes.
        gone: No: not any more.

    Args:
        a, b: Both.
        old: Was renamed,
            and is described at length: here.
    """

    kept: int

    def __init__(self, a: int, b: int, new: int) -> None: ...
'''
    assert list(drifted(ast.parse(code))) == ["A.gone", "A(new)", "A(old)"]


def test_arguments_and_attributes_are_those_of_the_code() -> None:
    found = {
        module.as_posix(): [*drifted(ast.parse((ROOT / module).read_text(encoding="utf-8")))] for module in MODULES
    }
    assert {module: names for module, names in found.items() if names} == {}


def resolves(target: str) -> bool:
    """Whether the longest module of a dotted name defines every name that follows; nothing is imported."""
    parts = target.split(".")[1:]
    for cut in range(len(parts), 0, -1):
        for file in (ROOT.joinpath(*parts[:cut]).with_suffix(".py"), ROOT.joinpath(*parts[:cut], "__init__.py")):
            if file.is_file():
                code = file.read_text(encoding="utf-8")
                return all(re.search(rf"^ *(class |def )?{name}\b *[=:(]", code, re.MULTILINE) for name in parts[cut:])
    return False


def test_references_lead_somewhere() -> None:
    role = re.compile(r":[a-z]+:`~?(alphasmith\.[\w.]+)`")
    targets = {target for module in MODULES for target in role.findall((ROOT / module).read_text(encoding="utf-8"))}
    assert resolves("alphasmith.search.config.RunConfig.build")
    assert not resolves("alphasmith.search.config.gone")
    assert sorted(target for target in targets if not resolves(target)) == []
