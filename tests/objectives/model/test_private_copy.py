"""A copy that shares nothing with the user's module, whatever stands around it; what cannot be exchanged is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.model.loading import wrap_module
from alphasmith.objectives.model.private_copy import private_copy, without_wrappers, wrappers


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def compiled(module: nn.Module) -> nn.Module:
    made = torch.compile(module, backend="eager")
    assert isinstance(made, nn.Module)
    return made


def with_compiled_method(module: nn.Sequential) -> nn.Module:
    module[1].forward = torch.compile(module[1].forward, backend="eager")
    return module


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


WRAPPED: dict[str, tuple[Callable[[nn.Sequential], nn.Module], tuple[str, ...]]] = {
    "compiled": (compiled, ("OptimizedModule",)),
    "parallel": (DataParallel, ("DataParallel",)),
    "both": (lambda m: DataParallel(compiled(m)), ("DataParallel", "OptimizedModule")),
    "part": (lambda m: nn.Sequential(m[0], compiled(m[1]), m[2], m[3]).eval(), ("OptimizedModule",)),
    "method": (with_compiled_method, ()),
    "in place": (compiled_in_place, ()),
    "nothing": (lambda m: m, ()),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_copy_computes_the_same_by_itself(kind: str) -> None:
    wrap, around = WRAPPED[kind]
    given = wrap(plain())
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = plain()(x)
        copied = private_copy(given)
        assert wrappers(given) == around
        assert list(copied.state_dict()) == list(plain().state_dict())
        assert torch.equal(copied(x), expected)
        for value in copied.parameters():
            value.zero_()
        assert torch.equal(copied(x), torch.zeros(3, 2))  # it reads its own weights, not those of the module given
        assert torch.equal(given(x), expected)
    assert not wrappers(copied)


def test_a_module_of_ones_own_is_taken_without_a_copy() -> None:
    module = plain()
    assert without_wrappers(compiled(module)) is module


def test_a_wrapped_model_is_taken_with_a_note() -> None:
    loaded = wrap_module(DataParallel(plain()))
    assert isinstance(loaded.model, nn.Sequential)
    (note,) = loaded.notes
    assert "DataParallel" in note
    assert not wrap_module(plain()).notes


class TwoFaced(nn.Linear):
    """A module that is run by something else than its class's forward."""


def other_function() -> nn.Module:
    module = TwoFaced(6, 2)
    vars(module)["forward"] = torch.compile(torch.neg, backend="eager")
    return nn.Sequential(module)


def exported() -> nn.Module:
    return torch.export.export(plain(), (torch.randn(3, 6),)).module()


REFUSED: dict[str, Callable[[], object]] = {
    "scripted": lambda: torch.jit.script(plain()),
    "traced": lambda: torch.jit.trace(plain(), torch.randn(3, 6)),
    "scripted part": lambda: nn.Sequential(nn.LayerNorm(6), torch.jit.script(plain())),
    "scripted and parallel": lambda: DataParallel(torch.jit.script(plain())),
    "exported": exported,
    "exported part": lambda: nn.ModuleDict({"part": exported()}),
    "program": lambda: torch.export.export(plain(), (torch.randn(3, 6),)),
    "other function": other_function,
    "function": lambda: plain().forward,
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_exchanged_is_one_line_with_a_remedy(kind: str) -> None:
    with pytest.raises(InputError) as caught:
        private_copy(REFUSED[kind]())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert caught.value.field == "model"
    assert "give " in caught.value.remedy


def test_a_traced_graph_of_modules_is_a_module_like_any_other() -> None:
    copied = private_copy(torch.fx.symbolic_trace(plain()))
    assert list(copied.state_dict()) == list(plain().state_dict())
