"""Small models whose sites are written out by hand, so that these tests depend on no discovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from alphasmith.objectives.literals import SiteMode
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.types import Operator, ParameterEdit, Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing

SCHEMES = [
    Scheme(),
    Scheme(weight_granularity="tensor"),
    Scheme(activation_granularity="token"),
    Scheme(weights="int4", activation_granularity="token"),
    Scheme(weights="int4", weight_granularity="group", group_size=4),
    Scheme(weight_granularity="group", group_size=5, activations="none"),
    Scheme(activations="uint8"),
    Scheme(weights="int4", activations="uint8", activation_granularity="token"),
    Scheme(activations="int16"),
    Scheme(weights="fp8", activations="fp8"),
    Scheme(weights="fp8", weight_granularity="tensor", activations="fp8", activation_granularity="token"),
]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A float model, its sites, random smoothings for the sites that take them, calibrated ranges and data."""

    model: nn.Module
    sites: tuple[Site, ...]
    smoothings: dict[str, Smoothing]
    ranges: dict[str, ChannelRange]
    batches: tuple[Batch, ...]


class Block(nn.Module):
    """norm -> (q, k); relu(q) -> down (foldable); gelu(k) -> out (explicit); sum -> head (Conv1D, explicit)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(9)
        self.q = nn.Linear(9, 7)
        self.k = nn.Linear(9, 11, bias=False)
        self.down = nn.Linear(7, 6)
        self.out = nn.Linear(11, 6)
        self.head = Conv1D(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y: Tensor = self.down(torch.relu(self.q(h))) + self.out(functional.gelu(self.k(h)))
        return torch.as_tensor(self.head(y))


class PaddedConv2d(nn.Conv2d):
    """A convolution that pads in a forward of its own, as image models ported from other frameworks do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.pad(input, (1, 1, 1, 1)))


class Pixels(nn.Module):
    """conv -> relu -> grouped conv that pads itself (foldable) -> 1-d conv over flattened space (explicit)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = PaddedConv2d(8, 6, 3, groups=2, stride=2)
        self.third = nn.Conv1d(6, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return torch.as_tensor(self.third(functional.silu(y).flatten(2)))


def operator(model: nn.Module, name: str) -> Operator:
    """The record discovery would make of a module of ``model``."""
    module = model.get_submodule(name)
    weight = module.get_parameter("weight")
    transposed = isinstance(module, Conv1D)
    conv = weight.dim() > 2
    groups = module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 1
    return Operator(
        name=name,
        weight=f"{name}.weight",
        bias=f"{name}.bias" if getattr(module, "bias", None) is not None else None,
        kind="conv" if conv else "linear",
        transposed=transposed,
        raw=False,
        in_channels=weight.shape[0] if transposed else weight.shape[1] * groups,
        out_channels=weight.shape[1] if transposed else weight.shape[0],
        kernel=tuple(weight.shape[2:]) if conv else (),
        groups=groups,
        plain=not isinstance(module, PaddedConv2d),
    )


def grow(model: nn.Module, name: str) -> ParameterEdit:
    """The consumer edit of a module: its weight grows with s along input channels."""
    record = operator(model, name)
    weight = model.get_parameter(record.weight)
    if record.transposed:
        channel = torch.arange(record.in_channels)[:, None]
    elif record.kind == "linear":
        channel = torch.arange(record.in_channels)[None, :]
    else:
        per_group = record.in_channels // record.groups
        block = torch.arange(record.out_channels) // (record.out_channels // record.groups)
        channel = (block[:, None] * per_group + torch.arange(per_group)[None, :]).reshape(
            record.out_channels, per_group, *[1] * len(record.kernel)
        )
    return ParameterEdit(parameter=record.weight, channel=channel.expand(weight.shape), power=1)


def shrink(model: nn.Module, parameter: str) -> ParameterEdit:
    """The producer edit of a parameter whose first dimension is the site's channel."""
    value = model.get_parameter(parameter)
    channel = torch.arange(value.shape[0]).reshape(-1, *[1] * (value.dim() - 1))
    return ParameterEdit(parameter=parameter, channel=channel.expand(value.shape), power=-1)


