"""Calibration of small hand-written models: what is captured, what is left out, and what never changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from alphasmith.objectives.calibration.calibrate import Calibration, calibrate, weight_absmax
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.literals import ChannelStatistic
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.scheme import ActivationGranularity, Scheme
from alphasmith.objectives.sites.types import Operator, Site
from alphasmith.objectives.smoothing import Smoothing


def _operator(model: nn.Module, name: str, *, raw: bool = False, transposed: bool = False) -> Operator:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    kernel = tuple(weight.shape[2:])
    groups = int(getattr(model.get_submodule(name), "groups", 1))
    inputs, outputs = weight.shape[:2] if transposed else (weight.shape[1] * groups, weight.shape[0])
    return Operator(
        name=name,
        weight=f"{name}.weight" if name else "weight",
        bias=None,
        kind="conv" if kernel else "linear",
        transposed=transposed,
        raw=raw,
        in_channels=inputs,
        out_channels=outputs,
        kernel=kernel,
        groups=groups,
    )


def _site(*operators: Operator) -> Site:
    channels = operators[0].in_channels
    return Site(
        name=operators[0].name,
        operators=operators,
        channels=channels,
        mode="explicit",
        reason="a test site",
        ties=torch.arange(channels),
        edits=(),
        producers=(),
    )


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


class _Text(nn.Module):
    """Embedding, two projections of the same tensor, and one of the flattened product."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, channels)
        self.q = nn.Linear(channels, 4)
        self.k = nn.Linear(channels, 5)
        self.out = nn.Linear(channels, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        mixed = x + self.q(x).mean() + self.k(x).mean()
        return torch.as_tensor(self.out(mixed.flatten(0, 1)))


def _text(seed: int = 0) -> tuple[_Text, list[Site]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _Text()
    return model, [_site(_operator(model, "q"), _operator(model, "k")), _site(_operator(model, "out"))]


def _ids(seed: int, count: int = 8, length: int = 5) -> torch.Tensor:
    return torch.randint(0, 50, (count, length), generator=torch.Generator().manual_seed(seed))


def _batches(ids: torch.Tensor, size: int, mask: torch.Tensor | None = None) -> list[Batch]:
    whole = Batch(args=(ids,), mask=mask)
    return [whole.narrow(i, min(i + size, len(ids))) for i in range(0, len(ids), size)]


def _sorted_rows(rows: torch.Tensor) -> list[list[float]]:
    return sorted(rows.tolist())


def test_rows_and_statistics_are_those_of_the_operator_input() -> None:
    model, sites = _text()
    ids = _ids(1)
    expected = model.embed(ids).detach().flatten(0, 1)
    found = calibrate(model, sites, _batches(ids, 3), rows=1000, seed=0)
    data = found.site_data(sites[0], _parameters(model))
    (part,) = data.parts
    assert part.operators == ("q", "k")
    assert part.out_features == (4, 5)
    assert _sorted_rows(part.x) == _sorted_rows(expected)
    assert torch.equal(part.weight, torch.cat([model.q.weight, model.k.weight]).detach())
    assert torch.equal(part.channel, torch.arange(6))
    assert torch.equal(data.input_range.low, expected.amin(0))
    assert torch.equal(data.input_range.high, expected.amax(0))
    assert torch.equal(data.input_range.peaks(), expected.abs().amax(0))
    assert torch.equal(data.weight_absmax, part.weight.abs().amax(0))
    assert found.rows_seen == {"q": 40, "out": 40}
    assert not found.missing


def test_the_sample_is_a_subset_and_its_rows_know_their_outputs() -> None:
    model, sites = _text()
    ids = _ids(2)
    found = calibrate(model, sites, _batches(ids, 4), rows=7, seed=0)
    (part,) = found.site_data(sites[0], _parameters(model)).parts
    everything = _sorted_rows(model.embed(ids).detach().flatten(0, 1))
    assert part.x.shape == (7, 6)
    assert all(row in everything for row in part.x.tolist())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(1, 8), rows=st.integers(1, 60))
def test_neither_batch_size_nor_other_sites_change_a_site(seed: int, size: int, rows: int) -> None:
    model, sites = _text()
    ids = _ids(3)
    whole = calibrate(model, sites, _batches(ids, 8), rows=rows, seed=seed)
    cut = calibrate(model, sites[:1], _batches(ids, size), rows=rows, seed=seed)
    assert torch.equal(whole.sites["q"].parts[0].x, cut.sites["q"].parts[0].x)
    assert torch.equal(whole.sites["q"].absmax, cut.sites["q"].absmax)


def test_another_seed_draws_other_rows_and_sites_draw_independently() -> None:
    model, sites = _text()
    first, again, other = (calibrate(model, sites, _batches(_ids(4), 8), rows=10, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.sites["q"].parts[0].x, again.sites["q"].parts[0].x)
    assert not torch.equal(first.sites["q"].parts[0].x, other.sites["q"].parts[0].x)


@pytest.mark.parametrize("statistic", ["absmax", "percentile", "rms"])
def test_padding_never_counts(statistic: ChannelStatistic) -> None:
    model, sites = _text()
    ids = _ids(5)
    ids[ids == 0] = 1
    mask = torch.arange(5) < torch.tensor([5, 4, 3, 2, 1, 5, 0, 2])[:, None]
    ids[~mask] = 0  # the padding token, which is an outlier here
    with torch.no_grad():
        model.embed.weight[0] = 1e6
    found = calibrate(model, sites[:1], _batches(ids, 3, mask), rows=99, seed=0, statistics=(statistic,))
    real = model.embed(ids[mask]).detach()
    assert found.rows_seen["q"] == int(mask.sum())
    assert _sorted_rows(found.sites["q"].parts[0].x) == _sorted_rows(real)
    assert float(found.activation_statistics("q")[statistic].max()) < 10
    assert torch.equal(found.input_range("q").peaks(), real.abs().amax(0))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_how_far_samples_reach_is_known_without_padding(size: int) -> None:
    model, sites = _text()
    ids, lengths = _ids(1), torch.tensor([5, 4, 3, 2, 1, 5, 5, 2])
    mask = torch.arange(5) < lengths.unsqueeze(1)
    x = model.embed(ids).detach()
    high = torch.stack([row[:n].amax(dim=0) for row, n in zip(x, lengths.tolist(), strict=True)])
    low = torch.stack([row[:n].amin(dim=0) for row, n in zip(x, lengths.tolist(), strict=True)])
    expected = torch.stack([high, -low]).sort(dim=1, descending=True).values
    data = calibrate(model, sites, _batches(ids, size, mask), rows=4, seed=0).site_data(sites[0], _parameters(model))
    assert data.samples_seen == 8
    assert data.tops is not None
    assert torch.equal(data.tops, expected)


def test_flattened_positions_are_masked_and_inputs_cut_otherwise_are_kept() -> None:
    model, sites = _text()
    mask = torch.ones(8, 5, dtype=torch.int64)
    mask[:, 3:] = 0
    found = calibrate(model, sites, _batches(_ids(6), 8, mask), rows=99, seed=0)
    assert found.rows_seen == {"q": 24, "out": 24}
    windows = _batches(_ids(6), 8, torch.ones(8, 4, dtype=torch.bool).logical_and(torch.tensor(False)))
    assert calibrate(model, sites, windows, rows=99, seed=0).rows_seen == {"q": 40, "out": 40}


def test_the_chosen_statistic_is_what_smoothing_gets() -> None:
    model, sites = _text()
    x = model.embed(_ids(7)).detach().flatten(0, 1)
    expected = {
        "absmax": x.abs().amax(0),
        "rms": x.square().mean(0).sqrt(),
        "percentile": torch.quantile(x.abs(), 0.9, dim=0, interpolation="higher"),
    }
    for first in get_args(ChannelStatistic):
        statistics = sorted(get_args(ChannelStatistic), key=lambda name: name != first)
        found = calibrate(model, sites, _batches(_ids(7), 8), rows=9, seed=0, statistics=statistics, percentile=90.0)
        data = found.site_data(sites[0], _parameters(model))
        assert list(data.activation_statistics) == statistics
        assert data.activation_statistic is data.activation_statistics[first]
        for name, values in expected.items():
            torch.testing.assert_close(data.activation_statistics[name], values, rtol=0.023, atol=0)
        assert torch.equal(data.input_range.peaks(), expected["absmax"])


def test_held_out_rows_keep_the_ranges_of_calibration() -> None:
    model, sites = _text()
    searched = calibrate(model, sites, _batches(_ids(8), 8), rows=9, seed=0, statistics=("rms",))
    held_out = calibrate(model, sites, _batches(_ids(9), 8), rows=9, seed=0)
    data = held_out.site_data(sites[0], _parameters(model), ranges_from=searched)
    assert torch.equal(data.input_range.low, searched.input_range("q").low)
    assert torch.equal(data.input_range.high, searched.input_range("q").high)
    assert torch.equal(data.activation_statistic, searched.sites["q"].rms)
    assert torch.equal(data.parts[0].x, held_out.sites["q"].parts[0].x)
    assert not torch.equal(data.input_range.high, held_out.input_range("q").high)


class _PaddedConv(nn.Conv2d):
    """Pads by itself and then convolves functionally, as SAME-padding ports do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(input, (0, 1, 2, 0)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class _Convolutions(nn.Module):
    """Four convolutions that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.b = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False)
        self.padded = _PaddedConv(4, 2, 2, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.a(x), self.b(x), self.grouped(x), self.padded(x)


def _convolutions() -> tuple[_Convolutions, Site]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Convolutions()
    return model, _site(*[_operator(model, name) for name in ("a", "b", "grouped", "padded")])


def test_convolution_rows_times_weight_are_outputs_and_know_their_sample() -> None:
    model, site = _convolutions()
    x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 7)[:, None, None, None]
    batches = [Batch(args=(piece,)) for piece in torch.split(x, 2)]
    data = calibrate(model, [site], batches, rows=11, seed=0).site_data(site, _parameters(model))
    assert [part.operators for part in data.parts] == [("a", "b"), ("grouped",), ("padded",)]
    assert torch.equal(data.input_range.peaks(), x.abs().amax((0, 2, 3)))
    outputs = dict(zip(("a", "b", "grouped", "padded"), model(x), strict=True))
    for part in data.parts:
        expected = torch.cat([outputs[name] for name in part.operators], 1).detach()
        blocks = part.weight.reshape(part.groups, -1, part.weight.shape[1])
        found = torch.einsum("tgd,god->tgo", part.x.reshape(11, part.groups, -1), blocks).flatten(1)
        assert part.sample is not None
        assert part.sample_low is not None
        assert part.sample_high is not None
        assert part.sample_low.shape == part.sample_high.shape == (len(set(part.sample.tolist())), 4)
        peaks = torch.maximum(part.sample_high, -part.sample_low)
        for row, sample in zip(found, part.sample.tolist(), strict=True):
            # Samples differ in size, so their abs-max tells which one the table row belongs to.
            (index,) = (x.abs().amax((2, 3)) == peaks[sample]).all(1).nonzero().flatten().tolist()
            distance = (expected[index].flatten(1).T - row).abs().amax(1).min()
            assert float(distance) < 1e-5
        volume = part.x.shape[1] // 4
        assert part.channel.tolist() == [c for c in range(4) for _ in range(volume)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batch_size_changes_no_patch_and_no_sample_range(size: int) -> None:
    model, site = _convolutions()
    x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(4))
    whole, cut = (
        calibrate(model, [site], [Batch(args=(piece,)) for piece in torch.split(x, n)], rows=20, seed=0)
        for n in (6, size)
    )
    for a, b in zip(whole.sites["a"].parts, cut.sites["a"].parts, strict=True):
        assert a.sample is not None
        assert b.sample is not None
        assert torch.equal(a.x, b.x)
        for before, after in ((a.sample_low, b.sample_low), (a.sample_high, b.sample_high)):
            assert before is not None
            assert after is not None
            assert torch.equal(before[a.sample], after[b.sample])


def test_zeros_that_a_convolution_pads_with_are_in_its_ranges() -> None:
    x = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(1)) + torch.tensor([1.0, -3.0])[:, None]
    for padding, padded in ((1, True), ("same", True), (0, False)):
        model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=padding))
        site = _site(_operator(model, "0"))
        data = calibrate(model, [site], [Batch(args=(x,))], rows=99, seed=0).site_data(site, _parameters(model))
        (part,) = data.parts
        assert part.sample_low is not None
        assert part.sample_high is not None
        for low, high, real in (
            (data.input_range.low, data.input_range.high, x.movedim(1, 2).flatten(0, 1)),
            (part.sample_low[0], part.sample_high[0], x[0].T),
        ):
            assert torch.equal(low, real.amin(0).clamp_max(0) if padded else real.amin(0))
            assert torch.equal(high, real.amax(0).clamp_min(0) if padded else real.amax(0))
        torch.testing.assert_close(data.magnitudes("absmax"), x.abs().amax((0, 2)))


