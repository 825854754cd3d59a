"""``search_site``: one layer, from tensors."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import Tensor

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.noise.model import NoiseModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import smoothing_scales
from alphasmith.search.config import RunConfig
from alphasmith.search.site._proposals import Proposer
from alphasmith.search.site.result import SiteResult
from alphasmith.search.site.search import search_data, search_site
from alphasmith.search.site.settings import SiteSettings
from alphasmith.storage.database.connection import open_optuna

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
    live = torch.arange(24) != 5  # channel 5 is dead: in the units of the others, and no column is the largest by it
    assert found.scales[live].min() < found.scales[5] < found.scales[live].max()
    columns = layer()[1].abs().amax(0) * found.scales
    assert columns[5] <= 1.00001 * columns[live].max()
    assert list(found.trials["number"]) == list(range(len(found.results)))
    assert 4 <= len(found.results) <= 9
    assert list(found.trials["candidate"][:4]) == ["identity", "alpha_0.5", "best_single", "noise_model"]
    assert {f"alpha_{k}" for k in range(k)} | {f"offset_{k}" for k in range(k)} <= set(found.trials.columns)
    assert found.exact_evaluations >= 8
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


@pytest.mark.parametrize("shift", ["mean", "middle", "none"])
def test_the_stated_loss_is_what_quantizing_gives(shift: str) -> None:
    """The held-out loss, computed again from the smoothing alone with plain rounding."""
    x, w = layer()
    rows, held_out = x[:72], x[72:]
    data = linear_site_data(rows, w)
    under_its_range = replace(
        linear_site_data(held_out, w),
        activation_statistics=data.activation_statistics,
        input_range=data.input_range,
    )
    found = searched(data, under_its_range, settings(groups={"k": 3}, search={"shift": shift, "trials": 6}))
    s, z = found.smoothing.scales, found.smoothing.shift
    assert (z is not None) == (shift != "none")
    z = torch.zeros(24) if z is None else z
    weight = w * s
    step = ((rows - z) / s).abs().max() / 127 * found.smoothing.range_factor
    steps = weight.abs().amax(1, keepdim=True) / 127
    codes = ((held_out - z) / s / step).round().clamp(-128, 127)
    product = (codes * step) @ ((weight / steps).round() * steps).T + w @ z
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
    plain = settings(search={"range": "absmax"})
    assert len(search_site(*layer(), scheme=SCHEME, trials=trials, settings=plain).trials) <= trials


def settings(**sections: dict[str, Any]) -> RunConfig:
    """A configuration from sections."""
    return RunConfig.build(sections)


def searched(data: SiteData, held_out: SiteData, config: RunConfig) -> SiteResult:
    """A search of a site whose rows are split already, kept in memory."""
    made = SiteSettings(scheme=Scheme.parse(SCHEME), groups=config.groups, search=config.search)
    return search_data(data, held_out, made)


def wide_layer(seed: int = 3, rows: int = 512) -> tuple[Tensor, Tensor]:
    """Activations (rows, 64): log-normal channels, a few loud ones, a quarter of them far from centred."""
    generator = torch.Generator().manual_seed(seed)
    gain = torch.randn(64, generator=generator).exp()
    gain[:2] *= 40.0
    centre = torch.zeros(64)
    centre[8:24] = 3.0 * torch.randn(16, generator=generator)
    x = (torch.randn(rows, 64, generator=generator) + centre) * gain
    return x, torch.randn(48, 64, generator=generator) * torch.randn(64, generator=generator).mul(0.3).exp()


@pytest.fixture(scope="module")
def with_model() -> SiteResult:
    """A search with the noise model."""
    return search_site(*wide_layer(), scheme=SCHEME, groups=8, trials=24)


def test_the_noise_model_spares_the_grid_and_most_trials(with_model: SiteResult) -> None:
    without = search_site(
        *wide_layer(), scheme=SCHEME, groups=8, trials=24, settings=settings(search={"noise_model": False})
    )
    assert without.facts.noise_model is None
    assert without.limit is None
    bought = with_model.facts.noise_model
    assert bought is not None
    assert bought.evaluations_saved > 0
    assert bought.proposals >= 1
    assert with_model.exact_evaluations < without.exact_evaluations
    assert with_model.loss <= without.loss, "a proposal beats what the sampler finds in as many trials"
    assert with_model.best_single_alpha == pytest.approx(without.best_single_alpha, abs=0.1)
    assert with_model.search.best_single is not None
    assert without.search.best_single is not None
    assert with_model.search.best_single <= 1.02 * without.search.best_single, "found without a grid, as good as by one"


def test_it_stops_near_the_limit(with_model: SiteResult) -> None:
    tolerant = settings(search={"tolerance": 0.1, "range": "absmax"})
    found = search_site(*wide_layer(), scheme=SCHEME, groups=8, trials=24, settings=tolerant)
    assert found.search.limit is not None
    assert found.facts.stopped == "within 10.0% of the per-channel limit"
    best = min(r.loss for r in found.results if r.loss is not None)
    assert best <= 1.1 * found.search.limit
    assert not any(r.candidate.kind == "sampler" for r in found.results), "a proposal is near enough"
    assert len(found.results) <= len(with_model.results) <= 24
    assert found.limit is not None
    assert found.limit <= found.held_out_loss


def test_the_trace_falls_and_ends_at_the_best_trial(with_model: SiteResult) -> None:
    losses = [loss for _, loss in with_model.trace]
    seconds = [at for at, _ in with_model.trace]
    assert losses == sorted(losses, reverse=True)
    assert seconds == sorted(seconds)
    assert losses[-1] == min(r.loss for r in with_model.results if r.loss is not None)


def test_centring_pays_where_channels_are_off_centre(with_model: SiteResult) -> None:
    never = search_site(*wide_layer(), scheme=SCHEME, groups=8, trials=24, settings=settings(search={"shift": "none"}))
    assert with_model.smoothing.shift is not None
    assert never.smoothing.shift is None
    assert with_model.held_out_loss < 0.95 * never.held_out_loss
    shifts = {r.candidate.shift for r in with_model.results if r.candidate.kind == "noise_model"}
    assert shifts == {"none", "mean"}, "both are trials of one study"


def test_offsets_come_nearer_to_the_limit() -> None:
    plain = settings(groups={"offsets": False}, search={"shift": "none", "range": "absmax"})
    rich = settings(groups={"offsets": True}, search={"shift": "none", "range": "absmax"})
    without, with_offsets = (
        search_site(*wide_layer(), scheme="w8a8-tensor-token", groups=4, trials=8, settings=s) for s in (plain, rich)
    )
    assert not any(r.candidate.offsets for r in without.results)
    assert with_offsets.loss <= without.loss


def test_betas_are_numbers_of_their_own() -> None:
    found = search_site(*wide_layer(), scheme=SCHEME, groups=3, trials=8, settings=settings(groups={"betas": True}))
    proposal = next(r.candidate for r in found.results if r.candidate.kind == "noise_model")
    assert len(proposal.betas) == len(proposal.alphas or ())
    assert any(abs(b - (1 - a)) > 1e-3 for a, b in zip(proposal.alphas or (), proposal.betas, strict=True))


def test_statistics_and_groupings_are_choices_of_the_study() -> None:
    choices = settings(groups={"method": ["kmeans", "range"]}, search={"statistic": ["absmax", "rms"]})
    data = linear_site_data(*wide_layer())
    rms = data.parts[0].x.square().mean(0).sqrt()
    data = replace(data, activation_statistics={**data.activation_statistics, "rms": rms})
    found = searched(data, data, choices)
    assert {name for name, _ in found.space.choices} == {"grouping", "statistic", "shift"}
    tried = {(r.candidate.grouping, r.candidate.statistic) for r in found.results if r.candidate.kind == "noise_model"}
    assert len(tried) >= 2
    assert found.grouping in ("kmeans", "range")
    assert found.statistic in ("absmax", "rms")


def test_k_grows_only_as_long_as_held_out_rows_agree() -> None:
    found = search_site(*wide_layer(), scheme=SCHEME, groups="auto", trials=12)
    assert found.facts.k_tried == (1, 2, 4, 8, 16)
    assert len(found.ranges) in found.facts.k_tried
    flat = search_site(
        torch.randn(256, 64, generator=torch.Generator().manual_seed(0)),
        wide_layer()[1],
        scheme=SCHEME,
        groups="auto",
        trials=8,
    )
    assert len(flat.ranges) <= 4, "channels that are alike need few groups"


def test_a_margin_wins_where_held_out_rows_leave_the_calibrated_range() -> None:
    x, w = wide_layer()
    data = linear_site_data(x[:384], w)
    louder = linear_site_data(1.5 * x[384:], w)
    louder = replace(louder, activation_statistics=data.activation_statistics, input_range=data.input_range)
    config = settings(search={"range": ["absmax", "margin"]})
    found = searched(data, louder, config)
    losses = dict(found.facts.range_losses)
    assert losses["margin"] < losses["absmax"]
    assert found.range_statistic == "margin"
    assert found.smoothing.range_factor == config.search.range_margin
    assert found.results[-1].candidate == found.candidate, "the range that was chosen is a trial of the study"


def test_the_winner_is_fitted_again_to_all_rows_and_its_losses_stay() -> None:
    x, w = wide_layer()
    config = settings(search={"shift": "none"})
    found = search_site(x, w, scheme=SCHEME, groups=2, trials=6, settings=config)
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    data = linear_site_data(x[order[:384]], w)
    held_out = replace(
        linear_site_data(x[order[384:]], w),
        activation_statistics=data.activation_statistics,
        input_range=data.input_range,
    )
    before = searched(data, held_out, settings(groups={"k": 2}, search={"shift": "none", "trials": 6}))
    assert (found.refitted, before.refitted) == (True, False)
    assert found.candidate == before.candidate
    assert found.held_out == before.held_out
    assert found.search == before.search
    assert torch.equal(found.labels, before.labels)
    assert not torch.equal(found.scales, before.scales)
    again = torch.from_numpy(np.exp((found.slopes * torch.tensor(found.alphas)[found.labels]).numpy()))
    shared = found.scales.double() / again * w.abs().amax(0)  # what is left of fA1 is a factor of each group
    for group in found.labels.unique():
        assert torch.allclose(shared[found.labels == group], shared[found.labels == group][0], rtol=1e-4)


def test_losses_of_the_search_hold_on_rows_that_it_did_not_see() -> None:
    """The rows that set a range are not clipped by it; what others lose by it is expected, not left out."""
    generator = torch.Generator().manual_seed(5)
    gain = torch.randn(48, generator=generator).exp()
    rows = torch.randn(1024, 48, generator=generator) * gain
    w = torch.randn(32, 48, generator=generator)
    fresh = linear_site_data(rows[512:], w)
    ratios = {}
    for name in ("tail", "absmax"):
        found = search_site(rows[:512], w, scheme=SCHEME, settings=settings(search={"range": name}))
        seen = linear_site_data(rows[:512], w)
        unseen = replace(fresh, activation_statistics=seen.activation_statistics, input_range=seen.input_range)
        losses = [SiteObjective(d, Scheme.parse(SCHEME)).loss(found.smoothing) for d in (unseen, seen)]
        ratios[name] = losses[0] / losses[1]
    assert ratios["tail"] < 1.1
    assert ratios["tail"] < ratios["absmax"]


def test_moving_the_alphas_is_what_the_formula_gives() -> None:
    plain = settings(groups={"offsets": False}, search={"shift": "none"})
    x, w = wide_layer()
    found = search_site(x, w, scheme=SCHEME, groups=2, trials=6, settings=plain)
    candidate, smoothing = found.moved(0.05)
    assert candidate.kind == "refined"
    a = x.abs().amax(0)  # of all rows, also those that did not choose the alphas
    alphas = torch.tensor(candidate.alphas)[found.labels]
    assert torch.allclose(smoothing.scales, smoothing_scales(a, w.abs().amax(0), alphas), rtol=1e-5)
    assert found.moved(0.0)[1] is found.smoothing


@pytest.mark.parametrize("broken", ["construction", "prediction"])
def test_a_noise_model_that_fails_leaves_exact_losses(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise NonFiniteError("the predicted loss is nan")

    monkeypatch.setattr(NoiseModel, "__init__" if broken == "construction" else "minimise", fails)
    found = search_site(*layer(), scheme=SCHEME, groups=3, trials=8)
    assert found.facts.noise_reason == "the predicted loss is nan"
    assert found.facts.noise_model is None
    assert {r.candidate.kind for r in found.results} == {"identity", "alpha_0.5", "best_single", "sampler"}
    assert found.held_out_loss <= min(v for v in found.baselines.values() if v is not None)


def test_where_products_saturate_no_candidate_is_ruled_out_by_a_limit_that_takes_them_as_exact() -> None:
    """Descent does not see saturation, so the best so far was taken for the limit and the study ended at once."""
    found = search_site(*wide_layer(), scheme="w8a8-channel-token-pairs16", groups=3, trials=24)
    assert found.limit is None
    assert found.facts.stopped.endswith("; no per-channel limit: descent to it takes products as exact")
    assert not found.facts.stopped.startswith("within")
    assert any(r.candidate.kind == "sampler" for r in found.results)
    assert found.facts.noise_model is not None
    assert found.facts.noise_model.kendall_tau == pytest.approx(1.0, abs=0.3)


def test_a_noise_model_that_fails_after_its_proposals_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise NonFiniteError("the predicted loss is nan")

    monkeypatch.setattr(Proposer, "predicted", fails)
    found = search_site(*wide_layer(), scheme=SCHEME, groups=3, trials=8)
    assert found.facts.noise_reason == "the predicted loss is nan"
    assert found.facts.stopped.endswith("; exact losses only: the predicted loss is nan")
    assert found.limit is None
    facts = found.facts.noise_model
    assert facts is not None
    assert facts.kendall_tau is None, "nothing was compared"
    assert facts.proposals == sum(r.candidate.kind == "noise_model" for r in found.results) > 0


def degenerate(name: str) -> tuple[Tensor, Tensor, int]:
    """Layers at the edge of what makes sense, and K."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 6, generator=generator), torch.randn(5, 6, generator=generator)
    match name:
        case "two rows":
            return x[:2], w, 2
        case "one channel":
            return x[:, :1], w[:, :1], 1
        case "all rows equal":
            return x[:1].expand(40, 6).contiguous(), w, 3
        case "K = C":
            return x, w, 6
        case "more groups than channels":
            return x, w, 9
    return x, torch.cat((w, torch.zeros(4, 6))), 2


