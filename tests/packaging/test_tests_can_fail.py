"""Every test can fail: it checks something, and nothing that holds whatever the code does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tests").rglob("*.py"))
#: What fails a test when it is called: of pytest, and every ``assert_...`` of torch and numpy.
FAILING = ("raises", "warns", "fail", "assert_")


@cache
def tree(path: Path) -> ast.Module:
    """A file, parsed."""
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    """All functions and methods of a file, nested ones included."""
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef))


@cache
def helpers(path: Path) -> dict[str, list[tuple[Path, ast.FunctionDef]]]:
    """What a file can call by name: its own functions and methods, and those of the test files it imports from."""
    modules = [node.module or "" for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)]
    sources = [ROOT / f"{name.replace('.', '/')}.py" for name in modules if name.startswith("tests.")]
    found: dict[str, list[tuple[Path, ast.FunctionDef]]] = {}
    for source in dict.fromkeys([path, *sources]):
        for function in functions(source):
            found.setdefault(function.name, []).append((source, function))
    return found


def name_of(call: ast.Call) -> str:
    """What is called, without what it is an attribute of."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def checks(path: Path, function: ast.FunctionDef, seen: frozenset[ast.FunctionDef] = frozenset()) -> bool:
    """Whether a function asserts, expects an exception or a warning, or calls a helper that does."""
    if any(isinstance(node, ast.Assert) for node in ast.walk(function)):
        return True
    names = {name_of(node) for node in ast.walk(function) if isinstance(node, ast.Call)}
    if any(name.startswith(FAILING) for name in names):
        return True
    called = [one for name in names for one in helpers(path).get(name, []) if one[1] not in seen]
    return any(checks(source, helper, seen | {function}) for source, helper in called)


@cache
def defaults() -> dict[str, list[dict[str, str]]]:
    """Name of every function of the product -> default values of its parameters; several functions may have one name."""
    found: dict[str, list[dict[str, str]]] = {}
    for folder in ("search", "objectives", "storage", "dashboards"):
        for function in (f for path in (ROOT / folder).rglob("*.py") for f in functions(path)):
            plain = [*function.args.posonlyargs, *function.args.args]
            pairs = list(zip(reversed(plain), reversed(function.args.defaults), strict=False))
            pairs += [(a, d) for a, d in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True) if d]
            found.setdefault(function.name, []).append({a.arg: ast.dump(d) for a, d in pairs})
    return found


def said(call: ast.Call) -> tuple[str, ...]:
    """A call without the arguments that are their defaults."""
    known = defaults().get(name_of(call), [])
    given = [(keyword.arg or "", ast.dump(keyword.value)) for keyword in call.keywords]
    kept = sorted(f"{name}={value}" for name, value in given if all(values.get(name) != value for values in known))
    return ast.dump(call.func), *map(ast.dump, call.args), *kept


def same(left: ast.expr, right: ast.expr) -> bool:
    """Whether two expressions are the same one."""
    if isinstance(left, ast.Call) and isinstance(right, ast.Call):
        return said(left) == said(right)
    return ast.dump(left) == ast.dump(right)


def always_true(test: ast.expr) -> bool:
    """Whether an expression is true whatever the code does, as far as one can see."""
    match test:
        case ast.Constant(value=value):
            return bool(value)
        case ast.Tuple(elts=[_, *_]):
            return True
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(map(always_true, values))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(map(always_true, values))
        case ast.UnaryOp(op=ast.Not(), operand=ast.Constant(value=value)):
            return not value
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is() | ast.LtE() | ast.GtE()], comparators=[right]):
            return same(left, right)
    return False


def empty_loop(node: ast.AST) -> bool:
    """Whether a loop goes over nothing."""
    return isinstance(node, ast.For) and isinstance(node.iter, ast.List | ast.Tuple) and not node.iter.elts


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_checks_something(path: Path) -> None:
    tests = [function for function in functions(path) if function.name.startswith("test_")]
    assert [test.name for test in tests if not checks(path, test)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_assertion_holds_whatever_the_code_does(path: Path) -> None:
    nodes = list(ast.walk(tree(path)))
    vain = [node for node in nodes if (isinstance(node, ast.Assert) and always_true(node.test)) or empty_loop(node)]
    assert [f"line {node.lineno}: {ast.unparse(node)}" for node in vain if isinstance(node, ast.stmt)] == []


@pytest.mark.parametrize(
    "line",
    [
        "assert found or True",
        "assert (found, 'with a message')",
        "assert a == a",
        "assert group_ranges([1, 2], rho=0.0) == group_ranges([1, 2])",
        "assert 1",
        "for a in []: assert a",
    ],
)
def test_such_lines_are_found(line: str) -> None:
    (node,) = ast.parse(line).body
    assert empty_loop(node) or (isinstance(node, ast.Assert) and always_true(node.test))


@pytest.mark.parametrize(
    "line",
    [
        "assert found or other",
        "assert a == b",
        "assert a != a",
        "assert group_ranges([1, 2], rho=0.1) == group_ranges([1, 2])",
        "for a in [1]: assert a",
    ],
)
def test_others_are_left_alone(line: str) -> None:
    (node,) = ast.parse(line).body
    assert not empty_loop(node)
    assert not (isinstance(node, ast.Assert) and always_true(node.test))


def test_a_test_without_a_check_is_found(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(
        "def helper(): assert 1 < 2\ndef test_a(): helper()\ndef test_b(): print()\ndef test_c(): c(helper)\n"
    )
    assert [checks(file, function) for function in functions(file)] == [True, True, False, False]