def test_site_data_is_what_the_judge_expects() -> None:
    model, site = _convolutions()
    text, sites = _text()
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(5))
    fine = calibrate(model, [site], [Batch(args=(x,))], rows=9, seed=0).site_data(site, _parameters(model))
    words = calibrate(text, sites, _batches(_ids(1), 4), rows=9, seed=0).site_data(sites[0], _parameters(text))
    for data in (fine, words):
        for granularity in get_args(ActivationGranularity):
            judge = SiteObjective(data, Scheme(activation_granularity=granularity))
            assert 0 < judge.loss(Smoothing(scales=torch.ones(data.channels))) < 1e-3


def test_convolution_statistics_count_a_shared_tensor_once() -> None:
    model, site = _convolutions()
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(2))
    found = calibrate(model, [site], [Batch(args=(x,))], rows=3, seed=0)
    assert found.sites["a"].rows_seen >= 2 * 25
    alone = calibrate(model, [_site(*site.operators[:3])], [Batch(args=(x,))], rows=3, seed=0)
    assert alone.sites["a"].rows_seen == 2 * 25
    torch.testing.assert_close(alone.sites["a"].rms, x.square().mean((0, 2, 3)).sqrt())


def test_masked_frames_of_a_1d_convolution_are_dropped() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1))
    x = torch.ones(2, 2, 6)
    x[0, :, 3:] = 100.0
    mask = torch.tensor([[True] * 3 + [False] * 3, [True] * 6])
    site = _site(_operator(model, "0"))
    found = calibrate(model, [site], [Batch(args=(x,), mask=mask)], rows=99, seed=0)
    assert found.input_range(site).peaks().tolist() == [1.0, 1.0]
    assert found.sites["0"].parts[0].x.shape == (9, 6)