@pytest.mark.parametrize("scheme", [SCHEME, "w8a8-tensor-token", "w4a16-g2", "wfp8afp8-channel-static"])
@pytest.mark.parametrize(
    "name", ["two rows", "one channel", "all rows equal", "K = C", "more groups than channels", "outputs that are zero"]
)
def test_layers_at_the_edge_of_sense(name: str, scheme: str) -> None:
    x, w, k = degenerate(name)
    found = search_site(x, w, scheme=scheme, groups=k, trials=6)
    assert math.isfinite(found.held_out_loss)
    assert bool(torch.isfinite(found.scales).all())
    assert len(found.ranges) <= min(k, x.shape[1])
    for loss in found.baselines.values():
        assert loss is None or found.held_out_loss <= loss


def test_a_site_whose_output_is_zero_loses_nothing() -> None:
    found = search_site(torch.randn(40, 6), torch.zeros(5, 6), scheme="w8a8-channel-static", trials=4)
    assert found.held_out_loss == 0.0


def test_nothing_of_a_search_outlives_it() -> None:
    """Rows and buffers of a site must go at once, not when the garbage collector comes by: many sites follow each other."""
    gc.collect()
    gc.disable()
    try:
        search_site(*wide_layer(), scheme=SCHEME, groups=4, trials=8)
        alive = [o for o in gc.get_objects() if type(o) is SiteObjective]
    finally:
        gc.enable()
    assert alive == []


