"""Folds tried before the search: what holds is kept, what does not is left alone by name, the model stays as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import EquivalenceError
from alphasmith.objectives.judge.early_proof import proven_sites
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Site
from tests.support import site_modules as m


def batches(*means: float) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [Batch(args=(torch.randn(2, 3, m.C, generator=generator, dtype=torch.float64) + mean,)) for mean in means]


class Weightless(m.Mlp):
    """Takes a branch without weights of its own where the input is negative: nothing that discovery could suspect."""

    def forward(self, x: Tensor) -> Tensor:
        """Two ways to one head."""
        hidden = self.fc1(self.norm(x))
        hidden = torch.relu(hidden) if bool(x.mean() > 0) else torch.tanh(hidden)
        return torch.as_tensor(self.head(self.fc2(hidden)))


def found(model: nn.Module) -> tuple[Site, ...]:
    return discover(model, batches(2.0)[0]).sites


def modes(sites: tuple[Site, ...]) -> dict[str, str]:
    return {site.name: site.mode for site in sites}


def test_sound_folds_are_kept_and_the_model_keeps_its_bits() -> None:
    for factory in (
        m.Mlp,
        lambda: m.Gated(True),
        lambda: m.Attention("sdpa", False, 2),
        lambda: m.Attention("matmul", True),
    ):
        model = m.randomised(factory())
        before = copy.deepcopy(model.state_dict())
        sites = found(model)
        assert any(site.mode == "fold" for site in sites)
        for part_bytes in (1, 1 << 30):
            assert proven_sites(model, sites, batches(2.0, 0.0), tolerance=1e-4, part_bytes=part_bytes) == sites
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("part_bytes", [1, 1 << 30])
def test_only_the_site_at_fault_is_left_alone(part_bytes: int) -> None:
    model = m.randomised(Weightless())
    before = copy.deepcopy(model.state_dict())
    sites = found(model)
    assert modes(sites)["fc2"] == "fold"
    proven = proven_sites(model, sites, batches(2.0, -2.0), tolerance=1e-4, part_bytes=part_bytes)
    assert modes(proven) == modes(sites) | {"fc2": "left"}
    (left,) = [site for site in proven if site.mode == "left"]
    assert "changes output by" in left.reason
    assert "batches other than the traced one" in left.reason
    assert (left.edits, left.producers, left.shift_edits) == ((), (), ())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Where no batch takes the branch there is nothing to see.
    assert proven_sites(model, sites, batches(2.0), tolerance=1e-4) == sites


def test_several_faults_are_all_found() -> None:
    model = m.randomised(m.Mlp())
    sites = found(model)
    broken = tuple(replace(site, edits=site.edits[:-1]) if site.name != "fc2" else site for site in sites)
    assert {name for name, mode in modes(proven_sites(model, broken, batches(0.0), tolerance=1e-4)).items() if mode == "left"} == {
        "fc1", "head",
    }  # fmt: skip


def test_a_fault_of_the_shift_costs_the_shift_only() -> None:
    model = m.randomised(m.Mlp())
    sites = found(model)
    (site,) = [site for site in sites if site.name == "fc1"]
    assert site.shift_edits
    broken = tuple(replace(s, shift_edits=s.shift_edits[:-1]) if s is site else s for s in sites)
    proven = {s.name: s for s in proven_sites(model, broken, batches(0.0), tolerance=1e-4)}
    assert (proven["fc1"].mode, proven["fc1"].shift_edits) == ("fold", ())
    assert proven["fc1"].edits == site.edits
    # Nothing is tried that is not searched.
    assert proven_sites(model, broken, batches(0.0), tolerance=1e-4, shift=False) == broken


def test_a_tolerance_below_rounding_is_refused_at_once() -> None:
    model = m.randomised(m.Mlp()).float()
    single = [Batch(args=(b.args[0].float(),)) for b in batches(0.0)]
    sites = discover(model, single[0]).sites
    with pytest.raises(EquivalenceError, match=r"site \*"):
        proven_sites(model, sites, single, tolerance=1e-12)
    assert proven_sites(model, sites, single, tolerance=1e-4, float64_bytes=0) == sites


def test_a_model_that_breaks_when_it_is_folded_is_not_folded() -> None:
    class Asserting(m.Mlp):
        expected: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.expected is not None and not torch.equal(self.norm.get_parameter("weight"), self.expected):
                raise RuntimeError("not my weight")
            return super().forward(x)

    model = m.randomised(Asserting())
    sites = found(model)
    model.__dict__["expected"] = model.get_parameter("norm.weight").detach().clone()
    proven = proven_sites(model, sites, batches(0.0), tolerance=1e-4)
    assert modes(proven)["fc1"] == "left"
    assert next(site for site in proven if site.name == "fc1").reason.startswith("folding it breaks the model")
    assert modes(proven)["fc2"] == "fold"
