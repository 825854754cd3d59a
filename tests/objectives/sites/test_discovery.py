"""Discovery: what folds, what does not and why, on small hand-written modules."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.folding import fold
from alphasmith.objectives.sites.types import Discovery, Site
from alphasmith.objectives.smoothing import Smoothing
from tests.support import site_modules as m

Input = Callable[[int, int], Tensor]


def rows(seed: int, length: int) -> Tensor:
    return torch.randn(2 + seed % 2, length, m.C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pictures(seed: int, length: int) -> Tensor:
    shape = (2, 3, length + 6, length + 7)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ids(seed: int, length: int) -> Tensor:
    return torch.randint(30, (2, length), generator=torch.Generator().manual_seed(seed))


#: name -> (module, input, sites that fold, sites that are explicit, sites that are left), by name of first operator
CASES: dict[str, tuple[Callable[[], nn.Module], Input, set[str], set[str], set[str]]] = {
    "mlp": (m.Mlp, rows, {"fc1", "fc2", "head"}, set(), set()),
    "mlp-gelu": (lambda: m.Mlp(nn.GELU()), rows, {"fc1", "head"}, {"fc2"}, set()),
    "mlp-rms": (lambda: m.Mlp(norm=nn.RMSNorm(m.C)), rows, {"fc1", "fc2", "head"}, set(), set()),
    "mlp-offset": (lambda: m.Mlp(norm=m.OffsetNorm()), rows, {"fc1", "fc2", "head"}, set(), set()),
    "mlp-plain-norm": (
        lambda: m.Mlp(norm=nn.LayerNorm(m.C, elementwise_affine=False)), rows, {"fc2", "head"}, {"fc1"}, set(),
    ),
    "gated": (lambda: m.Gated(True), rows, {"both", "down"}, set(), set()),
    "gated-second": (lambda: m.Gated(False), rows, {"both", "down"}, set(), set()),
    "attention": (lambda: m.Attention("matmul", False), rows, {"q", "o"}, set(), set()),
    "attention-sdpa": (lambda: m.Attention("sdpa", False), rows, {"q", "o"}, set(), set()),
    "attention-fused": (lambda: m.Attention("matmul", True), rows, {"qkv", "o"}, set(), set()),
    "attention-multi-query": (lambda: m.Attention("sdpa", True, 1), rows, {"qkv", "o"}, set(), set()),
    "convolutions": (m.Convolutions, pictures, {"depthwise", "grouped", "pointwise", "head"}, {"stem"}, set()),
    "frozen-norm": (m.FrozenNorm, pictures, {"second"}, {"first"}, set()),
    "post-norm": (m.PostNorm, rows, set(), {"fc"}, set()),
    "positions": (m.Positions, ids, {"fc", "head"}, set(), set()),
    "positions-tied": (lambda: m.Positions(tied=True), ids, set(), {"fc"}, {"head"}),
    "windows": (m.Windows, rows, {"fc"}, set(), set()),
    "stacked-experts": (m.StackedExperts, rows, set(), set(), {"router", "down"}),
    "module-experts": (
        m.ModuleExperts, rows, set(), set(), {"router", "experts.0.2", "experts.1.2", "experts.2.2"},
    ),
    "shared": (m.Shared, rows, {"fc"}, set(), set()),
    "joined": (m.Joined, rows, {"wide", "pooled"}, set(), set()),
    "written-through": (m.WrittenThrough, rows, set(), {"fc"}, set()),
    "encoder-layer": (
        lambda: nn.TransformerEncoderLayer(m.C, 4, 16, batch_first=True, norm_first=True), rows,
        {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"}, set(), set(),
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Input, Discovery]:
    factory, draw, *_ = CASES[request.param]
    model = m.randomised(factory())
    return request.param, model, draw, discover(model, Batch(args=(draw(1, 30 if "experts" in request.param else 5),)))


def smoothing_of(site: Site, seed: int) -> Smoothing:
    """Random log-uniform scales in [1/20, 20] and, where it folds, a shift, equal within ties."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(site.channels, dtype=torch.float64, generator=generator)
    shift = torch.randn(site.channels, dtype=torch.float64, generator=generator)[site.ties]
    return Smoothing(scales=torch.exp((2 * uniform - 1) * 3.0)[site.ties], shift=shift if site.shift_edits else None)


