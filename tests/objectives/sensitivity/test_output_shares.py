"""What every site adds to the error of the model's output: predicted, measured, and what happens where it cannot be predicted."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.losses import divergences
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sensitivity import output_shares as module
from alphasmith.objectives.sensitivity._gradients import direction, weight_of
from alphasmith.objectives.sensitivity._graph_memory import graph_plans
from alphasmith.objectives.sensitivity.output_shares import OutputShares, output_shares
from tests.support.quantized_models import SCHEMES, Example, block_example, chain_example, pixels_example, shifted

EXAMPLES = [block_example(), shifted(block_example()), pixels_example(), shifted(pixels_example())]


def candidate_of(example: Example, scheme: Scheme | None = None) -> CandidateModel:
    return CandidateModel(copy.deepcopy(example.model), example.sites, example.ranges, scheme or Scheme())


def shares_of(example: Example, **settings: Any) -> OutputShares:
    return output_shares(candidate_of(example), example.smoothings, example.batches, **settings)


def predictions(shares: OutputShares) -> dict[str, float | None]:
    return {name: site.predicted for name, site in shares.sites.items()}


def known(shares: OutputShares) -> dict[str, float]:
    return {name: value for name, value in predictions(shares).items() if value is not None}


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_prediction_agrees_with_measurement(example: Example, loss: Literal["mse", "kl"]) -> None:
    shares = shares_of(example, loss=loss, projections=150, measured=99)
    for site in shares.sites.values():
        assert site.predicted is not None
        assert site.measured is not None
        # 6 samples of 150 projections each; the model is not quite linear in errors of one part in a hundred.
        assert site.predicted == pytest.approx(site.measured, rel=0.35)
    assert shares.predicted is not None
    assert shares.measured is not None
    assert 1 / 1.5 < shares.predicted / shares.measured < 1.5
    assert math.fsum(shares.share(name) or 0 for name in shares.sites) == pytest.approx(1)
    assert shares.notes == ()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_site_alone_is_the_candidate_in_which_nothing_else_is_quantized(scheme: Scheme) -> None:
    example = shifted(block_example())
    shares = output_shares(
        candidate_of(example, scheme), example.smoothings, example.batches, measured=99, projections=1
    )
    for site in example.sites:
        others = [operator.name for other in example.sites if other.name != site.name for operator in other.operators]
        explicit = tuple(
            replace(s, mode="explicit", edits=tuple(e for e in s.edits if e.power > 0), shift_edits=())
            for s in example.sites
        )
        alone = CandidateModel(copy.deepcopy(example.model), explicit, example.ranges, scheme, others)
        expected = ModelObjective(alone, example.batches).loss({site.name: example.smoothings[site.name]})
        assert shares.sites[site.name].measured == pytest.approx(expected, rel=1e-3)


def test_site_losses_and_predictions_rank_alike_under_more_projections() -> None:
    few, many = (predictions(shares_of(block_example(), projections=k, measured=0)) for k in (64, 512))
    names = list(few)
    assert kendalltau([few[n] for n in names], [many[n] for n in names]).statistic >= 0.6


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_model_is_left_as_it_was(example: Example) -> None:
    model = copy.deepcopy(example.model).requires_grad_(True).train()
    candidate = CandidateModel(model, example.sites, example.ranges, Scheme())
    model.train()
    before = [module._forward_hooks.copy() for module in model.modules()]
    output_shares(candidate, example.smoothings, example.batches, projections=1)
    candidate.check_pristine()
    assert [module._forward_hooks for module in model.modules()] == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert torch.equal(candidate.model(*example.batches[0].args), example.model(*example.batches[0].args))


def test_equal_seeds_give_equal_shares_whatever_the_batches() -> None:
    example = block_example()
    together = replace(example, batches=(Batch(args=(torch.cat([b.args[0] for b in example.batches]),)),))
    first, second = (shares_of(example, seed=3) for _ in range(2))
    assert first == second
    assert predictions(shares_of(together, seed=3)) == pytest.approx(predictions(shares_of(example, seed=3)), rel=1e-5)
    assert predictions(shares_of(example, seed=3)) != predictions(shares_of(example, seed=4))


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_padding_counts_for_nothing(loss: Literal["mse", "kl"]) -> None:
    example = block_example()
    mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    x = example.batches[0].args[0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    found = [
        shares_of(replace(example, batches=(Batch(args=(values,), mask=mask),)), loss=loss)
        for values in (x, torch.where(mask[..., None], x, noise))
    ]
    assert predictions(found[0]) == predictions(found[1])
    assert found[0].measured == found[1].measured


def test_more_samples_than_asked_for_are_left_out() -> None:
    example = block_example()
    first = replace(example, batches=example.batches[:1])
    assert shares_of(example, samples=3) == shares_of(first, samples=3)


class Wrapped(nn.Module):
    """The block of the example under its own names, with something around it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        for name, child in inner.named_children():
            self.add_module(name, child)
        self.block = [inner]  # hidden from the registry: names stay those of the sites

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.block[0](x))


