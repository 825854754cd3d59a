"""Remembered outputs of modules: every score is the same to the bit, less is computed, and never more is kept than allowed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge._prefix import PrefixCache
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.operator import QuantizedOperator
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing
from tests.support.architecture_records import Architecture
from tests.support.architectures import ARCHITECTURES
from tests.support.quantized_models import block_example, pixels_example

MUCH = 2**28
TOKEN = Scheme(activation_granularity="token")
CHOSEN = ("bert", "llama", "llama-sdpa-cache", "gpt2", "mixtral", "whisper", "t5", "resnet", "tagger", "detr")


class Mixer(nn.Module):
    """x + out(relu(inner(norm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.out = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.relu(self.inner(self.norm(x))))
        return x + y


class Chain(nn.Module):
    """Blocks one after the other; one of them is used twice."""

    def __init__(self, block: type[nn.Module] = Mixer, *, depth: int = 4, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)
        for before, after in itertools.pairwise(self.blocks):
            vars(after)["before"] = before  # not as its part

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in (*self.blocks, self.blocks[1]):
            x = block(x)
        y: Tensor = self.head(x)
        return y


class InPlace(Mixer):
    """Writes to the output of one operator and to the block's own input."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.inner(self.norm(x)))
        return x.add_(self.out(y))


class Leaving(Mixer):
    """Leaves what it saw in an attribute, for the block after it."""

    before: Leaving | None = None
    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.mean()
        before = None if self.before is None else self.before.seen
        y: Tensor = super().forward(x)
        return y if before is None else y + before


class Noisy(Mixer):
    """Draws numbers from the global generator, which the blocks after it draw from, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.rand(x.shape)


class Sampling(Mixer):
    """Draws from a generator of its own."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(5))
        return super().forward(x) + noise


class Tally(nn.Module):
    """Blocks that add to a list that belongs to none of them; the answer depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.notes = notes = [torch.zeros(())]

        class Telling(Mixer):
            def forward(self, x: Tensor) -> Tensor:
                x = super().forward(x)
                notes[0] = x.mean() + notes[0]
                return x

        self.blocks = nn.ModuleList(Telling(6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.notes[0] = torch.zeros(())
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y + self.notes[0]


class Reaching(nn.Module):
    """A block that reads the norm of another one, which is no part of it."""

    def __init__(self) -> None:
        super().__init__()
        first, second = Mixer(6), Mixer(6)
        elsewhere = second.norm

        class Borrowing(Mixer):
            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.out(torch.relu(self.inner(x * elsewhere.weight)))
                return x + y

        self.borrowing, self.first, self.second = Borrowing(6), first, second

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(self.borrowing(x)))
        return y


def randomly(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    return model.eval().requires_grad_(False)


def vectors(count: int = 3, sizes: Sequence[int] = (3, 2)) -> list[Batch]:
    generator = torch.Generator().manual_seed(4)
    return [Batch(args=(torch.randn(size, count, 6, generator=generator),)) for size in sizes]


def draw(site: Site, seed: int) -> Smoothing:
    """Scales between 1/2 and 2 and, where the site takes one, a shift within 1/4, one value per tie."""
    _, tie = torch.unique(site.ties, return_inverse=True)
    free = torch.rand(2, int(tie.max()) + 1, generator=torch.Generator().manual_seed(seed))
    shift = (free[1] / 2 - 0.25)[tie] if site.shiftable else None
    return Smoothing(scales=torch.exp2(2 * free[0] - 1)[tie], shift=shift)


def changed(
    base: Mapping[str, Smoothing], names: Sequence[str], sites: Sequence[Site], seed: int
) -> dict[str, Smoothing]:
    others = {site.name: draw(site, 100 * seed + index) for index, site in enumerate(sites)}
    return {**base, **{name: others[name] for name in names}}


@contextmanager
def counted_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Calls of quantized operators that were computed."""
    calls: list[str] = []
    computed = QuantizedOperator.forward

    def forward(self: QuantizedOperator, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(self.inner).__name__)
        return computed(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(QuantizedOperator, "forward", forward)
        yield calls


class Pair:
    """A model judged with and without memory; the two share nothing."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], *, scheme: Scheme = TOKEN, remembered: int = MUCH
    ) -> None:
        found = discover(model, batches[0]).sites
        self.sites = [site for site in found if site.mode != "left"]
        self.plain, self.cached = (
            ModelObjective(CandidateModel(copy.deepcopy(model), found, {}, scheme), batches, remembered=memory)
            for memory in (0, remembered)
        )
        self.base = {site.name: draw(site, index) for index, site in enumerate(self.sites)}

    def candidate(self, *positions: int, seed: int = 1) -> dict[str, Smoothing]:
        names = [self.sites[position % len(self.sites)].name for position in positions]
        return changed(self.base, names, self.sites, seed)

    def agree(self, candidate: Mapping[str, Smoothing]) -> None:
        assert torch.equal(self.cached.sample_errors(candidate), self.plain.sample_errors(candidate))


def test_a_candidate_computes_only_what_comes_after_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(randomly(Chain()), vectors())
    score, alone = pair.cached.remember(pair.base), pair.plain.race([pair.base], protected=1)[0]
    assert torch.equal(score.errors, alone.errors)
    assert (score.loss, score.losses, score.samples) == (alone.loss, alone.losses, alone.samples)
    operators = 2 * 5 + 1
    last = next(i for i, site in enumerate(pair.sites) if site.operators[0].name == "head")
    third = next(i for i, site in enumerate(pair.sites) if site.operators[0].name == "blocks.3.inner")
    pair.agree(pair.candidate(last))  # the first use is compared with the whole computation
    with counted_operators(monkeypatch) as calls:
        pair.cached.sample_errors(pair.candidate(last, seed=2))
    assert len(calls) == 2 * 1
    with counted_operators(monkeypatch) as calls:
        pair.cached.sample_errors(pair.candidate(third, seed=2))
    assert len(calls) == 2 * (2 + 2 + 1)
    with counted_operators(monkeypatch) as calls:
        pair.plain.sample_errors(pair.candidate(third, seed=2))
    assert len(calls) == 2 * operators
    with counted_operators(monkeypatch) as calls:
        pair.cached.remember(pair.candidate(third, seed=2))  # what both have in common is taken over
    assert len(calls) == 2 * (2 + 2 + 1)


@pytest.mark.parametrize("block", [Mixer, InPlace, Leaving])
@pytest.mark.parametrize("batches", [vectors(), vectors(sizes=(2,)), vectors(sizes=(1, 1, 1))], ids=len)
def test_blocks_that_write_to_what_is_not_theirs(block: type[nn.Module], batches: list[Batch]) -> None:
    pair = Pair(randomly(Chain(block)), batches)
    pair.cached.remember(pair.base)
    for positions in ((0,), (3,), (-1,), (1, -2), (2,)):
        pair.agree(pair.candidate(*positions))


@pytest.mark.parametrize("block", [Noisy, Sampling])
def test_nothing_is_kept_of_a_model_that_draws_random_numbers(block: type[nn.Module]) -> None:
    pair = Pair(randomly(Chain(block)), vectors())
    pair.cached.remember(pair.base)
    assert pair.cached.remembered_bytes == 0
    torch.manual_seed(11)
    first = pair.cached.sample_errors(pair.candidate(-1))
    torch.manual_seed(11)
    assert torch.equal(pair.cached.sample_errors(pair.candidate(-1)), first)


@pytest.mark.parametrize("make", [Tally, Reaching])
def test_what_passes_beside_the_modules_is_seen(make: type[nn.Module]) -> None:
    pair = Pair(randomly(make()), vectors())
    pair.cached.remember(pair.base)
    for position in range(len(pair.sites)):
        pair.agree(pair.candidate(position))


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.name in CHOSEN], ids=lambda a: a.name)
def test_architectures(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = architecture.factory().float().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    batches = [architecture.batch(generator, size).to(dtype=torch.float32) for size in (2, 1)]
    pair = Pair(model, batches)
    pair.cached.remember(pair.base)
    for position in range(len(pair.sites)):
        pair.agree(pair.candidate(position))
    with counted_operators(monkeypatch) as calls:
        pair.cached.sample_errors(pair.candidate(len(pair.sites) - 1, seed=2))
    few = len(calls)
    with counted_operators(monkeypatch) as calls:
        pair.plain.sample_errors(pair.candidate(len(pair.sites) - 1, seed=2))
    assert few < len(calls)


@given(
    budget=st.integers(0, 40_000),
    steps=st.lists(st.tuples(st.sets(st.integers(0, 8)), st.booleans(), st.integers(1, 3)), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_any_history_within_any_budget(budget: int, steps: list[tuple[set[int], bool, int]]) -> None:
    pair = Pair(randomly(Chain(depth=3)), vectors(), remembered=budget)
    pair.cached.remember(pair.base)
    for positions, remember, seed in steps:
        candidate = pair.candidate(*positions, seed=seed)
        if remember:
            found = pair.cached.remember(candidate).errors
            assert torch.equal(found, pair.plain.sample_errors(candidate))
        else:
            pair.agree(candidate)
        assert pair.cached.remembered_bytes <= budget


@pytest.mark.parametrize("example", [block_example(), pixels_example()])
def test_static_ranges_and_a_reset_in_between(example: Any) -> None:
    candidate = CandidateModel(copy.deepcopy(example.model), example.sites, example.ranges, Scheme())
    objective = ModelObjective(candidate, example.batches, remembered=MUCH)
    plain = ModelObjective(
        CandidateModel(copy.deepcopy(example.model), example.sites, example.ranges, Scheme()), example.batches
    )
    objective.remember(example.smoothings)
    for name in example.smoothings:
        other = {key: value for key, value in example.smoothings.items() if key != name}
        assert torch.equal(objective.sample_errors(other), plain.sample_errors(other))
        candidate.reset()
        assert torch.equal(objective.sample_errors(example.smoothings), plain.sample_errors(example.smoothings))
    ModelObjective(candidate, example.batches[:1])  # another judge makes the model the float model again
    assert torch.equal(objective.sample_errors({}), plain.sample_errors({}))
    candidate.reset()
    candidate.check_pristine()
    assert not any("forward" in vars(module) for module in candidate.model.modules())


def test_what_breaks_down_is_not_remembered() -> None:
    pair = Pair(randomly(Chain()), vectors())
    broken = {name: Smoothing(scales=value.scales * 1e-38) for name, value in pair.base.items()}
    score = pair.cached.remember(broken)
    if not score.failure:
        pytest.skip("tiny scales do not break this model")
    assert score.loss is None
    assert pair.cached.remembered_bytes == 0
    with pytest.raises(NonFiniteError):
        pair.plain.sample_errors(broken)
    pair.agree(pair.base)


def test_a_task_metric_has_nothing_to_remember() -> None:
    example = block_example()
    candidate = CandidateModel(copy.deepcopy(example.model), example.sites, example.ranges, Scheme())
    objective = ModelObjective(candidate, example.batches, loss=lambda model, batches: 1.0)
    with pytest.raises(InputError):
        objective.remember({})


def test_zeros_of_other_signs_are_other_inputs() -> None:
    class Angle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = 0 * self.inner(x)
            return torch.atan2(x, torch.full_like(x, -1.0)) + y

    model = randomly(nn.Sequential(Angle(), nn.Linear(6, 2)))
    candidate = CandidateModel(model, discover(model, vectors()[0]).sites, {}, TOKEN)
    candidate.apply({})
    cache = PrefixCache([3], MUCH)

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(model(x))

    first = cache.learn(0, candidate, lambda: forward(torch.zeros(3, 6)))
    assert cache.nbytes > 0
    second = cache.run(0, candidate, lambda: forward(-torch.zeros(3, 6)))
    assert not torch.equal(first, second)
    assert torch.equal(second, forward(-torch.zeros(3, 6)))