def change(model: nn.Module, sites: list[Site], x: Tensor) -> float:
    """Relative change of the output when ``sites`` are folded, explicit ones with a division at their inputs."""
    smoothed = copy.deepcopy(model)
    modules = dict(smoothed.named_modules())
    for seed, site in enumerate(sites):
        smoothing = smoothing_of(site, seed)
        fold(smoothed, site, smoothing)
        for operator in site.operators if site.mode == "explicit" else ():
            shaped = smoothing.scales.reshape(-1, *[1] * len(operator.kernel))
            modules[operator.name].register_forward_pre_hook(lambda _, args, s=shaped: (args[0] / s, *args[1:]))
    with torch.no_grad():
        before, after = model(x), smoothed(x)
    return float((after - before).norm() / before.norm())


def test_modes_are_as_expected(case: tuple[str, nn.Module, Input, Discovery]) -> None:
    name, _, _, found = case
    _, _, *expected = CASES[name]
    modes = [{site.name for site in found.sites if site.mode == mode} for mode in ("fold", "explicit", "left")]
    assert modes == expected
    assert all(bool(site.reason) != (site.mode == "fold") for site in found.sites)


def test_outputs_stay_the_same_on_fresh_input_of_another_length(
    case: tuple[str, nn.Module, Input, Discovery],
) -> None:
    _, model, draw, found = case
    sites = [site for site in found.sites if site.mode != "left"]
    assert change(model, sites, draw(2, 9)) < 1e-12


def test_every_folded_site_needs_its_consumers_and_its_producers(
    case: tuple[str, nn.Module, Input, Discovery],
) -> None:
    _, model, draw, found = case
    for site in (s for s in found.sites if s.mode == "fold"):
        for power in (1, -1):
            half = tuple(edit for edit in site.edits if edit.power == power)
            assert half
            broken = Site(**{**vars(site), "edits": half})
            assert change(model, [broken], draw(2, 9)) > 1e-6


def test_every_owned_operator_is_in_exactly_one_site(case: tuple[str, nn.Module, Input, Discovery]) -> None:
    _, model, _, found = case
    listed = [operator.name for site in found.sites for operator in site.operators]
    assert len(listed) == len(set(listed))
    raw = {
        operator.name for site in found.sites for operator in site.operators if operator.raw and not operator.stacked
    }
    assert raw <= {name for name, _ in found.skipped}
    owned = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert owned <= set(listed) | {name for name, _ in found.skipped}


