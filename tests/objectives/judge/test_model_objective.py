"""The loss of a candidate at the model's output."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.model_objective import FEWEST_STEPS, STEP, ModelObjective, real_rows
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing
from tests.support.plain_forms import kl_divergence, quantize_model, relative_squared_error
from tests.support.quantized_models import Example, block_example, pixels_example

SCHEME = Scheme()


def candidate_of(example: Example, scheme: Scheme = SCHEME) -> CandidateModel:
    return CandidateModel(copy.deepcopy(example.model), example.sites, example.ranges, scheme)


def quantized_output(example: Example, batch: Batch, scheme: Scheme = SCHEME) -> Tensor:
    model = copy.deepcopy(example.model)
    quantize_model(model, example.sites, smoothings=example.smoothings, ranges=example.ranges, scheme=scheme)
    return torch.as_tensor(model(*batch.args))


@pytest.mark.parametrize("example", [block_example(), pixels_example()])
def test_mse_is_the_relative_error_over_all_batches(example: Example) -> None:
    objective = ModelObjective(candidate_of(example), example.batches)
    out = torch.cat([quantized_output(example, batch) for batch in example.batches])
    ref = torch.cat([example.model(*batch.args) for batch in example.batches])
    assert objective.loss(example.smoothings) == pytest.approx(relative_squared_error(out, ref), rel=1e-5)


def test_kl_is_the_mean_over_all_rows() -> None:
    example = block_example()
    batches = (example.batches[0], example.batches[1].narrow(0, 1))  # unequal sizes: a mean of means would differ
    objective = ModelObjective(candidate_of(example), batches, loss="kl")
    out = torch.cat([quantized_output(example, batch) for batch in batches])
    ref = torch.cat([example.model(*batch.args) for batch in batches])
    assert objective.loss(example.smoothings) == pytest.approx(kl_divergence(out, ref), rel=1e-9)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_losses_are_those_of_growing_data(loss: Literal["mse", "kl"]) -> None:
    example = block_example()
    candidate = candidate_of(example)
    whole = ModelObjective(candidate, example.batches, loss=loss)
    growing = list(whole.losses(example.smoothings))
    assert len(growing) == -(-sum(batch.size for batch in example.batches) // STEP)
    together = Batch(args=(torch.cat([batch.args[0] for batch in example.batches]),))
    for step, value in enumerate(growing, start=1):
        part = ModelObjective(candidate, [together.narrow(0, step * STEP)], loss=loss)
        assert part.loss(example.smoothings) == pytest.approx(value, rel=1e-9)
    assert growing[-1] == whole.loss(example.smoothings)
    assert whole.evaluations == 2


def test_pruned_and_interleaved_candidates_do_not_mix() -> None:
    example = block_example()
    objective = ModelObjective(candidate_of(example), example.batches)
    expected = list(objective.losses(example.smoothings))
    iterator = objective.losses(example.smoothings)
    first = next(iterator)
    identity = objective.loss({})
    assert [first, *iterator] == expected
    next(iter(objective.losses(example.smoothings)))  # pruned after one batch
    assert objective.loss({}) == identity
    assert identity != expected[-1]


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_fewer_bits_cost_more(loss: Literal["mse", "kl"]) -> None:
    example = block_example()
    values = [
        ModelObjective(candidate_of(example, scheme), example.batches, loss=loss).loss({})
        for scheme in (Scheme(activations="none"), Scheme(weights="int4", activations="none"))
    ]
    assert 0 < values[0] < values[1]


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_padding_does_not_count(loss: Literal["mse", "kl"]) -> None:
    example = block_example()
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    x = example.batches[0].args[0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    candidate = candidate_of(example)
    losses = [
        ModelObjective(candidate, [Batch(args=(values,), mask=mask)], loss=loss).loss(example.smoothings)
        for values in (x, torch.where(mask[..., None], x, noise))
    ]
    assert losses[0] == losses[1]
    assert ModelObjective(candidate, [Batch(args=(x,))], loss=loss).loss(example.smoothings) != losses[0]


def test_mask_applies_to_sequences_only() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    batch = Batch(mask=mask)
    assert real_rows(torch.ones(2, 2, 5), batch).shape == (3, 5)
    assert real_rows(torch.ones(2, 2), batch).shape == (2, 2)  # two classes of two samples, not two positions
    assert real_rows(torch.ones(2, 3, 5), batch).shape == (2, 3, 5)  # a decoder's own length
    with pytest.raises(InputError, match="every position"):
        real_rows(torch.ones(2, 2, 5), Batch(mask=torch.zeros(2, 2, dtype=torch.bool)))


def test_task_metric_sees_the_candidate_and_yields_once() -> None:
    example = block_example()
    candidate = candidate_of(example)
    seen: list[Tensor] = []

    def metric(model: nn.Module, batches: Sequence[Batch]) -> float:
        seen.append(torch.cat([model(*batch.args) for batch in batches]))
        return float(seen[-1].abs().mean())

    objective = ModelObjective(candidate, example.batches, loss=metric)
    values = list(objective.losses(example.smoothings))
    assert torch.equal(seen[0], torch.cat([quantized_output(example, batch) for batch in example.batches]))
    assert values == [float(seen[0].abs().mean())]
    with pytest.raises(NonFiniteError, match="task metric"):
        ModelObjective(candidate, example.batches, loss=lambda model, batches: math.nan).loss({})


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_output_is_an_error_not_a_loss(loss: Literal["mse", "kl"], value: float) -> None:
    example = block_example()
    candidate = candidate_of(example)
    objective = ModelObjective(candidate, example.batches, loss=loss)
    next(objective.losses({}))

    def spoil(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + value

    handle = candidate.model.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError):
        objective.loss({})
    handle.remove()
    assert math.isfinite(objective.loss({}))
    spoiled = block_example()
    spoiled.model.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match="float model's output on batch 0"):
        ModelObjective(candidate_of(spoiled), spoiled.batches, loss=loss)


def test_inputs_that_cannot_be_scored_are_refused() -> None:
    example = block_example()
    with pytest.raises(InputError, match="batches"):
        ModelObjective(candidate_of(example), ())
    unknown: Any = "rmse"
    with pytest.raises(InputError, match="loss"):
        ModelObjective(candidate_of(example), example.batches, loss=unknown)


# Samples and races ----------------------------------------------------------------------------------------------------


def media(count: int, *, size: int = 2, seed: int = 3) -> tuple[Batch, ...]:
    """Batches (size, 4, 9) for the block example."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(Batch(args=(torch.randn(size, 4, 9, generator=generator),)) for _ in range(count))


