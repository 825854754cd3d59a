"""The producers' side of a fold in the loss of a candidate, against what rounding them really does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.calibrate import calibrate
from alphasmith.objectives.calibration.producers import Producers
from alphasmith.objectives.calibration.site_data import SiteData, to_device
from alphasmith.objectives.judge.producer_noise import ProducerNoise
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.noise.model import NoiseModel
from alphasmith.objectives.quantization.quantizers import code_scale
from alphasmith.objectives.quantization.scheme import QMAX, Scheme
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing, smoothing_scales

TENSOR = Scheme(weights="int8", weight_granularity="tensor", activations="none")


class Chain(nn.Module):
    """A producer, a ReLU, a consumer."""

    def __init__(self, inputs: int = 48, width: int = 40, outputs: int = 24) -> None:
        super().__init__()
        self.up = nn.Linear(inputs, width)
        self.down = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(T, inputs) -> (T, outputs)."""
        return torch.as_tensor(self.down(torch.relu(self.up(x))))


def chain(seed: int, rows: int = 512) -> tuple[Chain, Site, SiteData, Tensor]:
    """The model, the site between its layers, its data, and the inputs."""
    torch.manual_seed(seed)
    model, generator = Chain().eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.up.bias[:8] -= 0.7  # seldom active
        model.up.weight[8:12] *= 6
    x = torch.randn(rows, 48, generator=generator)
    found = discover(model, Batch(args=(x[:2],)))
    calibration = calibrate(model, found.sites, [Batch(args=(x,))], rows=rows, seed=0)
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    (site,) = [s for s in found.sites if s.name == "down"]
    producers = Producers(found.sites, tensors, calibration).rows(site)
    return model, site, calibration.site_data(site, tensors, producers=producers), x


def rounding_of_the_producer(model: Chain, scales: Tensor, x: Tensor, scheme: Scheme) -> float:
    """Relative squared error at the output when the producer alone is quantized, folded as it will be."""
    with torch.no_grad():
        weight = model.up.weight / scales[:, None]
        step = code_scale(weight.abs().amax(), scheme.weights)
        codes = (weight / step).round().clamp(-QMAX[scheme.weights] - 1, QMAX[scheme.weights])
        rounded = torch.relu(x @ (codes * step * scales[:, None]).T + model.up.bias)
        reference = torch.relu(model.up(x)) @ model.down.weight.T
        error = rounded @ model.down.weight.T - reference
    return float(error.square().sum() / reference.square().sum())


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("alpha", [None, 0.3, 1.0])
def test_the_loss_counts_what_rounding_the_producer_does(weights: str, alpha: float | None) -> None:
    scheme = Scheme(weights=weights, weight_granularity="tensor", activations="none")  # type: ignore[arg-type]
    real, counted = 0.0, 0.0
    for seed in range(4):
        model, _, data, x = chain(seed)
        s = torch.ones(data.channels)
        if alpha is not None:
            s = smoothing_scales(data.activation_statistic, data.weight_absmax, alpha, producer=data.producer_absmax)
            s[3] /= 30  # a row that dominates
        with_producer = SiteObjective(data, scheme).loss(Smoothing(scales=s))
        alone = SiteObjective(replace(data, producers=()), scheme).loss(Smoothing(scales=s))
        real += rounding_of_the_producer(model, s, x, scheme)
        counted += with_producer - alone
    assert counted == pytest.approx(real, rel=0.5)


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_a_step_per_row_is_not_changed_by_a_scale(granularity: str) -> None:
    size = 8 if granularity == "group" else None
    scheme = Scheme(weights="int8", weight_granularity=granularity, activations="none", group_size=size)  # type: ignore[arg-type]
    _, _, data, _ = chain(0)
    smoothing = Smoothing(scales=torch.rand(data.channels, generator=torch.Generator().manual_seed(1)) + 0.1)
    assert ProducerNoise(data, scheme).idle
    assert SiteObjective(data, scheme).loss(smoothing) == SiteObjective(replace(data, producers=()), scheme).loss(
        smoothing
    )


def test_noise_model_and_exact_judge_count_the_same() -> None:
    _, _, data, _ = chain(2)
    s = torch.rand(data.channels, generator=torch.Generator().manual_seed(1)) + 0.1
    objective = SiteObjective(data, TENSOR)
    share = float(ProducerNoise(data, TENSOR).error(s.double().log().unsqueeze(0))) / objective.reference_energy

    def judged(of: SiteData) -> tuple[float, float]:
        return SiteObjective(of, TENSOR).loss(Smoothing(scales=s)), float(NoiseModel(of, TENSOR).loss(s))

    for whole, alone in zip(judged(data), judged(replace(data, producers=())), strict=True):
        assert whole - alone == pytest.approx(share, rel=1e-3)


def test_it_counts_on_every_subset_of_the_rows_alike() -> None:
    _, _, data, _ = chain(2)
    smoothing = Smoothing(scales=torch.rand(data.channels, generator=torch.Generator().manual_seed(1)) + 0.1)
    pair = [SiteObjective(d, TENSOR) for d in (data, replace(data, producers=()))]
    shares = [
        [
            (a - b) * pair[0].energy(rows) / rows
            for a, b in zip(*(o.losses(smoothing, (rows,)) for o in pair), strict=True)
        ]
        for rows in (64, 256, pair[0].rows)
    ]
    assert shares[0] == pytest.approx(shares[2], rel=1e-3)
    assert shares[1] == pytest.approx(shares[2], rel=1e-3)


def test_descent_finds_scales_that_both_sides_can_live_with() -> None:
    """Free scales, with the producer counted, lose less in both than those that look at the consumer alone."""
    for seed in range(3):
        _, _, data, _ = chain(seed)
        objective = SiteObjective(data, TENSOR)
        start = torch.ones(data.channels)
        blind = NoiseModel(replace(data, producers=()), TENSOR).limit_scales(start)
        seeing = NoiseModel(data, TENSOR).limit_scales(start)
        assert objective.loss(Smoothing(scales=seeing)) < objective.loss(Smoothing(scales=blind))


@pytest.mark.parametrize("power", [-9, -1, 4, 10])
def test_the_share_does_not_depend_on_the_unit_between_the_layers(power: int) -> None:
    unit = math.ldexp(1.0, power)
    model, site, data, x = chain(1)
    logs = torch.rand(2, data.channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = ProducerNoise(data, TENSOR).error(logs)
    with torch.no_grad():
        for tensor in (model.up.weight, model.up.bias):
            tensor.mul_(unit)
        model.down.weight.div_(unit)
    found = discover(model, Batch(args=(x[:2],)))
    calibration = calibrate(model, found.sites, [Batch(args=(x,))], rows=512, seed=0)
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    scaled = calibration.site_data(site, tensors, producers=Producers(found.sites, tensors, calibration).rows(site))
    torch.testing.assert_close(ProducerNoise(scaled, TENSOR).error(logs + math.log(unit)), before)


def test_it_moves_with_the_site() -> None:
    _, _, data, _ = chain(0)
    moved = to_device(data, "cpu")
    assert moved.producers[0].channel.equal(data.producers[0].channel)
    assert to_device(data, "meta").producers[0].absmax.device.type == "meta"