class _Recurrent(nn.Module):
    """One linear operator called at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(x.shape[0], 3)
        for t in range(x.shape[1]):
            h = torch.tanh(self.step(input=h + x[:, t]))
        return h


def test_an_operator_called_many_times_streams_all_its_calls() -> None:
    model = _Recurrent()
    site = _site(_operator(model, "step"))
    found = calibrate(model, [site], [Batch(args=(torch.randn(2, 30, 3),))], rows=8, seed=0)
    assert found.rows_seen == {"step": 60}
    assert found.sites["step"].parts[0].x.shape == (8, 3)


class _Routed(nn.Module):
    """Two experts of which only the first is ever used; the second weight also serves a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2, bias=False)
        self.second = nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.first(x) + F.linear(x, self.second.weight))


def test_sites_without_data_are_listed_with_the_reason() -> None:
    model = _Routed()
    reached, unreached = _site(_operator(model, "first")), _site(_operator(model, "second"))
    raw = _site(_operator(model, "second", raw=True))
    found = calibrate(model, [reached, unreached], [Batch(args=(torch.ones(4, 3),))], rows=8, seed=0)
    assert list(found.sites) == ["first"]
    assert "no unpadded calibration row reached" in found.missing["second"]
    assert found.rows_seen == {"first": 4, "second": 0}
    with pytest.raises(InputError, match=r"site second: has no calibration rows: .*; leave it out"):
        found.site_data(unreached, _parameters(model))
    only_raw = calibrate(model, [raw], [Batch(args=(torch.ones(4, 3),))], rows=8, seed=0)
    assert "functional calls" in only_raw.missing["second"]
    assert not only_raw.sites