@pytest.mark.parametrize("shift", ["none", "mean"])
def test_identity_is_no_smoothing_whatever_shift_is_configured(shift: str) -> None:
    found = search_site(*wide_layer(), scheme=SCHEME, groups=2, trials=5, settings=settings(search={"shift": shift}))
    plain = found.plain["identity"]
    assert plain.shift is None
    assert bool((plain.scales == 1).all())
    assert (found.best_single.shift is None) == (shift == "none")


def test_moved_alphas_know_whether_betas_are_theirs() -> None:
    config = settings(groups={"betas": True}, search={"shift": "none"})
    found = search_site(*wide_layer(), scheme=SCHEME, groups=2, trials=6, settings=config)
    x, w = wide_layer()
    a, b = x.abs().amax(0), w.abs().amax(0)
    unit = (a.log() - b.log()).mean() / 2  # in which a^alpha is counted where it has an exponent of its own
    expected = a.log() - unit if found.candidate.betas else a.log() + b.log()
    assert torch.allclose(found.slopes.to(torch.float32), expected, rtol=1e-4, atol=1e-4)


def test_scales_of_extreme_layers_stay_normal_numbers_in_half_precision() -> None:
    """Loud channels that hardly any weight reads, and the reverse: scales that the formula alone puts far outside of float16."""
    x, w = layer(3)
    x[:, 2] *= 1e4
    w[:, 2] *= 1e-6
    x[:, 7] *= 1e-7
    w[:, 7] *= 1e5
    found = search_site(x, w, scheme=SCHEME, groups=3, trials=6, seed=0)
    assert found.winner != "identity"
    half = found.scales.half()
    assert bool(torch.isfinite(half).all())
    assert float(half.min()) >= torch.finfo(torch.float16).smallest_normal
