"""Published sites give the rows and weights that the pipeline would search on, whatever was folded before."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphasmith.objectives.calibration.calibrate import Calibration, calibrate
from alphasmith.objectives.calibration.producers import Producers
from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.memory import activation_bytes
from alphasmith.objectives.judge.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.folded_weights import FoldedWeights
from alphasmith.objectives.sites.types import Operator, Site
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search import search_site
from alphasmith.search.inputs.calibration_cache import calibration_state, calibrations_of
from alphasmith.search.inputs.preparation import producers_first
from alphasmith.search.site.memory import work_memory
from alphasmith.search.work._published_site import PublishedSite, dependencies, publish, site_digest, site_weights
from tests.support.architectures import ARCHITECTURES
from tests.support.equality import same
from tests.support.run_cases import Pictures, seeded
from tests.support.smoothing_checks import draw


class Circle(nn.Module):
    """Two layers that are applied twice in turn: each writes what the other reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8) -> (B, 8)."""
        for _ in range(2):
            x = torch.relu(self.two(torch.relu(self.one(x))))
        return x


class Fork(nn.Module):
    """Three layers read one tensor; the sum of two of them is one layer's input, the third another's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.left, self.right, self.other = (nn.Linear(16, 6) for _ in range(3))
        self.sum, self.last = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 16) -> (B, 4)."""
        x = self.norm(x)
        together = torch.relu(self.left(x) + self.right(x))
        return torch.as_tensor(self.sum(together) + self.last(torch.relu(self.other(x))))


@dataclass(frozen=True, kw_only=True)
class CalibratedModel:
    """A calibrated model.

    Attributes:
        sites: Those that can be searched, producers first.
        tensors: Its parameters and buffers.
        calibration: Rows to search on.
        held_out: Rows that judge.
    """

    sites: tuple[Site, ...]
    tensors: dict[str, Tensor]
    calibration: Calibration
    held_out: Calibration


def _architecture(name: str) -> tuple[nn.Module, Callable[[torch.Generator, int], Batch]]:
    (found,) = [a for a in ARCHITECTURES if a.name == name]
    return found.factory(), found.batch


def _numbers(*shape: int) -> Callable[[torch.Generator, int], Batch]:
    return lambda generator, samples: Batch(args=(torch.randn(samples, *shape, generator=generator),))


@cache
def surveyed(name: str) -> CalibratedModel:
    own: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
        "pictures": (Pictures, (3, 8, 8)), "circle": (Circle, (8,)), "fork": (Fork, (16,))
    }  # fmt: skip
    if name in own:
        model, batch = seeded(own[name][0]).eval(), _numbers(*own[name][1])
    else:
        model, batch = _architecture(name)
    generator = torch.Generator().manual_seed(0)
    found = discover(model, batch(generator, 2))
    watched = [site for site in found.sites if any(not o.raw for o in site.operators)]
    search, held_out = (
        calibrate(model, watched, [batch(generator, 4)], rows=12, seed=seed, statistics=("absmax", "rms"))
        for seed in (0, 1)
    )
    active = [s for s in watched if s.mode != "left" and s.name in search.sites and s.name in held_out.sites]
    tensors = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    return CalibratedModel(sites=tuple(producers_first(active)), tensors=tensors, calibration=search, held_out=held_out)


def winners(sites: Sequence[Site], seed: int) -> dict[str, Smoothing]:
    return {site.name: draw(site, seed + index) for index, site in enumerate(sites)}


def by_pipeline(
    case: CalibratedModel, order: Sequence[Site], found: Mapping[str, Smoothing]
) -> list[tuple[SiteData, SiteData]]:
    """The rows of every site with the model's own weights, folded site after site."""
    weights, producers = FoldedWeights(case.tensors), Producers(order, case.tensors, case.calibration)
    rows = []
    for site in order:
        above = producers.rows(site)
        data = case.calibration.site_data(site, weights, producers=above)
        held_out = case.held_out.site_data(site, weights, ranges_from=case.calibration, producers=above)
        rows.append((data, held_out))
        weights.fold(site, found[site.name])
    return rows


def published(case: CalibratedModel, order: Sequence[Site]) -> list[PublishedSite]:
    producers = Producers(order, case.tensors, case.calibration)
    return list(publish(order, case.tensors, case.calibration, case.held_out, producers))


CASES = ("llama", "gpt2", "mixtral", "conv-net", "pictures", "circle", "fork")


