"""Recipes run as they stand and give the tool what the run found; what a tool has no place for is refused by name."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import RecipeTool
from alphasmith.objectives.quantization.operator import QuantizedOperator
from alphasmith.search import load_quantized, load_smoothed, recipe
from benchmarks.recipes import ENVIRONMENTS, answered, requirements
from benchmarks.tools.environments import environments_folder, is_made
from tests.support.run_cases import Mlp, alphasmith, launch, seeded, vectors

Results = Callable[[str], Path]

TOOLS: tuple[RecipeTool, ...] = get_args(RecipeTool)
STATIC, TOKEN = "w8a8-channel-static", "w8a8-channel-token"
IDS = torch.arange(24).reshape(2, 12) % 27
#: Import names of what a tool is made of; its versions are those of the table of signatures.
PACKAGES = {
    "llm-compressor": ("llmcompressor",),
    "modelopt": ("modelopt",),
    "inc": ("neural_compressor", "torchao"),
    "torchao": ("torchao",),
    "ctranslate2": ("ctranslate2",),
}
SIGNATURES: dict[str, dict[str, list[str]]] = json.loads(
    (Path(__file__).parent / "signatures.json").read_text(encoding="utf-8")
)


def python_of(tool: RecipeTool) -> Path:
    """A Python with the tool: this one, or that of its environment; the test is skipped where there is none."""
    if all(importlib.util.find_spec(package) for package in PACKAGES[tool]) and tool in ("modelopt", "ctranslate2"):
        return Path(sys.executable)
    folder = environments_folder() / ENVIRONMENTS[tool]
    if not is_made(requirements(tool), folder):
        pytest.skip(f"no {tool} here; python -m benchmarks.recipes --tools {tool} makes its environment")
    return folder / "bin" / "python"


def simulated(result: Path) -> torch.Tensor:
    model = load_quantized(result)
    for module in model.modules():
        if isinstance(module, QuantizedOperator):
            module.execution = "simulated"
    return answer(model)


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / right.norm())


def placed(result: Path, folder: Path) -> Path:
    """A copy of a result as ``folder/result``, where scripts find it by its relative path."""
    shutil.copytree(result, folder / "result")
    return folder / "result"


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_a_script_runs_as_it_stands_and_quantizes_the_smoothed_model(
    result_of: Results, tool: RecipeTool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = python_of(tool)
    result = placed(result_of(STATIC), tmp_path)
    monkeypatch.chdir(tmp_path)
    theirs = answered(python, tool, tmp_path, IDS)[..., :48]
    script = (tmp_path / f"{tool}.py").read_text(encoding="utf-8")
    assert str(tmp_path) not in script
    assert 'RESULT = Path("result")' in script
    ours, plain = simulated(result), answer(load_smoothed(result))
    lost = difference(ours, plain)
    assert 0 < difference(theirs, plain) < 2 * lost
    if tool == "modelopt":  # its weights are rounded by our rule, and its inputs have our ranges
        assert difference(theirs, ours) < 0.3 * lost
    if tool == "llm-compressor":
        stored, own = (
            load_file(folder / "model.safetensors")
            for folder in (tmp_path / "result-llm-compressor", result / "quantized")
        )
        scales = {name for name in own if name.endswith("input_scale")}
        assert scales
        assert all(torch.equal(stored[name].reshape(()), own[name]) for name in scales)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["modelopt", "torchao"])
def test_a_division_at_run_time_travels(
    explicit_result: Path, tool: RecipeTool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = python_of(tool)
    result = placed(explicit_result, tmp_path)
    monkeypatch.chdir(tmp_path)
    theirs = answered(python, tool, tmp_path, IDS)
    ours, plain = simulated(result), answer(load_smoothed(result))
    # torchao rounds the weights by a step of its own; a division that were left out would clip most of the input.
    assert difference(theirs, ours) < (0.5 if tool == "modelopt" else 2.5) * difference(ours, plain)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("scheme", [STATIC, TOKEN, pytest.param("w4a16-g8", marks=pytest.mark.slow)])
def test_names_and_arguments_are_those_of_the_tool(result_of: Results, tool: RecipeTool, scheme: str) -> None:
    try:
        script = recipe(tool, result_of(scheme))
    except InputError:
        # What the tool cannot compute; the plain scheme is always there.
        assert scheme != STATIC
        return
    used = list(calls(script, PACKAGES[tool]))
    assert used
    for name, keywords in used:
        assert name in SIGNATURES[tool]
        assert set(keywords) - set(SIGNATURES[tool][name]) == set()


def calls(script: str, packages: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Full name and keywords of every call of something that a script imports from a tool."""
    tree = ast.parse(script)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in packages:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias for alias in node.names if alias.name.split(".")[0] in packages)
            known |= {alias.asname or alias.name: alias.name for alias in names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function, _, rest = ast.unparse(node.func).partition(".")
            if function in known:
                yield ".".join(filter(None, (known[function], rest))), [k.arg for k in node.keywords if k.arg]


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_the_table_of_signatures_is_that_of_the_tool(tool: RecipeTool) -> None:
    program = (
        "import importlib, inspect, json, sys\n"
        "def found(name):\n"
        "    module, _, leaf = name.rpartition('.')\n"
        "    return list(inspect.signature(getattr(importlib.import_module(module), leaf)).parameters)\n"
        "print(json.dumps({name: found(name) for name in sys.argv[1:]}))\n"
    )
    command = [str(python_of(tool)), "-c", program, *SIGNATURES[tool]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    assert json.loads(done.stdout.splitlines()[-1]) == SIGNATURES[tool]


@pytest.mark.parametrize("tool", ["llm-compressor", "inc"])
def test_divisions_that_a_tool_has_no_place_for_are_refused_by_name(explicit_result: Path, tool: str) -> None:
    with pytest.raises(InputError, match=r"output\.dense.*sites\.explicit=never"):
        recipe(tool, explicit_result)


def test_schemes_that_a_tool_lacks_are_named(result_of: Results) -> None:
    with pytest.raises(InputError, match=f"cannot compute {TOKEN}"):
        recipe("inc", result_of(TOKEN))


def test_a_model_of_a_script_has_no_recipe(tmp_path: Path) -> None:
    folder = launch(tmp_path, seeded(Mlp), vectors(), {"search": {"trials": 4}}).folder
    with pytest.raises(InputError, match="no model of transformers"):
        recipe("torchao", folder, tmp_path / "recipe.py")
    assert not (tmp_path / "recipe.py").exists()


def test_a_changed_result_is_refused(result_of: Results, tmp_path: Path) -> None:
    result = placed(result_of(STATIC), tmp_path)
    tensors = load_file(result / "quantized" / "model.safetensors")
    name = next(n for n in tensors if n.endswith("input_scale"))
    save_file(tensors | {name: tensors[name] * 2}, result / "quantized" / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        recipe("torchao", result)


@pytest.mark.slow
def test_the_command_line_prints_and_writes_the_script(result_of: Results, tmp_path: Path) -> None:
    result = placed(result_of(STATIC), tmp_path)
    bad = alphasmith("recipe", "torch-ao", "result", cwd=tmp_path)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert all(tool in bad.stderr for tool in TOOLS)
    good = alphasmith("recipe", "torchao", result.name, "--out", "ours.py", cwd=tmp_path)
    assert good.stdout == (tmp_path / "ours.py").read_text()
    compile(good.stdout, "ours.py", "exec")
    nowhere = alphasmith("recipe", "torchao", result.name, "--out", "none/ours.py", cwd=tmp_path)
    assert nowhere.returncode == 2
    assert "--out" in nowhere.stderr
