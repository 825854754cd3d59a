"""Several matrices in one tensor: quantized one by one, handed out as the tensor would be, stored and found again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.payload import restore
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.stack import QuantizedStack, Stack, standing_in
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing
from tests.support.plain_forms import fake_quantize_weight, quantize_model
from tests.support.quantized_models import SCHEMES

E, O, D = 3, 4, 6

#: What models do with a tensor of matrices; x (T, D), w (E, O, D).
READS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "one by number": lambda x, w: F.linear(x, w[1]),
    "one by tensor": lambda x, w: F.linear(x, w[torch.tensor(2)]),
    "matmul": lambda x, w: x @ w[0].T,
    "several": lambda x, w: torch.einsum("td,ted->te", x, w[torch.arange(len(x)) % E][:, :E]),
    "slice": lambda x, w: torch.bmm(x[None].expand(2, -1, -1), w[:2].transpose(1, 2)),
    "all": lambda x, w: torch.bmm(x[None].expand(w.shape[0], -1, -1), w.transpose(1, 2)),
    "einsum": lambda x, w: torch.einsum("td,eod->teo", x, w),
    "operator": lambda x, w: x @ w.transpose(1, 2),
    "left operator": lambda x, w: w @ x.T,
    "loop": lambda x, w: torch.stack([F.linear(x, matrix) for matrix in w]),
    "unbound": lambda x, w: torch.stack([F.linear(x, matrix) for matrix in w.unbind(0)]),
    "cast": lambda x, w: F.linear(x.double(), w.to(torch.float64)[0]),
    "times": lambda x, w: torch.as_tensor((2 * w)[0] @ x[0]),
    "sizes": lambda x, w: x.new_full((w.size(0), w.dim()), float(w.numel() + len(w))),
}


def tensor(seed: int = 0) -> Tensor:
    return (
        torch.randn(E, O, D, generator=torch.Generator().manual_seed(seed))
        * torch.tensor([1.0, 30.0, 0.1])[:, None, None]
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("read", READS)
def test_a_stack_answers_like_the_tensor(scheme: Scheme, read: str) -> None:
    x, w = torch.randn(5, D, generator=torch.Generator().manual_seed(1)), tensor()
    use = READS[read]
    assert torch.equal(use(x, Stack(w)), use(x, w))
    rounded = torch.stack([fake_quantize_weight(matrix, scheme) for matrix in w])
    stack = QuantizedStack.quantize(w, scheme=scheme, transposed=False)
    assert torch.equal(stack.dense(), rounded)
    torch.testing.assert_close(use(x, stack), use(x, rounded))
    turned = QuantizedStack.quantize(w.transpose(1, 2), scheme=scheme, transposed=True)
    assert torch.equal(turned.dense(), rounded.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_stack_follows_the_type_of_the_model_and_keeps_its_codes(dtype: torch.dtype) -> None:
    stack = QuantizedStack.quantize(tensor(), scheme=Scheme(weights="fp8", activations="none"), transposed=False)
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    nn.ModuleList([stack]).to(dtype)
    assert stack.dtype == stack[0].dtype == dtype
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())


class Routed(nn.Module):
    """A router and experts in two stacked tensors, one of them stored (in, out); expert 2 never gets a row."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(D), nn.Linear(D, 2)
        self.up, self.down = nn.Parameter(tensor(1)), nn.Parameter(tensor(2))
        self.bias = nn.Parameter(torch.randn(E, O))
        self.head = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, 2)."""
        rows = self.norm(x).reshape(-1, D)
        chosen = self.router(rows).argmax(-1)
        out = torch.zeros_like(rows)
        for expert in chosen.unique():
            picked = torch.where(chosen == expert)[0]
            hidden = torch.relu(F.linear(rows[picked], self.up[expert], self.bias[expert]))
            out.index_add_(0, picked, hidden @ self.down[expert])
        return torch.as_tensor(self.head(x + out.reshape(x.shape)))


def routed() -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = Routed().eval().requires_grad_(False)
    return model, Batch(args=(torch.randn(2, 20, D),))


def stacks(sites: tuple[Site, ...]) -> dict[str, int]:
    return {o.weight: o.stacked for site in sites for o in site.operators if o.stacked}


def test_discovery_knows_a_stack_and_who_else_reads_it() -> None:
    model, batch = routed()
    found = discover(model, batch)
    assert stacks(found.sites) == {"up": E, "down": E}
    assert {weight.name: weight.reason for weight in found.weights}["up"] == ""
    mixed = nn.ModuleDict({"routed": model})

    class Penalized(nn.Module):
        """Also adds up the squares of a stack."""

        def __init__(self) -> None:
            super().__init__()
            self.part = mixed

        def forward(self, x: Tensor) -> Tensor:
            """As the part, and a little more."""
            inner = self.part["routed"]
            return torch.as_tensor(inner(x) + inner.get_parameter("up").square().sum())

    assert stacks(discover(Penalized().eval(), batch).sites) == {"part.routed.down": E}


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(weights="int4", activations="none")], ids=lambda s: s.name)
@pytest.mark.parametrize("experts", [False, True])
def test_a_candidate_with_stacks_has_the_bits_of_the_shipped_model(scheme: Scheme, experts: bool) -> None:
    model, batch = routed()
    pristine = {name: value.clone() for name, value in model.state_dict().items()}
    sites = tuple(s for s in discover(model, batch, experts=experts).sites if any(o.stacked for o in s.operators))
    assert ("fold" in {site.mode for site in sites}) == experts
    smoothings = {
        site.name: Smoothing(scales=torch.linspace(0.5, 3, site.channels)[site.ties])
        for site in sites
        if site.mode == "fold"
    }
    scheme = Scheme(weights=scheme.weights, activations="none")
    shipped = copy.deepcopy(model)
    quantize_model(shipped, sites, smoothings=smoothings, ranges={}, scheme=scheme)
    candidate = CandidateModel(model, sites, {}, scheme)
    for given in ({}, smoothings, {}, smoothings):
        candidate.apply(given)
    with torch.no_grad():
        expected = call(shipped, batch)
        assert torch.equal(call(candidate.model, batch), expected)
        tensors, structure = candidate.payload()
        assert {"up.weight_values", "up.weight_scale", "down.weight_values"} <= set(tensors)
        assert "up" not in tensors
        summary = candidate.summary()
        assert {record.name for record in summary.operators} >= {"up", "down"}
        assert summary.total_bytes == sum(t.nbytes for t in candidate.model.state_dict().values())
        skeleton = routed()[0]
        restored = restore(skeleton, tensors, structure)
        assert torch.equal(call(restored, batch), expected)
    candidate.reset()
    candidate.check_pristine()
    assert list(model.state_dict()) == list(pristine)
    assert all(torch.equal(value, pristine[name]) for name, value in model.state_dict().items())
    smaller = {n: t.numel() * t.element_size() for n, t in tensors.items() if n.startswith("up.")}
    assert sum(smaller.values()) < pristine["up"].nbytes / 2


def test_what_stands_in_is_taken_back_whatever_happens() -> None:
    model, batch = routed()
    before, names = call(model, batch), list(model.state_dict())
    seen = []

    def stop() -> None:
        with standing_in(model, {"up": Stack(model.get_parameter("up"))}):
            seen.append(isinstance(model.up, Stack))
            assert torch.equal(call(model, batch), before)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert seen == [True]
    assert isinstance(model.up, nn.Parameter)
    assert list(model.state_dict()) == names


def architecture(name: str) -> nn.Module:
    import transformers as T

    common: dict[str, Any] = {
        "vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "use_cache": False,
    }  # fmt: skip
    made: Any = {
        "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**common, num_local_experts=3)),
        "qwen": lambda: T.Qwen3MoeForCausalLM(
            T.Qwen3MoeConfig(**common, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
        ),
        "gpt-oss": lambda: T.GptOssForCausalLM(T.GptOssConfig(**common, num_local_experts=3, num_experts_per_tok=2)),
    }[name]()
    made.set_attn_implementation("eager")
    made.set_experts_implementation("eager")
    model: nn.Module = made.eval()
    return model


@pytest.mark.parametrize("name", ["mixtral", "qwen", "gpt-oss"])
def test_experts_of_transformers_are_stacks(name: str) -> None:
    torch.manual_seed(0)
    model = architecture(name)
    batch = Batch(kwargs={"input_ids": torch.randint(30, (2, 9))})
    sites = discover(model, batch).sites
    assert set(stacks(sites)) == {f"model.layers.0.mlp.experts.{leaf}_proj" for leaf in ("gate_up", "down")}
    before = main_output(call(model, batch)).detach()
    alone = tuple(site for site in sites if all(o.stacked or o.raw for o in site.operators))
    shipped = copy.deepcopy(model)
    quantize_model(shipped, alone, smoothings={}, ranges={}, scheme=Scheme(activations="none"))
    after = main_output(call(shipped, batch)).detach()
    assert 0 < float((after - before).norm() / before.norm()) < 0.05