@pytest.mark.parametrize("name", CASES)
def test_rows_and_weights_are_those_of_the_pipeline(name: str, tmp_path: Path) -> None:
    case = surveyed(name)
    restored = []
    for one in published(case, case.sites):
        save_file(one.weights_state(), tmp_path / "weights")
        save_file(one.calibration_state(), tmp_path / "rows")
        restored.append(PublishedSite.restored(load_file(tmp_path / "weights"), load_file(tmp_path / "rows")))
        assert same(restored[-1], one)
    for seed in (1, 2):
        found = winners(case.sites, 100 * seed)
        assert same(tuple(one.data(found) for one in restored), tuple(by_pipeline(case, case.sites, found)))


@pytest.mark.parametrize("name", ["llama", "conv-net", "circle", "fork"])
def test_so_they_are_in_any_order(name: str) -> None:
    case = surveyed(name)
    for seed in range(3):
        order = random.Random(seed).sample(case.sites, len(case.sites))
        found = winners(order, seed)
        assert same(tuple(one.data(found) for one in published(case, order)), tuple(by_pipeline(case, order, found)))


@pytest.mark.parametrize("name", ["llama", "conv-net", "circle", "fork"])
def test_earlier_winners_change_weights_and_nothing_else(name: str) -> None:
    case = surveyed(name)
    plain = {site.name: Smoothing(scales=torch.ones(site.channels)) for site in case.sites}
    found = winners(case.sites, 7)
    touched = 0
    for one in published(case, case.sites):
        (before, _), (after, _) = one.data(plain), one.data(found)
        changed = not same(tuple(p.weight for p in before.parts), tuple(p.weight for p in after.parts))
        assert changed == bool(one.depends_on)
        assert same(tuple(p.x for p in before.parts), tuple(p.x for p in after.parts))
        touched += changed
    assert touched


@pytest.mark.parametrize("name", ["llama", "fork", "conv-net"])
def test_what_earlier_winners_divide_outputs_by_does_not_change_what_they_count(name: str) -> None:
    case = surveyed(name)
    plain = {site.name: Smoothing(scales=torch.ones(site.channels)) for site in case.sites}
    found = winners(case.sites, 7)

    def weighed(calibration: Calibration) -> Calibration:
        records = {}
        for number, site in enumerate(case.sites):
            record = calibration.sites[site.name]
            data = calibration.site_data(site, case.tensors)
            parts = zip(record.parts, data.parts, strict=True)
            records[site.name] = replace(
                record,
                parts=tuple(
                    replace(part, output_weight=0.1 + torch.rand(len(of.weight), generator=seed_of(number)))
                    for part, of in parts
                ),
            )
        return replace(calibration, sites=records)

    case = replace(case, calibration=weighed(case.calibration), held_out=weighed(case.held_out))
    changed = 0
    for one in published(case, case.sites):
        for before, after in zip(one.data(plain), one.data(found), strict=True):
            energies = [SiteObjective(data, Scheme()).reference_energy for data in (before, after)]
            assert energies[1] == pytest.approx(energies[0], rel=1e-4)
        changed += bool(one.depends_on)
    assert changed


