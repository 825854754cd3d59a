"""A model of plain operators computes what the user's did, leaves the user's alone, and finds back to its tensors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from alphasmith.objectives.media.batch import Batch, unfused_attention
from alphasmith.objectives.model.plain_operators import Rewriting, bake_plain, needs_rewriting, rewrite
from alphasmith.objectives.model.private_copy import private_copy
from alphasmith.objectives.sites.discovery import discover
from tests.support.site_modules import randomised

WIDTH = 8


class Doubled(nn.Module):
    """A parametrization of someone's own."""

    def forward(self, x: Tensor) -> Tensor:
        """Any tensor."""
        return 2 * x


def masked(module: nn.Module) -> nn.Module:
    prune.random_unstructured(module, "weight", 0.5)
    return module


def doubled(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", Doubled())


#: Ways to compute a weight, and whether the user's tensors can be found again.
NORMS: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "weight norm": (parametrizations.weight_norm, True),
    "weight norm over all": (lambda m: parametrizations.weight_norm(m, dim=-1), True),
    "weight norm of inputs": (lambda m: parametrizations.weight_norm(m, dim=1), True),
    "old weight norm": (nn.utils.weight_norm, True),
    "old weight norm over all": (lambda m: nn.utils.weight_norm(m, dim=-1), True),
    "spectral norm": (parametrizations.spectral_norm, False),
    "old spectral norm": (nn.utils.spectral_norm, False),
    "orthogonal": (parametrizations.orthogonal, False),
    "pruning": (masked, False),
    "own": (doubled, False),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), (3, WIDTH)),
    "convolution": (lambda: nn.Conv1d(WIDTH, WIDTH, 3), (3, WIDTH, 7)),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def computed(norm: str, layer: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    return nn.Sequential(NORMS[norm][0](make()), nn.ReLU()).eval(), torch.randn(shape)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_computed_weight_is_baked_into_a_copy_only(norm: str, layer: str) -> None:
    model, x = computed(norm, layer)
    names = list(model.state_dict())
    plain = private_copy(model).eval()
    assert needs_rewriting(plain)
    rewriting = rewrite(plain)
    assert list(plain.state_dict()) == ["0.bias", "0.weight"]
    assert type(plain[0]) in (nn.Linear, nn.Conv1d)  # type: ignore[index]
    assert isinstance(plain[0].weight, nn.Parameter)  # type: ignore[index]
    assert not needs_rewriting(plain)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x))
    assert list(model.state_dict()) == names
    assert needs_rewriting(model)
    (site,) = discover(plain, Batch(args=(x,))).sites
    assert not site.operators[0].raw
    # and back: other weights, as folding makes them
    with torch.no_grad():
        weight = plain.get_parameter("0.weight")
        weight.mul_(torch.linspace(0.5, 2, WIDTH).reshape(-1, *[1] * (weight.dim() - 1)))
        weight[2] = 0
        tensors = rewriting.original(plain.state_dict())
        again = private_copy(model).eval()
        bake_plain(again, tensors)
        assert needs_rewriting(again) == NORMS[norm][1]
        again.load_state_dict(tensors)
        torch.testing.assert_close(again(x), plain(x))
        for name, value in rewriting.rewritten(tensors).items():
            torch.testing.assert_close(value, plain.state_dict()[name])
        model(x)  # still itself


def test_layers_that_share_what_they_compute_from_stay_tied() -> None:
    first, second = (parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(2))
    for name in ("original0", "original1"):
        setattr(second.parametrizations.weight, name, getattr(first.parametrizations.weight, name))
    model = nn.Sequential(first, second, first).eval()
    plain = private_copy(model)
    rewriting = rewrite(plain)
    assert plain[0].weight is plain[1].weight  # type: ignore[index]
    x = torch.randn(2, 4)
    torch.testing.assert_close(plain(x), model(x))
    assert set(rewriting.original(plain.state_dict())) == set(model.state_dict())


def test_one_of_two_computed_tensors_can_be_baked() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))).eval()
    doubled(model[0])
    parametrize.register_parametrization(model[0], "bias", Doubled())
    x = torch.randn(2, 4)
    baked = private_copy(model)
    bake_plain(baked, {"0.bias": torch.zeros(4)})
    torch.testing.assert_close(baked(x), model(x))
    assert not parametrize.is_parametrized(baked[0], "bias")  # type: ignore[index]
    assert parametrize.is_parametrized(baked[0], "weight")  # type: ignore[index]
    assert parametrize.is_parametrized(model[0], "bias")
    torch.testing.assert_close(model(x), baked(x))


# ---------------------------------------------------------------------------------------------------------- attention

ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "first": {"batch_first": True},
    "no bias": {"bias": False},
    "learned keys": {"add_bias_kv": True, "batch_first": True},
    "zero key": {"add_zero_attn": True},
    "both": {"add_zero_attn": True, "add_bias_kv": True},
    "other widths": {"kdim": 6, "vdim": 5, "batch_first": True},
    "other widths, no bias": {"kdim": 6, "vdim": 5, "bias": False},
}


