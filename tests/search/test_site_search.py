"""``search_site``: one layer, from tensors."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest
import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.scheme import Scheme
from alphasmith.search import SiteResult, search_site
from alphasmith.storage.database import open_optuna

SCHEME = "w8a8-channel-static"


def layer(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations (96, 24) with three loud channels and a dead one, and a weight (20, 24)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(96, 24, generator=generator)
    x[:, [2, 7, 19]] *= torch.tensor([60.0, 25.0, 40.0])
    x[:, 5] = 0.0
    return x, torch.randn(20, 24, generator=generator)


@pytest.fixture(scope="module")
def found() -> SiteResult:
    """One search."""
    return search_site(*layer(), scheme=SCHEME, groups=3, trials=8, seed=1)


def test_what_comes_back(found: SiteResult) -> None:
    k = len(found.ranges)
    assert found.labels.shape == found.scales.shape == (24,)
    assert set(found.labels.tolist()) == set(range(k))
    assert k <= found.requested_k == 3
    assert found.alphas is not None
    assert len(found.alphas) == k
    assert bool((found.scales > 0).all())
    assert float(found.scales[5]) == 1.0
    assert list(found.trials["number"]) == list(range(8))
    assert list(found.trials["candidate"][:3]) == ["identity", "alpha_0.5", "best_single"]
    assert found.exact_evaluations > 8
    assert found.seconds > 0


def test_never_worse_than_the_baselines_nor_implausibly_good(found: SiteResult) -> None:
    assert set(found.baselines) == {"identity", "alpha_0.5", "best_single"}
    for loss in found.baselines.values():
        assert loss is not None
        assert found.held_out_loss <= loss
    assert found.search.identity is not None
    assert found.loss < found.search.identity / 4  # loud channels ruin a static range
    assert found.limit is not None
    assert found.limit > found.held_out_loss / 2  # freely chosen scales do not leave the alphas far behind


def test_the_stated_loss_is_what_quantizing_gives(found: SiteResult) -> None:
    """The held-out loss, computed again from the scales alone with plain rounding."""
    x, w = layer()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    rows, held_out = x[order[:72]], x[order[72:]]
    smooth, weight = held_out / found.scales, w * found.scales
    step = (rows / found.scales).abs().max() / 127
    steps = weight.abs().amax(1, keepdim=True) / 127
    product = ((smooth / step).round().clamp(-127, 127) * step) @ ((weight / steps).round() * steps).T
    exact = held_out @ w.T
    loss = float((product - exact).square().sum() / exact.square().sum())
    assert loss == pytest.approx(found.held_out_loss, rel=1e-3)


def test_the_seed_decides(found: SiteResult) -> None:
    again = search_site(*layer(), scheme=Scheme.parse(SCHEME), groups=3, trials=8, seed=1)
    assert torch.equal(again.scales, found.scales)
    assert again.held_out == found.held_out
    assert [r.candidate for r in again.results] == [r.candidate for r in found.results]
    other = search_site(*layer(), scheme=SCHEME, groups=3, trials=8, seed=2)
    assert other.held_out != found.held_out


def test_a_study_is_kept_where_asked(tmp_path: Path, found: SiteResult) -> None:
    url = f"sqlite:///{tmp_path / 'site.db'}"
    kept = search_site(*layer(), scheme=SCHEME, groups=3, trials=8, seed=1, storage=url)
    assert torch.equal(kept.scales, found.scales)
    study = optuna.load_study(study_name=kept.study_name, storage=open_optuna(url))
    for trial, result in zip(study.trials, kept.results, strict=True):
        assert trial.state.name == result.state
        assert result.state != "COMPLETE" or trial.value == result.loss


@pytest.mark.parametrize(
    ("field", "x", "w"),
    [
        ("x, w", torch.ones(8, 4), torch.ones(3, 5)),
        ("x, w", torch.ones(8), torch.ones(3, 5)),
        ("x", torch.ones(1, 4), torch.ones(3, 4)),
        ("x", torch.full((8, 4), math.nan), torch.ones(3, 4)),
        ("w", torch.ones(8, 4), torch.full((3, 4), math.inf)),
    ],
)
def test_tensors_that_cannot_be_searched(field: str, x: Tensor, w: Tensor) -> None:
    with pytest.raises(InputError) as caught:
        search_site(x, w, scheme=SCHEME)
    assert caught.value.field == field


@pytest.mark.parametrize(("field", "value"), [("groups.k", {"groups": 0}), ("search.seed", {"seed": -1})])
def test_numbers_that_cannot_be_used(field: str, value: dict[str, int]) -> None:
    with pytest.raises(InputError) as caught:
        search_site(*layer(), scheme=SCHEME, **value)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize("trials", [4, 5, 6])
def test_proposals_do_not_exceed_the_trials(trials: int) -> None:
    assert len(search_site(*layer(), scheme=SCHEME, trials=trials).trials) == trials


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(InputError, match="scheme"):
        search_site(*layer(), scheme="w2a2")