def test_raw_siblings_count_in_the_weight_range_and_nowhere_else() -> None:
    model = _Routed()
    with torch.no_grad():
        model.second.weight.fill_(7.0)
    site = _site(_operator(model, "first"), _operator(model, "second", raw=True))
    found = calibrate(model, [site], [Batch(args=(torch.ones(4, 3),))], rows=8, seed=0)
    data = found.site_data(site, _parameters(model))
    assert data.parts[0].operators == ("first",)
    assert data.weight_absmax.tolist() == [7.0] * 3
    stacked = _parameters(model) | {"second.weight": torch.full((4, 2, 3), -9.0)}
    assert weight_absmax(site, stacked).tolist() == [9.0] * 3
    unrelated = _parameters(model) | {"second.weight": torch.full((3, 5), -9.0)}
    assert torch.equal(weight_absmax(site, unrelated), model.first.weight.detach().abs().amax(0))


def test_transposed_and_grouped_weights_have_their_channel_maxima() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    model = nn.Sequential(Transposed())
    site = _site(_operator(model, "0", transposed=True))
    x = torch.eye(3)
    data = calibrate(model, [site], [Batch(args=(x,))], rows=8, seed=0).site_data(site, _parameters(model))
    assert torch.equal(data.parts[0].weight, torch.arange(12.0).reshape(3, 4).T)
    assert data.weight_absmax.tolist() == [3.0, 7.0, 11.0]
    convolutions, _ = _convolutions()
    grouped = _site(_operator(convolutions, "grouped"))
    weight = convolutions.grouped.weight.detach().abs()
    expected = [weight[o : o + 3, c].max() for o in (0, 3) for c in (0, 1)]
    assert torch.equal(weight_absmax(grouped, _parameters(convolutions)), torch.stack(expected))