class Detached(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class WithoutGradients(Wrapped):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class AsNumbers(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(super().forward(x).numpy())


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise ZeroDivisionError("no derivative was written for this kernel")


class Kernel(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        apply: Any = _Kernel.apply
        return torch.as_tensor(apply(super().forward(x)))


@pytest.mark.parametrize("kind", [Detached, WithoutGradients, AsNumbers, Kernel])
def test_a_model_without_gradients_is_measured(kind: type[Wrapped]) -> None:
    example = block_example()
    candidate = CandidateModel(
        kind(copy.deepcopy(example.model)), example.sites, example.ranges, Scheme(activation_granularity="token")
    )
    shares = output_shares(candidate, example.smoothings, example.batches)
    assert set(predictions(shares).values()) == {None}
    assert all(site.measured is not None and site.site_loss > 0 for site in shares.sites.values())
    assert "cannot be predicted" in shares.notes[0]
    assert "measured instead" in shares.notes[0]
    assert shares.share("q") is None
    # A constant factor at the end changes no relative loss: as measured on the plain model.
    plain = output_shares(
        candidate_of(example, Scheme(activation_granularity="token")), example.smoothings, example.batches, measured=99
    )
    for name, site in shares.sites.items():
        assert site.measured == pytest.approx(plain.sites[name].measured, rel=1e-4)


def test_the_sites_of_largest_loss_are_measured_where_nothing_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEASURED_INSTEAD", 2)
    example = block_example()
    candidate = CandidateModel(Detached(copy.deepcopy(example.model)), example.sites, example.ranges, Scheme())
    shares = output_shares(candidate, example.smoothings, example.batches)
    ranked = sorted(shares.sites, key=lambda name: shares.sites[name].site_loss, reverse=True)
    assert [name for name in ranked if shares.sites[name].measured is not None] == ranked[:2]
    assert "the 2 of the largest site loss" in shares.notes[0]


def test_too_little_memory_is_told_and_measured() -> None:
    shares = shares_of(block_example(), memory=1000)
    assert set(predictions(shares).values()) == {None}
    assert "a backward pass needs" in shares.notes[0]
    assert all(site.measured is not None for site in shares.sites.values())
    assert shares_of(block_example(), memory=1 << 30) == shares_of(block_example())


def _memory_for(example: Example, *, projections: int, checkpointed: bool) -> int:
    """Least memory in which a sample goes back in this way, with 4 projections asked for."""
    candidate = candidate_of(example)
    operators = candidate.alone(example.smoothings)
    held = sum(buffer.nbytes for of_site in operators.values() for q in of_site.values() for buffer in q.buffers())
    sample = example.batches[0].narrow(0, 1)
    (way,) = (
        plan
        for plan in graph_plans(candidate.model, operators, [sample], None, 4).plans
        if plan.projections == projections and bool(plan.checkpointed) == checkpointed
    )
    return way.need + held


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_where_memory_is_short_blocks_are_computed_again_with_the_same_result(loss: Literal["mse", "kl"]) -> None:
    example = chain_example()
    plain = shares_of(example, loss=loss, projections=4)
    assert plain.notes == ()
    memory = _memory_for(example, projections=4, checkpointed=True)
    tight = shares_of(example, loss=loss, projections=4, memory=memory)
    assert len(tight.notes) == 1
    assert "a backward pass needs" in tight.notes[0]
    assert "6 blocks of the model are computed again for each one (gradient checkpointing)" in tight.notes[0]
    assert "1 projection" not in tight.notes[0]
    assert predictions(tight) == pytest.approx(predictions(plain), rel=1e-5)
    assert [s.site_loss for s in tight.sites.values()] == pytest.approx([s.site_loss for s in plain.sites.values()])
    assert tight.measured == plain.measured


def test_where_checkpoints_are_not_enough_one_projection_is_taken() -> None:
    example = chain_example()
    memory = _memory_for(example, projections=1, checkpointed=True)
    tight = shares_of(example, projections=4, memory=memory)
    assert (
        "(gradient checkpointing), and 1 projection of every sample's output is taken in place of 4" in tight.notes[0]
    )
    assert predictions(tight) == pytest.approx(predictions(shares_of(example, projections=1)), rel=1e-5)
    less = shares_of(example, projections=4, memory=memory - 1)
    assert set(predictions(less).values()) == {None}
    assert "in the way that takes least it needs" in less.notes[0]
    assert "measured instead" in less.notes[0]


def test_a_model_without_blocks_has_fewer_projections() -> None:
    example = block_example()
    memory = _memory_for(example, projections=1, checkpointed=False)
    tight = shares_of(example, projections=4, memory=memory)
    assert "checkpointing" not in tight.notes[0]
    assert predictions(tight) == predictions(shares_of(example, projections=1))


class _Sizes:
    """Bytes that the graph of a forward pass keeps at a time; what checkpoints compute again does not come here."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        kept = _Kept(self, tensor.clone())
        self.now += kept.tensor.nbytes
        self.most = max(self.most, self.now)
        return kept


class _Kept:
    def __init__(self, sizes: _Sizes, tensor: Tensor) -> None:
        self._sizes = sizes
        self.tensor = tensor

    def __del__(self) -> None:
        self._sizes.now -= self.tensor.nbytes


def test_checkpoints_keep_less_in_the_graph() -> None:
    example = chain_example(12)
    found = {}
    for memory in (None, _memory_for(example, projections=4, checkpointed=True)):
        sizes = _Sizes()
        with torch.autograd.graph.saved_tensors_hooks(sizes.pack, lambda kept: kept.tensor):
            notes = shares_of(example, memory=memory, projections=4).notes
        found["gradient checkpointing" in "".join(notes)] = sizes.most
    assert found[True] < 0.4 * found[False]


class Unused(Wrapped):
    """``out`` runs, and what it makes is thrown away; ``k`` is under no_grad."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self.block[0]
        h = block.norm(x)
        with torch.no_grad():
            k = block.k(h)
        block.out(torch.nn.functional.gelu(k))
        return torch.as_tensor(block.head(block.down(torch.relu(block.q(h)))))


def test_a_site_that_the_output_does_not_read_adds_nothing() -> None:
    example = block_example()
    candidate = CandidateModel(Unused(copy.deepcopy(example.model)), example.sites, example.ranges, Scheme())
    shares = output_shares(candidate, {}, example.batches)
    assert shares.sites["out"].predicted == 0
    assert shares.sites["out"].measured == 0
    assert shares.notes == ()
    assert all(value > 0 for name, value in known(shares).items() if name != "out")


class Rewriting(Wrapped):
    """Writes into what its operators return."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self.block[0]
        h = block.norm(x)
        y = block.down(block.q(h).relu_()).add_(block.out(torch.nn.functional.gelu(block.k(h))))
        return torch.as_tensor(block.head(y))


def test_operators_whose_output_is_written_to_are_predicted_alike() -> None:
    example = block_example()
    candidate = CandidateModel(Rewriting(copy.deepcopy(example.model)), example.sites, example.ranges, Scheme())
    shares = output_shares(candidate, example.smoothings, example.batches)
    assert predictions(shares) == pytest.approx(predictions(shares_of(example)), rel=1e-4)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="batches"):
        output_shares(candidate_of(block_example()), {}, [])
    with pytest.raises(InputError, match="projections"):
        shares_of(block_example(), projections=0)
    with pytest.raises(InputError, match="samples"):
        shares_of(block_example(), samples=0)
    padding = Batch(args=block_example().batches[0].args, mask=torch.zeros(3, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="padding"):
        output_shares(candidate_of(block_example()), {}, [padding])


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_projections_are_unbiased(seed: int, classes: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    d = 1e-4 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    count = 1500
    for loss, exact in (("mse", float((d**2).sum())), ("kl", float(divergences(y + d, y).sum()))):
        draws = [float((direction(y, loss, generator) * d).sum()) ** 2 for _ in range(count)]  # type: ignore[arg-type]
        mean = sum(draws) / count
        # A sum of many signs squared has a relative spread of at most sqrt 2: five standard errors of the mean.
        assert mean == pytest.approx(exact, rel=5 * math.sqrt(2 / count), abs=1e-18)
    assert weight_of(y, "kl") == rows
    assert weight_of(y, "mse") == pytest.approx(float((y**2).sum()))
