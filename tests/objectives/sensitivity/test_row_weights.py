"""Weights of calibrated rows: what an error in a row and at an output counts at the model's output."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.calibrate import Calibration, calibrate
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sensitivity._graph_memory import graph_plans
from alphasmith.objectives.sensitivity.row_weights import unweighed, weighed
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Site
from tests.support.quantized_models import block_example, chain_example, pixels_example

WIDTH = 6


class Tail(nn.Module):
    """fc -> relu -> out; the output of ``fc`` meets known gradients."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(4, WIDTH)
        self.out = nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.out(torch.relu(self.fc(x))))


def batches_of(count: int = 3, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [Batch(args=(torch.randn(2, 5, 4, generator=generator),)) for _ in range(count)]


def weigh(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    *,
    rows: int = 1000,
    loss: Literal["mse", "kl"] = "mse",
    **settings: Any,
) -> Calibration:
    calibration = calibrate(model, sites, batches, rows=rows, seed=3)
    made = weighed(calibration, model, sites, batches, seed=3, loss=loss, **settings)
    assert made.reason == ""
    return made.calibration


def tail() -> tuple[nn.Module, tuple[Site, ...]]:
    torch.manual_seed(1)
    model = Tail().eval()
    return model, discover(model, batches_of(1)[0]).sites


def test_the_last_operator_counts_every_row_and_output_alike() -> None:
    model, sites = tail()
    (part,) = weigh(model, sites, batches_of()).sites["out"].parts
    assert part.row_weight is not None
    assert part.output_weight is not None
    assert torch.allclose(part.row_weight, torch.ones(30))
    assert torch.allclose(part.output_weight, torch.ones(3))


@pytest.mark.parametrize("rows", [7, 1000])
def test_rows_get_the_gradients_of_their_own_place(rows: int) -> None:
    """With one output, whose projection is plus or minus itself, the gradient at ``fc`` is the weight of ``out`` at open gates."""
    torch.manual_seed(1)
    model = Tail(outputs=1).eval()
    batches = batches_of()
    (part,) = weigh(model, discover(model, batches[0]).sites, batches, rows=rows).sites["fc"].parts
    assert part.row_weight is not None
    gates = (part.x @ model.get_parameter("fc.weight").T + model.get_parameter("fc.bias")) > 0
    expected = (gates * model.get_parameter("out.weight").detach().square()).sum(1)
    torch.testing.assert_close(part.row_weight, expected / expected.mean())


def test_outputs_that_nobody_reads_count_nothing() -> None:
    model, sites = tail()
    with torch.no_grad():
        model.get_parameter("out.weight")[:, 2] = 0
    (part,) = weigh(model, sites, batches_of()).sites["fc"].parts
    assert part.output_weight is not None
    assert part.output_weight[2] == 0
    assert float(part.output_weight.mean()) == pytest.approx(1)
    assert part.row_weight is not None
    assert float(part.row_weight.mean()) == pytest.approx(1)


@pytest.mark.parametrize("rows", [5, 1000])
@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_batches_have_no_part_in_the_weights(rows: int, loss: Literal["mse", "kl"]) -> None:
    model, sites = tail()
    small = batches_of()
    large = [Batch(args=(torch.cat([batch.args[0] for batch in small]),))]
    one, other = (weigh(model, sites, batches, rows=rows, loss=loss) for batches in (small, large))
    for name in one.sites:
        for a, b in zip(one.sites[name].parts, other.sites[name].parts, strict=True):
            assert torch.equal(a.x, b.x)
            torch.testing.assert_close(a.row_weight, b.row_weight)
            torch.testing.assert_close(a.output_weight, b.output_weight)


def test_padding_has_no_weight_and_takes_no_row() -> None:
    model, sites = tail()
    x = batches_of(1)[0].args[0]
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found = [
        weigh(model, sites, [Batch(args=(values,), mask=mask)]).sites["fc"].parts[0]
        for values in (x, torch.where(mask[..., None], x, 9.0))
    ]
    assert found[0].x.shape[0] == 7
    torch.testing.assert_close(found[0].row_weight, found[1].row_weight)


@pytest.mark.parametrize("made", [block_example(), pixels_example()])
def test_every_kind_of_operator_is_weighed_and_the_weights_travel(made: Any) -> None:
    model = copy.deepcopy(made.model)
    calibration = weigh(model, made.sites, made.batches, rows=20)
    restored = Calibration.from_state(calibration.state())
    parameters = dict(model.named_parameters())
    for site in made.sites:
        data = restored.site_data(site, parameters)
        for part, kept in zip(data.parts, calibration.sites[site.name].parts, strict=True):
            assert part.row_weight is not None
            assert part.output_weight is not None
            assert torch.equal(part.row_weight, torch.as_tensor(kept.row_weight))
            assert part.row_weight.shape == part.x.shape[:1]
            assert part.output_weight.shape == part.weight.shape[:1]
            assert float(part.row_weight.min()) >= 0
        plain = replace(restored, sites={site.name: unweighed(restored.sites[site.name])})
        assert plain.site_data(site, parameters).parts[0].row_weight is None


class Detached(Tail):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Half(Tail):
    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.out(torch.relu(self.fc(x)).detach()))


def test_what_no_gradient_reaches_stays_as_it_was() -> None:
    torch.manual_seed(1)
    for model, reason, weightless in (
        (Detached().eval(), "no gradient", {"fc", "out"}),
        (Half().eval(), "first of them fc", {"fc"}),
    ):
        sites = discover(model, batches_of(1)[0]).sites
        calibration = calibrate(model, sites, batches_of(), rows=10, seed=0)
        made = weighed(calibration, model, sites, batches_of(), seed=0)
        assert reason in made.reason
        without = {name for name, record in made.calibration.sites.items() if record.parts[0].row_weight is None}
        assert without == weightless
    small = weighed(calibration, model, sites, batches_of(), seed=0, memory=1)
    assert "memory" in small.reason
    assert small.calibration is calibration


def test_too_little_memory_for_a_batch_changes_no_weight() -> None:
    model, sites = tail()
    batches = [Batch(args=(torch.cat([batch.args[0] for batch in batches_of(8)]),))]
    whole = weigh(model, sites, batches)
    least = next(m for m in range(500, 40_000, 100) if not _refused(model, sites, batches, m))
    tight = weigh(model, sites, batches, memory=least)
    for name, record in whole.sites.items():
        torch.testing.assert_close(record.parts[0].row_weight, tight.sites[name].parts[0].row_weight)
    assert not _refused(model, sites, batches, None)


def test_blocks_that_are_computed_again_change_no_weight() -> None:
    example = chain_example()
    model, sites, batches = example.model, example.sites, list(example.batches)
    operators = {site.name: {o.name: model.get_submodule(o.name) for o in site.operators} for site in sites}
    singles = [batch.narrow(i, i + 1) for batch in batches for i in range(batch.size)]
    plain, again = graph_plans(model, operators, singles, None).plans
    assert again.checkpointed
    assert again.need < plain.need
    whole = weigh(model, sites, batches)
    tight = weigh(model, sites, batches, memory=again.need)
    for name, record in whole.sites.items():
        torch.testing.assert_close(record.parts[0].row_weight, tight.sites[name].parts[0].row_weight)
        torch.testing.assert_close(record.parts[0].output_weight, tight.sites[name].parts[0].output_weight)


def _refused(model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], memory: int | None) -> bool:
    calibration = calibrate(model, sites, batches, rows=4, seed=3)
    return weighed(calibration, model, sites, batches, seed=3, memory=memory).reason != ""
