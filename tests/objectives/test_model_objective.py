"""The loss of a candidate at the model's output."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.batch import Batch
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.losses import kl_divergence, relative_squared_error
from alphasmith.objectives.model_objective import ModelObjective, real_rows
from alphasmith.objectives.quantized import CandidateModel, quantize_model
from alphasmith.objectives.scheme import Scheme
from tests.objectives.quantized_models import Example, block_example, pixels_example

SCHEME = Scheme()


def candidate_of(example: Example, scheme: Scheme = SCHEME) -> CandidateModel:
    return CandidateModel(example.model, example.sites, example.absmax, scheme)


def quantized_output(example: Example, batch: Batch, scheme: Scheme = SCHEME) -> Tensor:
    model = copy.deepcopy(example.model)
    quantize_model(model, example.sites, scales=example.scales, absmax=example.absmax, scheme=scheme)
    return torch.as_tensor(model(*batch.args))


@pytest.mark.parametrize("example", [block_example(), pixels_example()])
def test_mse_is_the_relative_error_over_all_batches(example: Example) -> None:
    objective = ModelObjective(candidate_of(example), example.batches)
    out = torch.cat([quantized_output(example, batch) for batch in example.batches])
    ref = torch.cat([example.model(*batch.args) for batch in example.batches])
    assert objective.loss(example.scales) == pytest.approx(relative_squared_error(out, ref), rel=1e-5)
    assert objective.reference_bytes == ref.nbytes


def test_kl_is_the_mean_over_all_rows() -> None:
    example = block_example()
    batches = (example.batches[0], example.batches[1].narrow(0, 1))  # unequal sizes: a mean of means would differ
    objective = ModelObjective(candidate_of(example), batches, loss="kl")
    out = torch.cat([quantized_output(example, batch) for batch in batches])
    ref = torch.cat([example.model(*batch.args) for batch in batches])
    assert objective.loss(example.scales) == pytest.approx(kl_divergence(out, ref), rel=1e-9)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_losses_are_those_of_growing_data(loss: Literal["mse", "kl"]) -> None:
    example = block_example()
    candidate = candidate_of(example)
    whole = ModelObjective(candidate, example.batches, loss=loss)
    growing = list(whole.losses(example.scales))
    for count, value in enumerate(growing, start=1):
        part = ModelObjective(candidate, example.batches[:count], loss=loss)
        assert part.loss(example.scales) == value
    assert len(growing) == len(example.batches)
    assert growing[-1] == whole.loss(example.scales)
    assert whole.evaluations == 2


def test_pruned_and_interleaved_candidates_do_not_mix() -> None:
    example = block_example()
    objective = ModelObjective(candidate_of(example), example.batches)
    expected = list(objective.losses(example.scales))
    iterator = objective.losses(example.scales)
    first = next(iterator)
    identity = objective.loss({})
    assert [first, *iterator] == expected
    next(iter(objective.losses(example.scales)))  # pruned after one batch
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
        ModelObjective(candidate, [Batch(args=(values,), mask=mask)], loss=loss).loss(example.scales)
        for values in (x, torch.where(mask[..., None], x, noise))
    ]
    assert losses[0] == losses[1]
    assert ModelObjective(candidate, [Batch(args=(x,))], loss=loss).loss(example.scales) != losses[0]


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
    values = list(objective.losses(example.scales))
    assert torch.equal(seen[0], torch.cat([quantized_output(example, batch) for batch in example.batches]))
    assert values == [float(seen[0].abs().mean())]
    assert objective.reference_bytes == 0
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
