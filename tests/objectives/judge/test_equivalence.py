"""The proof that folding changes nothing, and the name of the site that broke it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import EquivalenceError, InputError, NonFiniteError
from alphasmith.objectives.judge.equivalence import ALL_SITES, Equivalence, fold_and_prove, prove, references_of
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites.folding import fold
from alphasmith.objectives.sites.types import Site
from tests.support.quantized_models import Example, block_example, pixels_example


def folded(example: Example, sites: tuple[Site, ...] | None = None) -> nn.Module:
    model = copy.deepcopy(example.model)
    for found in example.sites if sites is None else sites:
        if found.mode == "fold":
            fold(model, found, example.smoothings[found.name])
    return model


def broken(example: Example, index: int) -> tuple[Site, ...]:
    """The sites with one producer edit of one fold site lost: its consumers grow, and that producer does not shrink."""
    sites = list(example.sites)
    sites[index] = replace(sites[index], edits=sites[index].edits[:-1])
    return tuple(sites)


@pytest.mark.parametrize("example", [block_example(), pixels_example()])
def test_folding_is_proven_exact(example: Example) -> None:
    before = copy.deepcopy(example.model.state_dict())
    after = folded(example)
    error = prove(example.model, after, example.batches)
    # Weights rounded once to float32: a few 2^-24, and not 0 because something was folded.
    assert 0 < error < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in example.model.state_dict().items())
    assert all(p.dtype == torch.float32 for p in after.parameters())
    assert prove(example.model, example.model, example.batches) == 0.0


@pytest.mark.parametrize("example", [block_example(), pixels_example()])
def test_folding_in_place_is_folding_a_copy(example: Example) -> None:
    model = copy.deepcopy(example.model)
    found = fold_and_prove(model, example.sites, example.smoothings, example.batches)
    after = folded(example)
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in model.state_dict().items())
    error = prove(example.model, after, example.batches)
    assert found == Equivalence(error=error, dtype="float64", outputs=("output",))
    own = fold_and_prove(
        copy.deepcopy(example.model), example.sites, example.smoothings, example.batches, float64_bytes=0
    )
    assert own.dtype == "float32"
    assert found.error < own.error < 1e-5


@pytest.mark.parametrize(("example", "index"), [(block_example(), 0), (block_example(), 1), (pixels_example(), 1)])
def test_broken_site_is_refused_by_name(example: Example, index: int) -> None:
    sites = broken(example, index)
    name = sites[index].name
    model = copy.deepcopy(example.model)
    with pytest.raises(EquivalenceError, match=f"site {name}: ") as refusal:
        fold_and_prove(model, sites, example.smoothings, example.batches)
    assert refusal.value.site == name
    assert refusal.value.error > refusal.value.tolerance == 1e-4
    # Without the sites no name can be given; the pattern that stands for all is.
    with pytest.raises(EquivalenceError) as refusal:
        prove(example.model, folded(example, sites), example.batches)
    assert refusal.value.site == ALL_SITES


def test_no_single_site_is_named_where_none_is_at_fault() -> None:
    example = block_example()
    with pytest.raises(EquivalenceError) as refusal:  # rounding alone is above this tolerance
        fold_and_prove(
            copy.deepcopy(example.model), example.sites, example.smoothings, example.batches, tolerance=1e-12
        )
    assert refusal.value.site == ALL_SITES


def test_sites_that_do_not_fold_are_passed_over() -> None:
    example = block_example()
    sites = broken(example, 1)
    without = {name: s for name, s in example.smoothings.items() if name != sites[1].name}
    assert fold_and_prove(copy.deepcopy(example.model), sites, without, example.batches).error < 1e-6
    left = tuple(replace(s, mode="left", edits=()) for s in example.sites)
    assert fold_and_prove(copy.deepcopy(example.model), left, example.smoothings, example.batches).error == 0.0


def test_every_batch_is_compared() -> None:
    example = block_example()
    quiet = Batch(args=(torch.ones(1, 1, 9),))  # constant rows leave the norm as its bias, so its weight has no effect
    after = copy.deepcopy(example.model)
    after.get_parameter("norm.weight").data.mul_(2)
    assert prove(example.model, after, [quiet]) < 1e-6
    with pytest.raises(EquivalenceError):
        prove(example.model, after, [quiet, example.batches[0]])


def test_padding_is_not_compared() -> None:
    example = block_example()
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 0] = True

    class Tail(nn.Module):
        """Adds an offset to every position but the first."""

        def __init__(self, inner: nn.Module, offset: float) -> None:
            super().__init__()
            self.inner, self.offset = inner, offset

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return torch.cat((y[:, :1], y[:, 1:] + self.offset), dim=1)

    batch = replace(example.batches[0], mask=mask)
    assert prove(Tail(example.model, 0.0), Tail(example.model, 1.0), [batch]) == 0.0
    with pytest.raises(EquivalenceError):
        prove(Tail(example.model, 0.0), Tail(example.model, 1.0), [example.batches[0]])


def test_non_finite_outputs_are_never_equal() -> None:
    example = block_example()
    after = copy.deepcopy(example.model)
    after.get_parameter("out.bias").data.fill_(float("inf"))
    with pytest.raises(EquivalenceError):
        prove(example.model, after, example.batches)
    with pytest.raises(NonFiniteError):
        prove(after, example.model, example.batches)


def test_zero_reference_admits_only_zero() -> None:
    zero = nn.Linear(2, 2)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    batch = Batch(args=(torch.ones(1, 2),))
    assert prove(zero, zero, [batch]) == 0.0
    other = copy.deepcopy(zero)
    nn.init.ones_(other.bias)
    with pytest.raises(EquivalenceError):
        prove(zero, other, [batch])


def test_model_that_refuses_float64_is_compared_as_it_is() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.linear(x.float()))

    model = Single()
    batch = Batch(args=(torch.ones(2, 4),))
    assert prove(model, copy.deepcopy(model), [batch]) == 0.0
    after = copy.deepcopy(model)
    after.linear.bias.data.add_(1)
    with pytest.raises(EquivalenceError):
        prove(model, after, [batch])


def test_large_models_are_compared_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    example = block_example()
    after = folded(example)
    exact = prove(example.model, after, example.batches)
    with monkeypatch.context() as patch:
        patch.setattr(copy, "deepcopy", lambda *_: pytest.fail("copied"))
        own = prove(example.model, after, example.batches, float64_bytes=0)
    assert own != exact  # float32 additions are now part of the error
    assert own < 1e-5
    assert prove(example.model, after, example.batches, dtype=torch.float64, float64_bytes=0) == exact


def test_training_mode_is_neither_compared_nor_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    batch = Batch(args=(torch.ones(4, 3),))
    assert prove(model, copy.deepcopy(model), [batch], dtype=torch.float32) == 0.0
    assert model.training


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_senseless_requests_are_refused(tolerance: float) -> None:
    example = block_example()
    with pytest.raises(InputError, match="tolerance"):
        prove(example.model, example.model, example.batches, tolerance=tolerance)
    with pytest.raises(InputError, match="batches"):
        prove(example.model, example.model, [])


class Answering(nn.Module):
    """The model's answer beside something that is computed from another of its tensors."""

    def __init__(self, inner: nn.Module, beside: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self._beside = inner, beside

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"aux_loss": self._beside(self.inner, x), "logits": self.inner(x)}