def site(
    model: nn.Module, operators: Sequence[str], mode: SiteMode, producers: Sequence[str] = (), reason: str = ""
) -> Site:
    """A site read by ``operators``; ``producers`` are the parameters that absorb 1/s."""
    records = tuple(operator(model, name) for name in operators)
    edits = [grow(model, name) for name in operators] + [shrink(model, name) for name in producers]
    return Site(
        name=operators[0],
        operators=records,
        channels=records[0].in_channels,
        mode=mode,
        reason=reason,
        ties=torch.arange(records[0].in_channels),
        edits=() if mode == "left" else tuple(edits),
        producers=tuple(dict.fromkeys(name.rpartition(".")[0] for name in producers)),
    )


def block_example(seed: int = 0, dtype: torch.dtype = torch.float32) -> Example:
    """Linear operators: folded into a norm and through a ReLU, explicit, and Conv1D."""
    model = _randomised(Block(), seed).to(dtype)
    sites = (
        site(model, ("q", "k"), "fold", ("norm.weight", "norm.bias")),
        site(model, ("down",), "fold", ("q.weight", "q.bias")),
        site(model, ("out",), "explicit", reason="gelu"),
        site(model, ("head",), "explicit", reason="sum"),
    )
    generator = torch.Generator().manual_seed(seed + 1)
    batches = tuple(Batch(args=(torch.randn(3, 4, 9, generator=generator).to(dtype),)) for _ in range(2))
    return _example(model, sites, batches, generator)


class Feed(nn.Module):
    """x -> x + down(gelu(up(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return torch.as_tensor(x + scale * self.down(functional.gelu(self.up(x))))


class Chain(nn.Module):
    """start -> blocks of a list -> out."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.start = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Feed() for _ in range(count))
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        for block in self.blocks:
            h = block(h, scale=0.5)
        return torch.as_tensor(self.out(h))


def chain_example(count: int = 6, seed: int = 0) -> Example:
    """A chain of equal blocks, all sites explicit."""
    model = _randomised(Chain(count), seed)
    names = ["start", *(f"blocks.{i}.{part}" for i in range(count) for part in ("up", "down")), "out"]
    sites = tuple(site(model, (name,), "explicit", reason="sum") for name in names)
    generator = torch.Generator().manual_seed(seed + 1)
    batches = tuple(Batch(args=(torch.randn(2, 40, 6, generator=generator),)) for _ in range(2))
    return _example(model, sites, batches, generator)


def pixels_example(seed: int = 0) -> Example:
    """Convolutions: grouped with its own padding, folded through a ReLU; explicit in two and one dimensions."""
    model = _randomised(Pixels(), seed)
    sites = (
        site(model, ("first",), "explicit", reason="input"),
        site(model, ("second",), "fold", ("first.weight", "first.bias")),
        site(model, ("third",), "explicit", reason="silu"),
    )
    generator = torch.Generator().manual_seed(seed + 1)
    batches = tuple(Batch(args=(torch.randn(3, 3, 6, 5, generator=generator),)) for _ in range(2))
    return _example(model, sites, batches, generator)


def _randomised(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    return model.eval().requires_grad_(False)


def _example(
    model: nn.Module, sites: tuple[Site, ...], batches: tuple[Batch, ...], generator: torch.Generator
) -> Example:
    smoothings = {
        s.name: Smoothing(scales=torch.exp2(torch.rand(s.channels, generator=generator) * 4 - 2)) for s in sites
    }
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for found in sites:
        axis = -1 if found.operators[0].kind == "linear" else 1

        def record(_: nn.Module, args: tuple[Tensor, ...], name: str = found.name, axis: int = axis) -> None:
            seen.setdefault(name, []).append(args[0].detach().float().movedim(axis, -1).flatten(0, -2))

        handles.append(model.get_submodule(found.name).register_forward_pre_hook(record))
    for batch in batches:
        model(*batch.args)
    for handle in handles:
        handle.remove()
    ranges = {}
    for found in sites:
        rows = torch.cat(seen[found.name])
        low, high = rows.amin(0), rows.amax(0)
        padded = found.operators[0].kind == "conv"  # zeros may be read around the edges
        ranges[found.name] = ChannelRange(low.clamp_max(0), high.clamp_min(0)) if padded else ChannelRange(low, high)
    return Example(model=model, sites=sites, smoothings=smoothings, ranges=ranges, batches=batches)


def shifted(made: Example) -> Example:
    """The same example, with the middle of every range as the shift of every site that takes one."""
    smoothings = {}
    for found in made.sites:
        smoothing = made.smoothings[found.name]
        middle = made.ranges[found.name].middle(found.ties)
        smoothings[found.name] = replace(smoothing, shift=middle) if found.shiftable else smoothing
    return replace(made, smoothings=smoothings)