def test_dead_channels_have_statistic_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    x = torch.randn(50, 3) * torch.tensor([1.0, 0.0, 1.0])
    site = _site(_operator(model, "0"))
    for statistic in get_args(ChannelStatistic):
        found = calibrate(model, [site], [Batch(args=(x,))], rows=8, seed=0, statistics=(statistic,))
        assert (found.activation_statistics(site)[statistic] > 0).tolist() == [True, False, True]


def test_the_model_is_left_as_it_was_even_after_a_failure() -> None:
    model, site = _convolutions()
    model.train()
    model.a.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 4, 5, 5)
    expected = [y.detach() for y in model(x)]
    calibrate(model, [site], [Batch(args=(x,))], rows=3, seed=0)
    with pytest.raises(InputError):
        calibrate(model, [site], [Batch(args=(x * math.inf,))], rows=3, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
    assert model.training
    assert not model.a.training
    assert model.padded.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_activations_name_the_operator_and_the_batch(value: float) -> None:
    model, sites = _text()
    good, bad = _ids(1).clamp(max=48), _ids(1).clamp(max=48)
    bad[3, 3] = 49
    with torch.no_grad():
        model.embed.weight[49, 2] = value
    with pytest.raises(InputError, match=r"channel 2 \(batch 1\)") as caught:
        calibrate(model, sites, [Batch(args=(good,)), Batch(args=(bad,))], rows=4, seed=0)
    assert caught.value.field == "activations of q"


def _forever_masked(model: nn.Module, sites: Sequence[Site]) -> Calibration:
    return calibrate(model, sites, _batches(_ids(1), 4, torch.zeros(8, 5, dtype=torch.bool)), rows=4, seed=0)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda m, s: calibrate(m, s, [], rows=4, seed=0), "data"),
        (_forever_masked, "data"),
        (lambda m, s: calibrate(m, s, _batches(_ids(1), 4), rows=0, seed=0), "rows"),
        (
            lambda m, s: calibrate(m, s, _batches(_ids(1), 4), rows=4, seed=0, statistics=cast(Any, ("mean",))),
            "statistics",
        ),
        (lambda m, s: calibrate(m, s, _batches(_ids(1), 4), rows=4, seed=0, statistics=()), "statistics"),
        (lambda m, s: calibrate(m, s, _batches(_ids(1), 4), rows=4, seed=0, statistics=("rms", "rms")), "statistics"),
        (lambda m, s: calibrate(m, s, _batches(_ids(1), 4), rows=4, seed=0, percentile=0), "percentile"),
        (lambda m, s: calibrate(m, [*s, s[0]], _batches(_ids(1), 4), rows=4, seed=0), "sites"),
        (lambda m, s: calibrate(nn.Linear(2, 2), s, _batches(_ids(1), 4), rows=4, seed=0), "operator q"),
    ],
)
def test_bad_input_names_its_field(call: Callable[[nn.Module, list[Site]], Any], field: str) -> None:
    model, sites = _text()
    with pytest.raises(InputError) as caught:
        call(model, sites)
    assert caught.value.field == field