class Attention(nn.Module):
    """One attention module, called as it is asked to."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, **settings)

    def forward(self, *args: Tensor, **kwargs: Any) -> Any:
        """What ``nn.MultiheadAttention`` takes and returns."""
        return self.attention(*args, **kwargs)


def masks(kind: str, batch: int, length: int, keys: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[0, -2:] = True
    square = torch.rand(length, keys, generator=generator) < 0.3
    square[:, 0] = False
    added = torch.randn(batch * 2, length, keys, generator=generator, dtype=torch.float64)
    causal = torch.triu(torch.ones(length, keys, dtype=torch.bool), diagonal=1)
    forms: dict[str, dict[str, Any]] = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "square": {"attn_mask": square},
        "both": {"key_padding_mask": padding, "attn_mask": square},
        "added per head": {"attn_mask": added},
        "added both": {"attn_mask": added, "key_padding_mask": padding.double() * -3.0},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
    }
    return forms[kind]


MASKS = ("none", "padding", "square", "both", "added per head", "added both", "causal", "causal and padding")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", ATTENTION)
def test_split_attention_is_the_attention_it_was(form: str, mask: str) -> None:
    settings = ATTENTION[form]
    model = randomised(Attention(**settings))
    plain = private_copy(model)
    rewriting = rewrite(plain)
    kinds = {type(module) for module in plain.modules()}
    assert nn.MultiheadAttention not in kinds
    batch, length, keys = 3, 4, 6
    sizes = ((length, WIDTH), (keys, settings.get("kdim", WIDTH)), (keys, settings.get("vdim", WIDTH)))
    first = settings.get("batch_first", False)
    inputs = [torch.randn((batch, n, c) if first else (n, batch, c), dtype=torch.float64) for n, c in sizes]
    given = masks(mask, batch, length, keys)
    for need, average in itertools.product((False, True), (False, True)):
        options = {"need_weights": need, "average_attn_weights": average, **given}
        with torch.no_grad():
            expected, found = model(*inputs, **options), plain(*inputs, **options)
        torch.testing.assert_close(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None)
        if need:
            torch.testing.assert_close(found[1], expected[1])
    tensors = rewriting.original(plain.state_dict())
    assert set(tensors) == set(model.state_dict())
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert rewriting.rewritten(tensors).keys() == {rewriting.renamed.get(n, n) for n in plain.state_dict()}


def test_split_attention_takes_one_sequence() -> None:
    for first in (False, True):
        model = randomised(Attention(batch_first=first))
        plain = private_copy(model)
        rewrite(plain)
        x = torch.randn(5, WIDTH, dtype=torch.float64)
        padding = torch.tensor([False, False, False, True, True])
        for expected, found in zip(
            model(x, x, x, key_padding_mask=padding), plain(x, x, x, key_padding_mask=padding), strict=True
        ):
            torch.testing.assert_close(found, expected)


def transformer(**settings: Any) -> nn.Module:
    return nn.Transformer(WIDTH, 2, 2, 1, 16, batch_first=True, **settings)


@pytest.mark.parametrize("norm_first", [False, True])
def test_every_product_of_a_transformer_is_an_operator_of_its_own(norm_first: bool) -> None:
    model = randomised(transformer(norm_first=norm_first))
    plain = private_copy(model)
    rewriting = rewrite(plain)
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(2, n, WIDTH, dtype=torch.float64, generator=generator) for n in (6, 5))
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), diagonal=1)
    kwargs = {"tgt_mask": mask, "tgt_is_causal": True}
    with torch.no_grad(), unfused_attention():
        torch.testing.assert_close(plain(source, target, **kwargs), model(source, target, **kwargs))
    found = discover(plain, Batch(args=(source, target), kwargs=kwargs))
    operators = [operator for site in found.sites for operator in site.operators]
    assert not any(operator.raw for operator in operators)
    assert len(operators) == 2 * 6 + 10
    readers = [tuple(o.name.rpartition(".")[2] for o in site.operators) for site in found.sites]
    assert readers.count(("q_proj", "k_proj", "v_proj")) == 3
    # keys and values of every decoder layer read the encoder's output, its queries another tensor
    (cross,) = [site for site in found.sites if any("multihead_attn.k_proj" in o.name for o in site.operators)]
    assert [o.name.rpartition(".")[2] for o in cross.operators] == ["k_proj", "v_proj"]
    folded = {site.name.rpartition(".")[2] for site in found.sites if site.mode == "fold"}
    assert "out_proj" in folded
    assert ("q_proj" in folded) == norm_first
    assert set(rewriting.original(plain.state_dict())) == set(model.state_dict())


def test_a_padded_encoder_is_not_handed_to_the_fused_kernel() -> None:
    model = randomised(nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True), 2))
    plain = private_copy(model)
    rewrite(plain)
    x, padding = torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    seen: list[str] = []
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():  # as in evaluation, where torch would take its fast path
        expected, found = model(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding)
    assert len(seen) == 2 * 6
    torch.testing.assert_close(found[~padding], expected[~padding])


class Own(nn.MultiheadAttention):
    """A subclass that computes something else."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class, and twice of it."""
        return 2 * super().forward(*args, **kwargs)[0]


def shared() -> nn.Module:
    first, second = nn.MultiheadAttention(WIDTH, 2), nn.MultiheadAttention(WIDTH, 2)
    second.in_proj_weight = first.in_proj_weight
    return nn.ModuleList([first, second])


def hooked() -> nn.Module:
    module = nn.MultiheadAttention(WIDTH, 2)
    module.register_forward_hook(lambda _, args, output: (output[0] + 1, output[1]))
    return nn.ModuleList([module])


@pytest.mark.parametrize("make", [lambda: nn.ModuleList([Own(WIDTH, 2)]), shared, hooked])
def test_attention_that_is_more_than_attention_is_left(make: Callable[[], nn.Module]) -> None:
    model = make()
    kept = copy.copy(model._modules)
    rewriting = rewrite(model)
    assert rewriting == Rewriting()
    assert model._modules == kept


def test_one_attention_under_two_names_stays_one() -> None:
    module = nn.MultiheadAttention(WIDTH, 2)
    model = nn.ModuleList([module, module])
    names = set(model.state_dict())
    rewriting = rewrite(model)
    assert model[0] is model[1]
    assert set(rewriting.original(model.state_dict())) == names
