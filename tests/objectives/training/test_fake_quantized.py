"""The twin that is trained computes what the integer model computes, before training and after."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.model.plain_operators import rewrite
from alphasmith.objectives.quantization.payload import payload, restore
from alphasmith.objectives.quantization.scheme import ActivationFormat, Scheme
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing
from alphasmith.objectives.training._rounding import rounded
from alphasmith.objectives.training.fake_quantized import FakeQuantized
from tests.support.plain_forms import quantize_model, symmetric
from tests.support.quantized_models import SCHEMES, Example, block_example, pixels_example, shifted

#: The worst of outputs against their size: float rounding, and single activations that it puts on the other side of a half.
CLOSE = 5e-3


def integers(made: Example, scheme: Scheme) -> nn.Module:
    model = copy.deepcopy(made.model)
    quantize_model(model, made.sites, smoothings=made.smoothings, ranges=made.ranges, scheme=scheme)
    return model


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())


def stored(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in payload(model)[0].items()}


def step(twin: FakeQuantized, batch: Batch, rate: float = 1e-2, updates: int = 3) -> None:
    optimizer = torch.optim.AdamW(twin.parameters(), lr=rate, weight_decay=0)
    twin.train()
    for _ in range(updates):
        output = main_output(call(twin, batch))
        (output - torch.linspace(-1, 1, output.shape[-1])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    twin.eval()


def reloaded(model: nn.Module, skeleton: nn.Module) -> nn.Module:
    tensors, structure = payload(model)
    return restore(
        copy.deepcopy(skeleton), safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(json.dumps(structure))
    )  # fmt: skip


@pytest.mark.parametrize("example", [block_example, pixels_example])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("change", [lambda made: made, shifted], ids=["", "shifted"])
def test_before_the_first_step_it_is_the_integer_model(
    example: Callable[[], Example], scheme: Scheme, change: Callable[[Example], Example]
) -> None:
    made = change(example())
    model = integers(made, scheme)
    twin = FakeQuantized(model)
    for batch in made.batches:
        with torch.no_grad():
            assert distance(twin(*batch.args), model(*batch.args)) < CLOSE
    assert payload(twin.integers())[1] == payload(model)[1]
    again, before = stored(twin.integers()), stored(model)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name].float(), before[name].float()) for name in before)


@pytest.mark.parametrize("example", [block_example, pixels_example])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_what_it_became_is_what_is_stored(example: Callable[[], Example], scheme: Scheme) -> None:
    made = shifted(example())
    model = integers(made, scheme)
    twin = FakeQuantized(model)
    before = stored(model)
    step(twin, made.batches[0])
    trained = twin.integers()
    after = stored(trained)
    assert all(torch.equal(before[name].float(), value.float()) for name, value in stored(model).items()), (
        "the source changed"
    )
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name].float(), after[name].float())}
    expected = {"weight_values", "weight_scale", "bias"} | ({"input_scale"} if scheme.static else set())
    assert expected <= moved
    assert not {"smooth", "shift"} & moved
    back = reloaded(trained, made.model)
    for batch in made.batches:
        with torch.no_grad():
            assert torch.equal(back(*batch.args), trained(*batch.args))
            assert distance(twin(*batch.args), trained(*batch.args)) < CLOSE


@pytest.mark.parametrize("example", [block_example, pixels_example])
@pytest.mark.parametrize(
    "scheme", ["w8a8-channel-static", "w8au8-tensor-static", "w8a8-channel-token", "w8au8-channel-static"]
)
def test_products_saturate_in_training_as_they_do_where_the_model_runs(
    example: Callable[[], Example], scheme: str
) -> None:
    """Large weights of one sign, so that many pairs leave 16 bits."""
    made = shifted(example())
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if name.endswith("weight") and weight.dim() > 1:
                weight.copy_(weight.abs() + weight.abs().amax())
    exact = Scheme.parse(scheme)
    model, plain = (integers(made, s) for s in (replace(exact, kernel="u8s8-pairs16"), exact))
    twin = FakeQuantized(model)
    for batch in made.batches:
        with torch.no_grad():
            expected = model(*batch.args)
            lost = distance(plain(*batch.args), expected)
            assert lost > 1e-3
            assert distance(twin(*batch.args), expected) < 0.1 * lost
    step(twin, made.batches[0])
    trained = twin.integers()
    with torch.no_grad():
        assert distance(trained(*made.batches[0].args), model(*made.batches[0].args)) > CLOSE
        assert distance(twin(*made.batches[0].args), trained(*made.batches[0].args)) < CLOSE


@pytest.mark.parametrize("learn", [False, True])
def test_steps_and_ranges_stay_unless_they_are_learned(learn: bool) -> None:
    made = block_example()
    model = integers(made, Scheme())
    twin = FakeQuantized(model, learn_steps=learn, learn_ranges=learn)
    before = stored(model)
    step(twin, made.batches[0])
    after = stored(twin.integers())
    for name in before:
        if name.endswith(("weight_scale", "input_scale")):
            assert torch.equal(before[name], after[name]) is not learn, name
            assert bool((after[name] > 0).all())


def test_a_correction_is_trained_where_there_is_no_bias() -> None:
    made = shifted(block_example())
    model = integers(made, Scheme())
    assert "out.correction" in stored(model)
    assert "k.bias" not in stored(model)
    twin = FakeQuantized(model)
    step(twin, made.batches[0])
    before, after = stored(model), stored(twin.integers())
    assert not torch.equal(before["k.correction"], after["k.correction"])
    assert torch.equal(before["out.correction"], after["out.correction"])


class Recurrent(nn.Module):
    """Two recurrent layers and attention, all of torch's fused kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True, bidirectional=True)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 13)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, 13)."""
        return torch.as_tensor(self.head(self.layer(self.gru(self.lstm(self.embed(ids))[0])[0])))