def spoiled(example: Example, factor: float) -> dict[str, Smoothing]:
    """The example's smoothings with one channel of one site blown up, which costs the others their resolution."""
    name = example.sites[0].name
    scales = example.smoothings[name].scales.clone()
    scales[0] /= factor
    return {**example.smoothings, name: Smoothing(scales=scales)}


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_sample_errors_add_up_to_the_loss(loss: Literal["mse", "kl"]) -> None:
    example = block_example()
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    batches = (*media(3), Batch(args=example.batches[0].args, mask=mask))
    objective = ModelObjective(candidate_of(example), batches, loss=loss)
    errors = objective.sample_errors(example.smoothings)
    assert errors.shape == (3 * 2 + 3,)
    assert errors.dtype == torch.float64
    assert float(errors.sum()) / objective.weight == pytest.approx(objective.loss(example.smoothings), rel=1e-12)
    # Every sample alone contributes what it contributes among others.
    single = ModelObjective(candidate_of(example), [batches[0].narrow(1, 2)], loss=loss)
    assert float(single.sample_errors(example.smoothings)) == pytest.approx(float(errors[1]), rel=1e-9)


def test_output_without_a_sample_dimension_is_one_sample_per_batch() -> None:
    class Flat(nn.Module):
        """Positions of all samples in one dimension, as routed models return them."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.inner(x)).flatten(0, 1)

    example = block_example()
    candidate = candidate_of(example)
    plain = ModelObjective(candidate, media(2))
    sums = plain.sample_errors(example.smoothings).reshape(2, 2).sum(1)
    for batch, expected in zip(media(2), sums, strict=True):
        flat = ModelObjective(candidate, [batch])
        assert float(flat.sample_errors(example.smoothings).sum()) == pytest.approx(float(expected))
    wrapped = Flat(copy.deepcopy(example.model))
    prefixed = CandidateModel(wrapped, (), {}, SCHEME)
    assert ModelObjective(prefixed, media(2)).sample_errors({}).shape == (2,)


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("count", [1, 2, 12, 17])
def test_a_race_of_equals_is_scored_in_full(loss: Literal["mse", "kl"], count: int) -> None:
    example = block_example()
    objective = ModelObjective(candidate_of(example), media(count), loss=loss)
    scores = objective.race([example.smoothings, example.smoothings, {}], protected=3)
    assert objective.evaluations == 3
    for score, smoothings in zip(scores, (example.smoothings, example.smoothings, {}), strict=True):
        assert not score.stopped
        assert score.samples == 2 * count
        assert score.loss == pytest.approx(objective.loss(smoothings), rel=1e-12)
        assert torch.equal(score.errors, objective.sample_errors(smoothings))
    assert scores[0].loss == scores[1].loss


def test_candidates_clearly_behind_are_given_up_early() -> None:
    example = block_example()
    objective = ModelObjective(candidate_of(example), media(40))
    good: dict[str, Smoothing] = {}
    bad = spoiled(example, 1e3)
    assert objective.loss(bad) > 10 * objective.loss(good)
    first, second = objective.race([good, bad])
    assert not first.stopped
    assert first.loss == pytest.approx(objective.loss(good), rel=1e-12)
    assert second.stopped
    assert second.loss is None
    assert FEWEST_STEPS * STEP <= second.samples < 80
    assert second.samples % STEP == 0
    assert torch.equal(second.errors, objective.sample_errors(bad)[: second.samples])
    # The order of the candidates does not matter for who wins, and neither does where the better one comes from.
    assert [score.stopped for score in objective.race([bad, good])] == [True, False]
    assert [score.stopped for score in objective.race([bad], incumbent=objective.sample_errors(good))] == [True]
    assert [score.stopped for score in objective.race([bad], incumbent=objective.sample_errors(bad))] == [False]


@pytest.mark.parametrize("size", [1, 3, 16, 80])
def test_batches_decide_neither_loss_nor_race(size: int) -> None:
    example = block_example()
    samples = torch.cat([batch.args[0] for batch in media(40)])
    bad = spoiled(example, 1e3)
    expected = ModelObjective(candidate_of(example), media(40)).race([{}, bad])
    found = ModelObjective(candidate_of(example), [Batch(args=(x,)) for x in samples.split(size)]).race([{}, bad])
    for one, other in zip(found, expected, strict=True):
        assert (one.samples, one.stopped) == (other.samples, other.stopped)
        assert one.losses == pytest.approx(other.losses, rel=1e-5)


def test_protected_candidates_are_never_stopped() -> None:
    example = block_example()
    objective = ModelObjective(candidate_of(example), media(24))
    bad = spoiled(example, 1e3)
    scores = objective.race([bad, bad, {}], protected=1)
    assert [score.stopped for score in scores] == [False, True, False]
    assert scores[0].loss == pytest.approx(objective.loss(bad), rel=1e-12)


def test_a_candidate_that_breaks_down_leaves_the_others_alone() -> None:
    example = block_example()
    objective = ModelObjective(candidate_of(example), media(4))
    huge = {s.name: Smoothing(scales=torch.full((s.channels,), 3e38)) for s in example.sites}
    broken, sound = objective.race([huge, example.smoothings])
    assert broken.loss is None
    assert not broken.stopped
    assert "site" in broken.failure
    assert sound.loss == pytest.approx(objective.loss(example.smoothings), rel=1e-12)


def test_a_task_metric_has_no_samples_and_is_scored_in_full() -> None:
    example = block_example()
    objective = ModelObjective(candidate_of(example), media(4), loss=lambda model, batches: 0.25)
    with pytest.raises(InputError, match="task metric"):
        objective.sample_errors({})
    (score,) = objective.race([{}])
    assert (score.loss, score.samples, score.stopped) == (0.25, 0, False)