def test_bad_parameters_are_named() -> None:
    model, sites = _text()
    found = calibrate(model, sites, _batches(_ids(1), 4), rows=4, seed=0)
    parameters = _parameters(model)
    with pytest.raises(InputError, match=r"parameter k\.weight: is missing"):
        found.site_data(sites[0], {"q.weight": parameters["q.weight"]})
    with pytest.raises(InputError, match=r"parameter k\.weight: has 7 columns"):
        found.site_data(sites[0], parameters | {"k.weight": torch.ones(5, 7)})
    with pytest.raises(NonFiniteError, match=r"k\.weight"):
        found.site_data(sites[0], parameters | {"k.weight": torch.full((5, 6), math.nan)})


def test_batches_are_read_once_and_progress_is_told() -> None:
    model, sites = _text()
    alive: list[int] = []

    def stream() -> Iterator[Batch]:
        for i in range(3):
            alive.append(i)
            yield Batch(args=(_ids(i),))

    done: list[int] = []
    calibrate(model, sites, stream(), rows=4, seed=0, on_batch=lambda n: done.append(n * 10 + len(alive)))
    assert done == [11, 22, 33]


@pytest.mark.parametrize("statistics", [("absmax",), ("percentile", "rms", "absmax")])
def test_state_survives_a_file_to_the_bit(statistics: tuple[ChannelStatistic, ...], tmp_path: Path) -> None:
    model, site = _convolutions()
    unreached = _site(_operator(model, "a", raw=True))
    sites = [site, Site(**{**vars(unreached), "name": "raw site"})]
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(3))
    found = calibrate(model, sites, [Batch(args=(x,))], rows=7, seed=0, statistics=statistics, percentile=75.0)
    save_file(found.state(), tmp_path / "calibration.safetensors")
    again = Calibration.from_state(load_file(tmp_path / "calibration.safetensors"))
    assert again.missing == found.missing != {}
    assert (again.statistics, again.percentile, again.rows_seen) == (statistics, 75.0, found.rows_seen)
    first, second = found.state(), again.state()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    a, b = (c.site_data(site, _parameters(model)) for c in (found, again))
    assert list(a.activation_statistics) == list(b.activation_statistics) == list(statistics)
    assert torch.equal(a.activation_statistic, b.activation_statistic)
    assert torch.equal(a.input_range.low, b.input_range.low)
    assert [p.operators for p in a.parts] == [p.operators for p in b.parts]


def test_a_damaged_state_is_refused() -> None:
    model, sites = _text()
    state = calibrate(model, sites, _batches(_ids(1), 4), rows=4, seed=0).state()
    with pytest.raises(InputError, match="incomplete"):
        Calibration.from_state({})
    with pytest.raises(InputError, match="incomplete"):
        Calibration.from_state({name: value for name, value in state.items() if name != "1.0.x"})
    newer = bytes(state["structure"].tolist()).replace(b'"version": 2', b'"version": 9')
    with pytest.raises(InputError, match="version 9"):
        Calibration.from_state(state | {"structure": torch.tensor(list(newer), dtype=torch.uint8)})