def discovered(model: nn.Module, batch: Batch, scheme: Scheme) -> nn.Module:
    sites = tuple(s for s in discover(model, batch, experts=True).sites)
    ranges = {s.name: symmetric(torch.full((s.channels,), 2.0)) for s in sites}
    quantize_model(
        model, sites, smoothings={s.name: half(s) for s in sites if s.mode != "left"}, ranges=ranges, scheme=scheme
    )
    return model


def half(site: Site) -> Smoothing:
    _, tie = torch.unique(site.ties, return_inverse=True)
    return Smoothing(scales=torch.linspace(0.5, 2, int(tie.max()) + 1)[tie])


@pytest.mark.parametrize(
    "scheme", [Scheme(), Scheme(weights="int4", activation_granularity="token")], ids=lambda s: s.name
)
def test_recurrent_layers_and_attention(scheme: Scheme) -> None:
    torch.manual_seed(0)  # module initialisers take no generator
    model = Recurrent().eval()
    rewrite(model)
    skeleton = copy.deepcopy(model)
    batch = Batch(args=(torch.randint(0, 13, (3, 6), generator=torch.Generator().manual_seed(1)),))
    quantized = discovered(model, batch, scheme)
    twin = FakeQuantized(quantized)
    with torch.no_grad():
        assert distance(twin(*batch.args), quantized(*batch.args)) < CLOSE
    step(twin, batch)
    trained = twin.integers()
    before, after = stored(quantized), stored(trained)
    assert {n for n in before if n.endswith("weight_values") and torch.equal(before[n], after[n])} == set()
    with torch.no_grad():
        assert torch.equal(reloaded(trained, skeleton)(*batch.args), trained(*batch.args))
        assert distance(twin(*batch.args), trained(*batch.args)) < CLOSE