def test_discovery_leaves_the_model_as_it_was() -> None:
    model = m.randomised(m.Attention("matmul", True))
    before = copy.deepcopy(model.state_dict())
    fast_path = torch.backends.mha.get_fastpath_enabled()
    discover(model, Batch(args=(rows(1, 4),)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def only(found: Discovery, name: str) -> Site:
    (site,) = (s for s in found.sites if s.name == name)
    return site


def test_query_key_value_share_a_site_and_grouped_heads_tie_their_scales() -> None:
    found = discover(m.randomised(m.Attention("matmul", False)), Batch(args=(rows(1, 4),)))
    assert [o.name for o in only(found, "q").operators] == ["q", "k", "v"]
    assert only(found, "q").producers == ("norm",)
    # two query heads of D channels read each value head
    value_head = torch.arange(m.H) // 2 * 2
    expected = (value_head[:, None] * m.D + torch.arange(m.D)).flatten()
    assert only(found, "o").ties.tolist() == expected.tolist()
    assert only(found, "o").producers == ("v",)


def test_only_the_value_rows_of_a_fused_projection_are_scaled() -> None:
    found = discover(m.randomised(m.Attention("sdpa", True, m.H)), Batch(args=(rows(1, 4),)))
    (weight,) = (e for e in only(found, "o").edits if e.parameter == "qkv.weight")
    touched = (weight.channel >= 0).expand(3 * m.H * m.D, m.C).all(1)
    assert touched.tolist() == [False] * 2 * m.H * m.D + [True] * m.H * m.D


def test_the_offset_of_a_one_plus_weight_norm_is_recorded() -> None:
    found = discover(m.randomised(m.Mlp(norm=m.OffsetNorm())), Batch(args=(rows(1, 4),)))
    offsets = {edit.parameter: edit.offset for edit in only(found, "fc1").edits}
    assert offsets == {"norm.weight": 1.0, "fc1.weight": 0.0}


@pytest.mark.parametrize(
    ("name", "site", "words"),
    [
        ("mlp-gelu", "fc2", "gelu in activation"),
        ("mlp-plain-norm", "fc1", "the normalization norm has no weight"),
        ("post-norm", "fc", "read by the normalization next"),
        ("convolutions", "stem", "straight from the model's input"),
        ("positions-tied", "fc", "tokens.weight"),
        ("stacked-experts", "router", "expert inputs are not smoothed by default"),
        ("written-through", "fc", "in place"),
    ],
)
def test_reasons_name_the_cause(name: str, site: str, words: str) -> None:
    factory, draw, *_ = CASES[name]
    found = discover(m.randomised(factory()), Batch(args=(draw(1, 20),)))
    assert words in only(found, site).reason


def test_a_scaled_tensor_must_not_be_an_output() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(m.C), nn.Linear(m.C, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.norm(x)
            return {"answer": self.fc(y), "features": y}

    site = discover(m.randomised(Both()), Batch(args=(rows(1, 4),))).sites[0]
    assert (site.mode, site.reason) == ("explicit", "it is also an output of the model")


def test_excluded_operators_leave_their_site_alone() -> None:
    found = discover(m.randomised(m.Attention("matmul", False)), Batch(args=(rows(1, 4),)), exclude=("k*",))
    assert (only(found, "q").mode, only(found, "q").reason) == ("left", "k is excluded")
    assert only(found, "o").mode == "fold"


@pytest.mark.parametrize("tokens", [1, 30])
def test_stacked_experts_fold_on_request_even_those_without_tokens(tokens: int) -> None:
    model = m.randomised(m.StackedExperts())
    found = discover(model, Batch(args=(rows(2, tokens)[:1],)), experts=True)
    assert only(found, "router").mode == "fold"
    assert change(model, list(found.sites), rows(4, 40)) < 1e-12


def test_expert_modules_fold_on_request_if_all_are_reached() -> None:
    model = m.randomised(m.ModuleExperts())
    found = discover(model, Batch(args=(rows(2, 40),)), experts=True)
    assert {site.mode for site in found.sites} == {"fold"}
    assert change(model, list(found.sites), rows(4, 40)) < 1e-12
    fewer = discover(model, Batch(args=(rows(2, 1)[:1],)), experts=True)
    assert only(fewer, "router").mode == "left"
    assert "sends nothing to experts." in only(fewer, "router").reason
    assert sum(site.reason == "the example batch does not reach it" for site in fewer.sites) == 4


def test_two_linears_with_one_weight_are_not_smoothed_apart() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.other = nn.LayerNorm(m.C), nn.LayerNorm(m.C)
            self.a, self.b = nn.Linear(m.C, m.C), nn.Linear(m.C, m.C)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.b(self.other(self.a(self.norm(x)).tanh())))

    model = m.randomised(Tied())
    found = discover(model, Batch(args=(rows(1, 4),)))
    assert [site.mode for site in found.sites] == ["left", "left"]
    assert [[o.name for o in site.operators] for site in found.sites] == [["a"], ["b"]]


def test_a_weight_shared_with_a_module_that_did_not_run_is_not_touched() -> None:
    class HalfSeen(m.Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.LayerNorm(m.C)
            self.unused.register_parameter("weight", self.norm.get_parameter("weight"))

    found = discover(m.randomised(HalfSeen()), Batch(args=(rows(1, 4),)))
    assert only(found, "fc1").mode == "explicit"
    assert "unused" in only(found, "fc1").reason


def test_a_linear_behind_a_parametrization_is_skipped() -> None:
    model = m.Mlp()
    nn.utils.parametrizations.weight_norm(model.fc1)
    found = discover(m.randomised(model), Batch(args=(rows(1, 4),)))
    assert dict(found.skipped)["fc1"] == "the weight of fc1 is computed from it"
    assert only(found, "fc2").mode == "explicit"


def test_inference_mode_inside_the_model_is_seen_through() -> None:
    class Inference(m.Mlp):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    found = discover(m.randomised(Inference()), Batch(args=(rows(1, 4),)))
    assert {site.mode for site in found.sites} == {"fold"}


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_whatever_folds_in_a_random_network_leaves_its_output_alone(seed: int) -> None:
    model = m.randomised(m.RandomNet(seed), seed)
    found = discover(model, Batch(args=(rows(1, 4),)))
    assert change(model, [site for site in found.sites if site.mode != "left"], rows(2, 7)) < 1e-9


def test_random_networks_have_folds_worth_testing() -> None:
    found = [discover(m.randomised(m.RandomNet(seed), seed), Batch(args=(rows(1, 4),))) for seed in range(20)]
    modes = [site.mode for discovery in found for site in discovery.sites]
    assert modes.count("fold") > 10
    assert modes.count("explicit") > 10


def test_models_that_cannot_be_searched_are_refused() -> None:
    with pytest.raises(InputError, match="no linear or convolution"):
        discover(nn.LayerNorm(m.C).eval(), Batch(args=(torch.randn(2, m.C),)))
    with pytest.raises(InputError, match="training mode"):
        discover(nn.Linear(m.C, 2), Batch(args=(torch.randn(2, m.C),)))


class Chain(nn.Module):
    """Linear layers and a norm without a nonlinearity: one bias is a consumer's for one site and a producer's for the next."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(5, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.second(self.first(self.norm(x)))))


class Windows(nn.Module):
    """Convolutions without padding behind each other; the last one pads with zeros, so its input cannot lose its shift."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 4, 3), nn.Conv1d(4, 6, 2, stride=2, groups=2)
        self.norm, self.third = nn.BatchNorm1d(6), nn.Conv1d(6, 4, 1)
        self.padded = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.padded(self.third(self.norm(self.second(self.first(x))))))


@pytest.mark.parametrize(
    ("factory", "shape", "folded", "quantizer"),
    [
        (Chain, (3, 5, 6), {"first", "second", "head"}, set()),
        (Windows, (3, 3, 12), {"second", "third"}, {"first", "padded"}),
    ],
)
def test_shifts_fold_through_a_chain_of_biases(
    factory: Callable[[], nn.Module], shape: tuple[int, ...], folded: set[str], quantizer: set[str]
) -> None:
    model = m.randomised(factory())
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sites = list(discover(model, Batch(args=(x[:1],))).sites)
    assert {site.name for site in sites if site.shift_edits} == folded
    assert {site.name for site in sites if site.shiftable and not site.shift_edits} == quantizer
    foldable = [site for site in sites if site.mode == "fold"]
    assert change(model, foldable, x) < 1e-10
    assert change(model, foldable[::-1], x) < 1e-10  # the order of sites does not matter


@pytest.mark.parametrize("spoil", ["read", "shared", "pinned", "nonlinear", "biasless"])
def test_a_shift_stays_in_the_quantizer_unless_all_its_biases_are_free(spoil: str) -> None:
    class Spoilt(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 5, bias=spoil != "biasless")
            del self.head
            if spoil == "shared":
                self.other = nn.Linear(5, 5)
                self.other.bias = self.first.bias

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(self.norm(x))
            if spoil == "read":
                return torch.as_tensor(self.second(y) + self.first.bias.sum())
            if spoil == "shared":
                return torch.as_tensor(self.second(y) + self.other(x[..., :5]).sum())
            return torch.as_tensor(self.second(torch.relu(y) if spoil == "nonlinear" else y))

    model = m.randomised(Spoilt())
    if spoil == "pinned":  # another name for the same memory
        model.register_parameter("alias", nn.Parameter(model.get_parameter("first.bias").data))
    x = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sites = {site.name: site for site in discover(model, Batch(args=(x,))).sites}
    assert bool(sites["first"].shift_edits) == (spoil == "nonlinear")
    assert not sites["second"].shift_edits
    assert change(model, [site for site in sites.values() if site.mode == "fold"], x) < 1e-10
