"""Private names of other libraries are used in one file each; everything else keeps to what the libraries promise."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("search", "objectives", "storage", "dashboards")
#: The one file for each library that has such a file, and that library.
HOMES = {
    "storage/database/optuna_private.py": "optuna",
    "search/engines/cluster/_ray_private.py": "ray",
    "objectives/model/private_copy.py": "torch.compile",
    "objectives/model/_parametrizations.py": "torch.nn.utils",
    "search/exports/onnx/_guards.py": "torch.export",
}
#: What Python documents with an underscore, and what torch has under no other name: a module's registries and hooks, the
#: integer product, operators and their schemas, the forward of a convolution without its padding, what tells that a tensor changed.
_PYTHON = {"_exit", "_Hash", "_fields"}
_TORCH = {
    *("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_apply"),
    *("_int_mm", "_ops", "_conv_forward", "_cdata", "_schema", "_version"),
}
_TORCH_MODULES = {"torch.utils._python_dispatch", "torch.utils._pytree"}
#: transformers tells by them whether a model can be set to eager attention or experts; asked for with a default.
_TRANSFORMERS = {"_can_set_attn_implementation", "_can_set_experts_implementation"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_modules(node: ast.AST) -> Iterator[str]:
    """Modules and names of other libraries that an import names, where a part of them is private."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        module = str(node.module)
        names = [module if alias.name == "*" else f"{module}.{alias.name}" for alias in node.names]
    else:
        return
    for name in names:
        first, *rest = name.split(".")
        if first not in {"alphasmith", "__future__"} and any(is_private(part) for part in rest):
            yield name


def own_names(tree: ast.Module) -> set[str]:
    """Names that a file defines: functions, classes, attributes and fields."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                found.add(name)
    return found


def touched(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of every private name that is not the file's own."""
    own = own_names(tree)
    for node in ast.walk(tree):
        for name in private_modules(node):
            if name.rpartition(".")[0] not in _TORCH_MODULES:
                yield getattr(node, "lineno", 0), name
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, ast.unparse(node)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"getattr", "hasattr", "setattr"}
            and isinstance(node.args[1], ast.Constant)
            and isinstance(asked := node.args[1].value, str)
            and is_private(asked)
        ):
            yield node.lineno, f".{asked}"


@pytest.mark.parametrize("room", ROOMS)
def test_private_names_have_one_home(room: str) -> None:
    allowed = _PYTHON | _TRANSFORMERS | (_TORCH if room == "objectives" else set())
    found = [
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file in sorted((ROOT / room).rglob("*.py"))
        if file.relative_to(ROOT).as_posix() not in HOMES
        for line, name in touched(ast.parse(file.read_text(encoding="utf-8")))
        if name.rpartition(".")[2] not in allowed
    ]
    assert found == []


@pytest.mark.parametrize(("home", "library"), HOMES.items())
def test_a_home_is_for_one_library(home: str, library: str) -> None:
    tree = ast.parse((ROOT / home).read_text(encoding="utf-8"))
    others = [name for node in ast.walk(tree) for name in private_modules(node) if name.split(".")[0] != library]
    assert others == []
    assert list(touched(tree)), "a home without private names is none"


@pytest.mark.parametrize(
    "line",
    [
        "from optuna.storages._rdb import models",
        "import ray._private.worker",
        "from ray.tune import _internal",
        "study._storage",
        "self.study._study_id",
        "getattr(controller, '_actor_cache', None)",
    ],
)
def test_what_counts_as_touching(line: str) -> None:
    assert list(touched(ast.parse(line)))