def seed_of(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_a_winner_that_is_not_there_is_named() -> None:
    case = surveyed("llama")
    last = next(one for one in published(case, case.sites) if one.depends_on)
    with pytest.raises(InputError, match=f"needs the winner of {last.depends_on[0].name}"):
        last.data({})


def test_dependencies_point_backwards_and_name_who_writes_the_weights() -> None:
    case = surveyed("llama")
    found = dependencies(case.sites)
    order = list(found)
    assert order == [site.name for site in case.sites]
    assert all(order.index(before) < order.index(site) for site, names in found.items() for before in names)
    layer = "model.layers.0.{}".format
    assert found[layer("self_attn.q_proj")] == (layer("self_attn.o_proj"),)
    assert found[layer("mlp.gate_proj")] == (layer("mlp.down_proj"),)
    assert found[layer("self_attn.o_proj")] == ()
    assert dependencies(surveyed("fork").sites)["left"] == ("sum", "last")
    circle = dependencies(surveyed("circle").sites)
    assert sorted(map(len, circle.values())) == [0, 1]  # each writes for the other; the first one cannot wait


def test_explicit_sites_and_consumers_write_nothing() -> None:
    case = surveyed("llama")
    explicit = [replace(site, mode="explicit") for site in case.sites]
    assert set(dependencies(explicit).values()) == {()}
    twin = replace(case.sites[0], name="another reader of the same weight")
    assert dependencies([case.sites[0], twin])[twin.name] == ()


def test_weights_of_a_site_are_its_operators_alone() -> None:
    case = surveyed("gpt2")
    site = case.sites[0]
    assert site_weights(site, case.tensors).keys() == {operator.weight for operator in site.operators}
    with pytest.raises(InputError, match=f"parameter {site.operators[0].weight}: is missing"):
        site_weights(site, {})


def test_states_of_different_sites_do_not_go_together() -> None:
    one, two = published(surveyed("llama"), surveyed("llama").sites)[:2]
    with pytest.raises(InputError, match="was not calibrated"):
        PublishedSite.restored(one.weights_state(), two.calibration_state())


def test_calibrations_kept_by_site_are_the_whole_again() -> None:
    case = surveyed("llama")
    kept = [
        calibrations_of(calibration_state(case.calibration, case.held_out, name)) for name in case.calibration.rows_seen
    ]
    assert same(Calibration.merged([search for search, _ in kept]), case.calibration)
    assert same(Calibration.merged([held_out for _, held_out in kept]), case.held_out)


def linear(weight: Tensor, name: str = "layer", **values: object) -> tuple[Site, dict[str, Tensor]]:
    operator = Operator(
        name=name,
        weight=f"{name}.weight",
        bias=None,
        kind="linear",
        transposed=False,
        raw=False,
        in_channels=weight.shape[1],
        out_channels=weight.shape[0],
    )
    site = Site(
        name=name,
        operators=(replace(operator, **values),),  # type: ignore[arg-type]
        channels=weight.shape[1],
        mode="explicit",
        reason="a test site",
        ties=torch.arange(weight.shape[1]),
        edits=(),
        producers=(),
    )
    return site, {operator.weight: weight}


def test_a_digest_knows_the_layer_and_not_its_name_or_file() -> None:
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    digest = site_digest(*linear(weight))
    other, tensors = linear(nn.Parameter(weight.clone().T.contiguous().T), "elsewhere")
    assert site_digest(replace(other, mode="fold", reason="", producers=("norm",)), tensors) == digest
    assert site_digest(other, tensors | {"unrelated": torch.ones(3)}) == digest


def test_a_digest_sees_every_change_of_the_layer() -> None:
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    nudged = weight.clone()
    nudged[3, 3] = torch.nextafter(nudged[3, 3], torch.tensor(9.0))
    site, tensors = linear(weight)
    cases = [
        linear(weight),
        linear(nudged),
        linear(weight.double()),
        linear(weight.reshape(2, 8)),
        linear(weight, transposed=True),
        linear(weight, groups=2),
        linear(weight, kernel=(1,)),
        linear(weight, kind="conv"),
        linear(weight, raw=True),
        linear(weight, plain=False),
        (replace(site, ties=torch.tensor([0, 0, 1, 2])), tensors),
        (replace(site, operators=site.operators * 2), tensors),
    ]
    assert len({site_digest(*case) for case in cases}) == len(cases)


class Search(nn.Module):
    """A site's search as a model, so that its live tensors can be counted."""

    def __init__(self, weight: Tensor, scheme: Scheme) -> None:
        super().__init__()
        self.weight, self.scheme = weight, scheme

    def forward(self, x: Tensor) -> Tensor:
        """(T, C) -> the winner's scales (C,)."""
        with torch.enable_grad():
            return search_site(x, self.weight, scheme=self.scheme, trials=8).scales


@pytest.mark.parametrize(
    ("rows", "channels", "outputs", "scheme"), [(256, 16, 8, "w8a8-channel-token"), (512, 128, 192, "w4a16-g32")]
)
def test_predicted_memory_holds_a_search(rows: int, channels: int, outputs: int, scheme: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, channels, generator=generator), torch.randn(outputs, channels, generator=generator)
    data = linear_site_data(x, w)
    predicted = work_memory(data, data)
    assert activation_bytes(Search(w, Scheme.parse(scheme)), Batch(args=(x,))) <= predicted
    wider = linear_site_data(torch.cat([x, x]), w), linear_site_data(x, torch.cat([w, w]))
    assert all(work_memory(more, more) > predicted for more in wider)
    assert work_memory(data, data, budget=1) < predicted
