"""Small sites of every kind the objective has to score, and the schemes it scores them under."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import settings

from alphasmith.objectives.calibration.site_data import SiteData, SitePart
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import ChannelRange, Smoothing

#: A shared machine may stall any single example, so no deadline; fewer examples keep each file at seconds.
relaxed = settings(deadline=None, max_examples=60)

#: Every combination of formats and granularities; group size 3 leaves a ragged last group in most shapes.
SCHEMES = tuple(
    Scheme.parse(f"w{weights}a{activations}-{granularity}{tail}")
    for weights, activations, tails in (
        ("8", "8", ("-static", "-token")),
        ("4", "8", ("-static", "-token")),
        ("8", "u8", ("-static", "-token")),
        ("4", "u8", ("-static", "-token")),
        ("8", "i16", ("-static",)),
        ("4", "i16", ("-static",)),
        ("fp8", "fp8", ("-static", "-token")),
        ("8", "16", ("",)),
        ("4", "16", ("",)),
        ("fp8", "16", ("",)),
    )
    for granularity in ("tensor", "channel", "g3")
    for tail in tails
)

#: Those that a kernel with saturation, or 7 bits, makes a difference to.
SATURATING = tuple(
    Scheme.parse(f"w{weights}a{activations}-{granularity}-{ranges}-pairs16")
    for weights in ("8", "7")
    for activations in ("8", "u8")
    for granularity in ("tensor", "channel")
    for ranges in ("static", "token")
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
    skew: float,
) -> SitePart:
    x = torch.randn(rows, channels * kernel, generator=generator)
    x = x * (spread * torch.randn(channels, generator=generator)).exp().repeat_interleave(kernel)
    if skew:
        x += (skew * torch.randn(channels, generator=generator)).repeat_interleave(kernel)
    x[torch.rand(x.shape, generator=generator) < 0.1] = 0.0
    weight = torch.randn(sum(out_features), channels * kernel // groups, generator=generator)
    sample = sample_low = sample_high = None
    channel = torch.arange(channels).repeat_interleave(kernel)
    if kernel > 1:
        samples = 2
        sample = torch.randint(samples, (rows,), generator=generator)
        # A sample has pixels that were not drawn as patches, and padding, so its range is at least theirs and holds 0.
        by_channel = x.view(rows, channels, kernel)
        index = sample[:, None].expand(rows, channels)
        margin = torch.rand(samples, channels, generator=generator) * 0.1
        sample_low = (-margin).scatter_reduce(0, index, by_channel.amin(2), reduce="amin")
        sample_high = margin.scatter_reduce(0, index, by_channel.amax(2), reduce="amax")
    return SitePart(
        operators=tuple(f"operator{i}" for i in range(len(out_features))),
        x=x,
        weight=weight,
        out_features=tuple(out_features),
        channel=channel,
        groups=groups,
        sample=sample,
        sample_low=sample_low,
        sample_high=sample_high,
    )


def site_of(*parts: SitePart, ties: torch.Tensor | None = None, held_out: float = 1.0) -> SiteData:
    """A site with abs-max statistics of its parts; ``held_out`` below 1 leaves rows beyond the calibrated range."""
    channels = int(parts[0].channel.max()) + 1
    low, high, weight_absmax = (
        torch.full((channels,), torch.inf),
        torch.full((channels,), -torch.inf),
        torch.zeros(channels),
    )
    for part in parts:
        low = low.scatter_reduce(0, part.channel, part.x.amin(0), reduce="amin")
        high = high.scatter_reduce(0, part.channel, part.x.amax(0), reduce="amax")
        row = 0
        for features in part.out_features:
            per_block = part.weight[row : row + features].view(part.groups, features // part.groups, -1)
            columns = per_block.abs().amax(1).reshape(-1)
            weight_absmax = weight_absmax.scatter_reduce(0, part.channel, columns, reduce="amax")
            row += features
    return SiteData(
        name="site",
        parts=parts,
        activation_statistics={"absmax": ChannelRange(low, high).peaks()},
        input_range=ChannelRange(*_narrowed(low, high, held_out)),
        weight_absmax=weight_absmax,
        ties=torch.arange(channels) if ties is None else ties,
    )


def _narrowed(low: torch.Tensor, high: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Each range about its own middle; for ``factor`` 1 the same bits."""
    cut = (high - low) * ((1 - factor) / 2)
    return low + cut, high - cut


def small_site(
    kind: str, seed: int, width: int = 1, held_out: float = 0.9, spread: float = 1.0, skew: float = 0.0
) -> SiteData:
    """A site of a few rows, ``4 * width`` channels of lognormal size and a few outputs; some rows lie beyond the calibrated range.

    ``skew`` gives every channel a mean of its own, with this standard deviation.
    """
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
            generator,
            rows * width,
            4 * width,
            kernel,
            tuple(width * features for features in outputs),
            groups,
            spread,
            skew,
        )
        for rows, kernel, outputs, groups in shapes[kind]
    ]
    return site_of(*parts, held_out=held_out)


def identity(data: SiteData) -> Smoothing:
    """The candidate that changes nothing."""
    return Smoothing(scales=torch.ones(data.channels))


def outlier_layer(
    seed: int, rows: int = 256, channels: int = 256, outputs: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, C) with lognormal channels, 2 % of them 30 times larger, and w (O, C) with mildly lognormal columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator) * torch.randn(channels, generator=generator).exp()
    x[:, torch.randperm(channels, generator=generator)[: max(1, channels // 50)]] *= 30
    w = torch.randn(outputs, channels, generator=generator) * (0.5 * torch.randn(channels, generator=generator)).exp()
    return x, 0.02 * w
