"""Small sites of every kind the objective has to score, and the schemes it scores them under."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import settings

from alphasmith.objectives.scheme import Scheme
from alphasmith.objectives.site_data import SiteData, SitePart

#: A shared machine may stall any single example, so no deadline; fewer examples keep each file at seconds.
relaxed = settings(deadline=None, max_examples=60)

#: Every combination of formats and granularities; group size 3 leaves a ragged last group in most shapes.
SCHEMES = tuple(
    Scheme.parse(f"w{weights}a{activations}-{granularity}{tail}")
    for weights, activations in (("8", "8"), ("4", "8"), ("fp8", "fp8"), ("8", "16"), ("4", "16"), ("fp8", "16"))
    for granularity in ("tensor", "channel", "g3")
    for tail in (("",) if activations == "16" else ("-static", "-token"))
)

KINDS = ("linear", "shared", "conv", "grouped", "depthwise", "two_parts")


def _part(
    generator: torch.Generator,
    rows: int,
    channels: int,
    kernel: int,
    out_features: Sequence[int],
    groups: int,
    spread: float,
) -> SitePart:
    x = torch.randn(rows, channels * kernel, generator=generator)
    x = x * (spread * torch.randn(channels, generator=generator)).exp().repeat_interleave(kernel)
    x[torch.rand(x.shape, generator=generator) < 0.1] = 0.0
    weight = torch.randn(sum(out_features), channels * kernel // groups, generator=generator)
    sample = sample_absmax = None
    channel = torch.arange(channels).repeat_interleave(kernel)
    if kernel > 1:
        samples = 2
        sample = torch.randint(samples, (rows,), generator=generator)
        # A sample has pixels that were not drawn as patches, so its range is at least theirs.
        by_channel = x.abs().view(rows, channels, kernel).amax(2)
        sample_absmax = torch.rand(samples, channels, generator=generator) * 0.1
        sample_absmax = sample_absmax.scatter_reduce(
            0, sample[:, None].expand_as(by_channel), by_channel, reduce="amax"
        )
    return SitePart(
        operators=tuple(f"operator{i}" for i in range(len(out_features))),
        x=x,
        weight=weight,
        out_features=tuple(out_features),
        channel=channel,
        groups=groups,
        sample=sample,
        sample_absmax=sample_absmax,
    )


def site_of(*parts: SitePart, ties: torch.Tensor | None = None, held_out: float = 1.0) -> SiteData:
    """A site with abs-max statistics of its parts; ``held_out`` below 1 leaves rows beyond the calibrated range."""
    channels = int(parts[0].channel.max()) + 1
    absmax, weight_absmax = torch.zeros(channels), torch.zeros(channels)
    for part in parts:
        absmax = absmax.scatter_reduce(0, part.channel, part.x.abs().amax(0), reduce="amax")
        row = 0
        for features in part.out_features:
            per_block = part.weight[row : row + features].view(part.groups, features // part.groups, -1)
            columns = per_block.abs().amax(1).reshape(-1)
            weight_absmax = weight_absmax.scatter_reduce(0, part.channel, columns, reduce="amax")
            row += features
    return SiteData(
        name="site",
        parts=parts,
        activation_statistic=absmax,
        activation_absmax=absmax * held_out,
        weight_absmax=weight_absmax,
        ties=torch.arange(channels) if ties is None else ties,
    )


def small_site(kind: str, seed: int, width: int = 1, held_out: float = 0.9, spread: float = 1.0) -> SiteData:
    """A site of a few rows, ``4 * width`` channels of lognormal size and a few outputs; some rows lie beyond the calibrated range."""
    generator = torch.Generator().manual_seed(seed)
    # rows, kernel, rows of each operator, convolution groups of every part
    shapes: dict[str, tuple[tuple[int, int, tuple[int, ...], int], ...]] = {
        "linear": ((5, 1, (3,), 1),),
        "shared": ((5, 1, (3, 2), 1),),
        "conv": ((4, 3, (3,), 1),),
        "grouped": ((4, 3, (4, 2), 2),),
        "depthwise": ((4, 3, (4,), 4 * width),),
        "two_parts": ((4, 3, (2,), 1), (7, 2, (4,), 2)),
    }
    parts = [
        _part(
            generator, rows * width, 4 * width, kernel, tuple(width * features for features in outputs), groups, spread
        )
        for rows, kernel, outputs, groups in shapes[kind]
    ]
    return site_of(*parts, held_out=held_out)


def outlier_layer(
    seed: int, rows: int = 256, channels: int = 256, outputs: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, C) with lognormal channels, 2 % of them 30 times larger, and w (O, C) with mildly lognormal columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator) * torch.randn(channels, generator=generator).exp()
    x[:, torch.randperm(channels, generator=generator)[: max(1, channels // 50)]] *= 30
    w = torch.randn(outputs, channels, generator=generator) * (0.5 * torch.randn(channels, generator=generator)).exp()
    return x, 0.02 * w