def test_every_output_is_compared_and_the_one_that_changed_is_named() -> None:
    example = block_example()

    def beside(inner: nn.Module, x: Tensor) -> Tensor:
        return inner.get_parameter("down.weight").square().mean() + x.mean() * 0

    model = Answering(example.model, beside)
    after = Answering(folded(example), beside)
    with pytest.raises(EquivalenceError, match="in aux_loss") as refusal:
        prove(model, after, example.batches)
    assert refusal.value.output == "aux_loss"
    masked = Answering(example.model, lambda inner, x: torch.full_like(x, -torch.inf))
    assert prove(masked, Answering(folded(example), masked._beside), example.batches) < 1e-6


def test_a_reference_that_is_not_finite_in_float64_only_is_made_in_the_models_own_type() -> None:
    class Overflowing(nn.Module):
        """A constant of float32's precision: 1 - 1e-9 is 1 in float32 only, and the logarithm of the rest is not finite."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            rounded = (x * 0 + 1) - 1e-9
            return torch.as_tensor(self.linear(x) + torch.sqrt(rounded - 1))

    model = Overflowing()
    batch = Batch(args=(torch.ones(2, 4),))
    assert torch.isnan(model.double()(batch.args[0].double())).all()
    model = model.float()
    after = copy.deepcopy(model)
    assert prove(model, after, [batch]) == 0.0
    assert references_of(model, [batch]).dtype == "float32"
    after.linear.bias.data.add_(1)
    with pytest.raises(EquivalenceError):
        prove(model, after, [batch])
