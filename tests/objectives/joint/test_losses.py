"""Task losses agree with the metrics they stand for, and say what does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.losses import task_loss
from alphasmith.objectives.joint.metrics.scores import score


def waves(seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(3, 2000, generator=generator)
    return clean + noise * torch.randn(clean.shape, generator=generator), clean


@given(st.integers(0, 99), st.floats(0.01, 3))
def test_si_sdr_is_the_metric_with_its_sign_turned(seed: int, noise: float) -> None:
    output, clean = waves(seed, noise)
    found = score("si_sdr", list(output), list(clean)).value
    assert found is not None
    assert float(task_loss("si_sdr")(output, clean)) == pytest.approx(-found, abs=1e-3)


@given(st.floats(0.1, 10))
def test_si_sdr_ignores_the_size_of_the_output(size: float) -> None:
    output, clean = waves(0, 0.5)
    loss = task_loss("si_sdr")
    assert float(loss(size * output, clean)) == pytest.approx(float(loss(output, clean)), abs=1e-3)


@pytest.mark.parametrize("name", ["si_sdr", "mr_stft", "mse"])
def test_more_noise_costs_more_and_gradients_lower_the_loss(name: str) -> None:
    loss = task_loss(name)  # type: ignore[arg-type]
    costs = [float(loss(*waves(1, noise))) for noise in (0.01, 0.1, 1.0)]
    assert costs == sorted(set(costs))
    output, clean = waves(1, 0.5)
    output.requires_grad_()
    before = loss(output, clean)
    (gradient,) = torch.autograd.grad(before, output)
    with torch.no_grad():
        after = loss(output - 0.1 * gradient / gradient.abs().max(), clean)
    assert float(after) < float(before.detach())


@pytest.mark.parametrize("output", [torch.zeros(2, 800), torch.ones(2, 800)], ids=["silent", "perfect"])
def test_si_sdr_of_silent_and_perfect_outputs_is_finite(output: torch.Tensor) -> None:
    output.requires_grad_()
    loss = task_loss("si_sdr")(output, torch.ones(2, 800))
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert output.grad is not None
    assert bool(torch.isfinite(output.grad).all())


def test_silent_references_do_not_count() -> None:
    output, clean = waves(2, 0.5)
    silent = torch.cat([clean, torch.zeros(1, 2000)])
    more = torch.cat([output, output[:1]])
    loss = task_loss("si_sdr")
    assert torch.equal(loss(more, silent), loss(output, clean))
    with pytest.raises(InputError, match="every reference"):
        loss(output, torch.zeros_like(clean))


def test_cross_entropy_is_that_of_classes() -> None:
    scores = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    loss = task_loss("cross_entropy")
    assert float(loss(scores, torch.tensor([0, 1]))) < 1e-3 < float(loss(scores, torch.tensor([1, 0])))


@pytest.mark.parametrize("name", ["si_sdr", "mr_stft", "mse"])
def test_other_lengths_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="reference"):
        task_loss(name)(torch.ones(1, 2000), torch.ones(1, 1999))  # type: ignore[arg-type]


def test_what_there_is_no_loss_for_is_refused() -> None:
    with pytest.raises(InputError, match="too short for a window of 1024"):
        task_loss("mr_stft")(torch.ones(1, 512), torch.ones(1, 512))
    with pytest.raises(InputError, match="no windows"):
        task_loss("mr_stft", fft_sizes=())
    with pytest.raises(InputError, match="unknown"):
        task_loss("snr")  # type: ignore[arg-type]