class Experts(nn.Module):
    """Experts in two stacked tensors, one of them stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(6), nn.Linear(6, 2)
        self.up, self.down = nn.Parameter(torch.randn(2, 10, 6)), nn.Parameter(torch.randn(2, 10, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, 6) -> (B, L, 2)."""
        rows = self.norm(x).reshape(-1, 6)
        chosen = self.router(rows).argmax(-1)
        out = torch.zeros_like(rows)
        for expert in range(2):
            picked = torch.where(chosen == expert)[0]
            out = out.index_add(0, picked, torch.relu(rows[picked] @ self.up[expert].t()) @ self.down[expert])
        return torch.as_tensor(self.head(x + out.reshape(x.shape)))


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(weights="int4", activations="none")], ids=lambda s: s.name)
def test_stacked_experts(scheme: Scheme) -> None:
    torch.manual_seed(0)  # module initialisers take no generator
    model = Experts().eval()
    skeleton = copy.deepcopy(model)
    batch = Batch(args=(torch.randn(2, 20, 6),))
    quantized = discovered(model, batch, scheme)
    twin = FakeQuantized(quantized)
    with torch.no_grad():
        assert distance(twin(*batch.args), quantized(*batch.args)) < CLOSE
    step(twin, batch, rate=0.1, updates=6)
    trained = twin.integers()
    before, after = stored(quantized), stored(trained)
    for name in ("up", "down"):
        assert not torch.equal(before[f"{name}.weight_values"], after[f"{name}.weight_values"])
    with torch.no_grad():
        assert torch.equal(reloaded(trained, skeleton)(*batch.args), trained(*batch.args))
        assert distance(twin(*batch.args), trained(*batch.args)) < CLOSE


def test_one_operator_used_often_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = block_example()
    shared = nn.Sequential(integers(made, Scheme()).get_submodule("down"), nn.Linear(6, 7), nn.ReLU())
    shared.append(shared[0])
    twin = FakeQuantized(shared)
    calls: list[tuple[int, ...]] = []

    def counted(x: Tensor, scale: Tensor, fmt: ActivationFormat, **smoothing: Tensor | None) -> Tensor:
        calls.append(tuple(x.shape))
        return rounded(x, scale, fmt, **smoothing)

    monkeypatch.setattr("alphasmith.objectives.training.fake_quantized.rounded", counted)
    twin(torch.randn(3, 7))
    assert sorted(calls) == [(3, 7), (3, 7), (6, 7)]


def test_batch_norms_keep_their_statistics_unless_told() -> None:
    made = block_example()
    model = integers(made, Scheme())
    whole = nn.Sequential(model.get_submodule("down"), nn.BatchNorm1d(6))
    x = torch.randn(5, 7)
    for frozen in (True, False):
        twin = FakeQuantized(whole, freeze_norm_statistics=frozen).train()
        twin(x)
        before, after = whole.get_buffer("1.running_mean"), twin.integers().get_buffer("1.running_mean")
        assert torch.equal(before, after) is frozen


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(InputError, match="no quantized operator"):
        FakeQuantized(nn.Linear(3, 3))
    twin = FakeQuantized(integers(block_example(), Scheme()))
    with torch.no_grad():
        next(p for p in twin.parameters() if p.dim() > 1).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinite after training"):
        twin.integers()


def test_a_single_operator_is_a_model() -> None:
    operator = integers(block_example(), Scheme()).get_submodule("down")
    twin = FakeQuantized(operator)
    x = torch.randn(3, 7)
    with torch.no_grad():
        assert distance(twin(x), operator(x)) < 1e-6
        assert torch.equal(twin.integers()(x), operator(x))


def test_ranges_outside_of_calibration_are_clipped_and_learned() -> None:
    """LSQ widens a range that clips, and narrows one that is far too wide."""
    torch.manual_seed(0)  # module initialisers take no generator
    x = torch.randn(256, 16)
    for peak, widens in ((0.5, True), (40.0, False)):
        float_model = nn.Sequential(nn.Linear(16, 8)).eval()
        site = discover(float_model, Batch(args=(x,))).sites[0]
        model = copy.deepcopy(float_model)
        edge = torch.full((16,), peak)
        quantize_model(model, (site,), smoothings={}, ranges={site.name: ChannelRange(-edge, edge)}, scheme=Scheme())
        twin = FakeQuantized(model)
        optimizer = torch.optim.Adam(twin.groups()[2], lr=0.02)
        target = float_model(x).detach()
        for _ in range(60):
            optimizer.zero_grad()
            (twin(x) - target).square().mean().backward()
            optimizer.step()
        before, after = stored(model)["0.input_scale"], stored(twin.integers())["0.input_scale"]
        assert bool(after > before) is widens
