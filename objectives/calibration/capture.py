"""Capture of operator inputs while a model runs, in bounded memory.

Shapes: X (T, C) rows of a site, C channels, D columns of a part (C for linear, C * kernel volume for convolutions), S samples.
Padded positions are dropped before anything is counted. Source: claim A-1.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.calibration.patches import ConvolutionTap, Window, gather_patches, kept_positions, pads
from alphasmith.objectives.calibration.statistics import ChannelStatistics, RowReservoir, SampleExtremes, priorities
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites.types import Operator, Site

_STANDARD_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


@dataclass(frozen=True, kw_only=True)
class PartLayout:
    """Operators of a site that read the same rows, before any data is seen.

    Attributes:
        operators: In forward order; none is raw. The first one is watched during calibration.
        kernel_volume: Elements of the kernel, 1 for linear; D = C * kernel_volume.
    """

    operators: tuple[Operator, ...]
    kernel_volume: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the operators."""
        return tuple(operator.name for operator in self.operators)

    @property
    def columns(self) -> int:
        """D."""
        return self.operators[0].in_channels * self.kernel_volume

    @property
    def is_convolution(self) -> bool:
        """Whether rows are patches."""
        return self.operators[0].kind == "conv"


@dataclass(frozen=True, kw_only=True)
class PartRows:
    """Sampled rows of one part; every prefix is a random subset.

    Attributes:
        operators: Names of the operators that read them.
        x: (T, D) float32 on the CPU.
        kernel_volume: Columns per channel.
        sample: (T,) int64 row of ``sample_low`` each patch was cut from, None for linear.
        sample_low: (S, C) float32 smallest value per channel of every sampled input of the convolution, at most 0 where it
            pads with zeros; None for linear.
        sample_high: (S, C) float32 likewise the largest value, at least 0 where it pads with zeros.
        row_weight: (T,) float32 what an error in each row counts at the model's output; None: not known, all alike.
        output_weight: (O,) float32 likewise at each output of the operators.
    """

    operators: tuple[str, ...]
    x: torch.Tensor
    kernel_volume: int
    sample: torch.Tensor | None = None
    sample_low: torch.Tensor | None = None
    sample_high: torch.Tensor | None = None
    row_weight: torch.Tensor | None = None
    output_weight: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SiteRecord:
    """What calibration saw at one site.

    Attributes:
        low: (C,) float32 smallest value over all rows, exact; at most 0 where a convolution pads with zeros.
        high: (C,) float32 largest value; at least 0 where a convolution pads with zeros.
        rms: (C,) float32 over all rows, without padded zeros.
        percentile: (C,) float32 percentile of the magnitudes, None unless it was asked for.
        rows_seen: Unpadded rows (positions, for convolutions) that passed.
        parts: One per set of operators that read the same rows.
        tops: (2, k, C) float32: see ``SampleExtremes.tops``; None where it is not known which rows are of one sample.
        samples_seen: Samples that these are the extremes of.
    """

    low: torch.Tensor
    high: torch.Tensor
    rms: torch.Tensor
    percentile: torch.Tensor | None
    rows_seen: int
    parts: tuple[PartRows, ...]
    tops: torch.Tensor | None = None
    samples_seen: int = 0

    @property
    def absmax(self) -> torch.Tensor:
        """(C,) float32 largest magnitude over all rows."""
        return torch.maximum(self.high, -self.low)


def part_layouts(model: nn.Module, site: Site) -> tuple[PartLayout, ...]:
    """How the non-raw operators of a site share rows, in forward order of each part's first operator.

    Linear operators share one part. Convolutions share one if they are dense, plain ``nn.Conv`` modules of the same geometry.

    Raises:
        InputError: An operator is no module of ``model``.
    """
    shared: dict[tuple[object, ...], list[Operator]] = {}
    for operator in site.operators:
        if operator.raw:
            continue
        key: tuple[object, ...] = ("linear",)
        if operator.kind == "conv":
            module = _module(model, operator)
            plain = type(module).forward in _STANDARD_FORWARDS and "forward" not in vars(module)
            key = ("conv", operator.name)
            if plain and operator.groups == 1:
                key = (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
        shared.setdefault(key, []).append(operator)
    return tuple(
        PartLayout(operators=tuple(operators), kernel_volume=math.prod(operators[0].kernel))
        for operators in shared.values()
    )


class CurrentBatch:
    """What is known of the batch that is running.

    Attributes:
        number: Of the batch, from 0.
        first: Number of its first sample.
        size: Samples in it.
        mask: Its padding mask, or None.
    """

    def __init__(self) -> None:
        self.number = 0
        self.first = 0
        self.size = 1
        self.mask: torch.Tensor | None = None

    def start(self, batch: Batch) -> None:
        """A batch begins."""
        self.size = batch.size
        self.mask = None if batch.mask is None else batch.mask.bool()

    def end(self) -> None:
        """The batch is done."""
        self.number += 1
        self.first += self.size


class RowNames:
    """Who the rows of one part are: the sample each came from, and its place in that sample.

    An operator that runs several times in a forward names its rows by the call, too. Rows of unknown samples, such as the
    tokens that were routed to an expert, are named by the order in which they come.

    Args:
        seed: Of the part.
    """

    #: Rows of one sample in one call at most.
    _CALL = 2**40

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._batch = -1
        self._calls = 0
        self._unknown = 0

    def priorities(self, shape: tuple[int, ...], current: CurrentBatch) -> torch.Tensor:
        """Priorities of the rows of a tensor, by the sample they came from.

        Args:
            shape: (...) leading dimensions of the tensor: one row for every index.
            current: The batch that is running.
        """
        if current.number != self._batch:
            self._batch, self._calls = current.number, 0
        count, size = math.prod(shape), current.size
        if not shape or count % size or not count:
            places = torch.arange(self._unknown, self._unknown + count)
            self._unknown += count
            return priorities(self._seed, torch.full((count,), -1), places)
        # Samples are the first dimension; the second one where time is the first; else they are flattened in the first.
        timed = len(shape) > 1 and shape[0] != size and shape[1] == size
        grid = (shape[0], size, -1) if timed else (1, size, -1)
        own = torch.arange(size).view(1, size, 1)
        rest = count // size // grid[0]
        step = torch.arange(grid[0]).view(-1, 1, 1) * rest + torch.arange(rest).view(1, 1, rest)
        samples = (current.first + own).expand(grid[0], size, rest).reshape(-1)
        places = (self._calls * self._CALL + step).expand(grid[0], size, rest).reshape(-1)
        self._calls += 1
        return priorities(self._seed, samples, places)


class PartWatch:
    """Rows of one part while calibration runs."""

    def __init__(self, layout: PartLayout, reservoir: RowReservoir, names: RowNames) -> None:
        self.layout = layout
        self.reservoir = reservoir
        self.names = names
        self._samples = 0
        self._ids = torch.empty(0, dtype=torch.int64)
        self._low = torch.empty(0, layout.operators[0].in_channels)
        self._high = self._low

    @property
    def operator(self) -> str:
        """Name of the operator that is watched."""
        return self.layout.operators[0].name

    def patches(self, x: torch.Tensor, window: Window, keep: torch.Tensor | None, current: CurrentBatch) -> None:
        """Offer the patches of x (B, C, *S); keep (B, *S) bool masks padding."""
        spatial = window.output_size(x.shape[2:])
        per_sample = math.prod(spatial)
        if keep is None:
            positions = torch.arange(x.shape[0] * per_sample)
        else:
            positions = kept_positions(keep, window).flatten().nonzero().flatten().cpu()
        ids = self._samples + positions // max(per_sample, 1)
        ranks = self.names.priorities((x.shape[0] * per_sample,), current)[positions]
        entered = self.reservoir.offer(ranks, lambda i: gather_patches(x, window, positions[i]), ids)
        if entered:
            # Only samples that some kept patch was cut from need their range: at most one per row of the reservoir.
            everyone = torch.cat([self._ids, torch.arange(self._samples, self._samples + x.shape[0])])
            needed = torch.isin(everyone, self.reservoir.tags)
            flat = x.flatten(2)
            low, high = (edge.to(device="cpu", dtype=torch.float32) for edge in (flat.amin(dim=2), flat.amax(dim=2)))
            if pads(window):  # zeros around the edges are read, and shifted, like any other value
                low, high = low.clamp_max(0), high.clamp_min(0)
            self._ids = everyone[needed]
            self._low = torch.cat([self._low, low])[needed]
            self._high = torch.cat([self._high, high])[needed]
        self._samples += x.shape[0]

    def rows(self) -> PartRows:
        """The sample drawn so far."""
        convolution = self.layout.is_convolution
        return PartRows(
            operators=self.layout.names,
            x=self.reservoir.rows,
            kernel_volume=self.layout.kernel_volume,
            sample=torch.searchsorted(self._ids, self.reservoir.tags) if convolution else None,
            sample_low=self._low if convolution else None,
            sample_high=self._high if convolution else None,
        )


class SiteWatch:
    """Statistics and parts of one site while calibration runs."""

    def __init__(self, name: str, statistics: ChannelStatistics, parts: list[PartWatch]) -> None:
        self.name = name
        self.statistics = statistics
        self.parts = parts
        self._extremes: SampleExtremes | None = SampleExtremes(statistics.channels)
        self._padded = False
        self._last: tuple[weakref.ref[torch.Tensor], int] | None = None

    def is_new(self, x: torch.Tensor) -> bool:
        """False if x is the tensor another part of this site has just read: its values count once."""
        if x.is_inference():  # has no version counter, so that an edit in place could not be told
            return True
        known = self._last is not None and self._last[0]() is x and self._last[1] == x._version
        self._last = (weakref.ref(x), x._version)
        return not known

    def linear(self, part: PartWatch, x: torch.Tensor, current: CurrentBatch) -> None:
        """Take in the input (..., C) of a linear operator."""
        rows, mask = x.reshape(-1, x.shape[-1]), current.mask
        ranks = part.names.priorities(tuple(x.shape[:-1]), current)
        if mask is not None and (x.shape[:-1] == mask.shape or x.shape[:-1] == (mask.numel(),)):
            rows, ranks = rows[mask.flatten()], ranks[mask.flatten().cpu()]
        if self.is_new(x):
            self.statistics.update(rows)
            samples = _by_sample(x, current)
            padded = mask is not None and samples is not None and rows.shape[0] != samples.shape[:2].numel()
            keep = mask.reshape(samples.shape[:2]) if padded and mask is not None and samples is not None else None
            self._reach(samples, keep)
        part.reservoir.update(rows, ranks)

    def convolution(self, part: PartWatch, x: torch.Tensor, window: Window, current: CurrentBatch) -> None:
        """Take in what a convolution reads, (B, C, *S)."""
        mask = current.mask
        keep = mask if mask is not None and mask.shape == (x.shape[0], *x.shape[2:]) else None
        if self.is_new(x):
            for b in range(x.shape[0]):
                positions = x[b].flatten(1).T
                self.statistics.update(positions if keep is None else positions[keep[b].flatten()])
            self._reach(x.flatten(2).mT, None if keep is None else keep.flatten(1))
        self._padded = self._padded or pads(window)
        part.patches(x, window, keep, current)

    def record(self, percentile: float | None) -> SiteRecord:
        """What was seen so far, on the CPU."""
        low, high = self.statistics.minimum.cpu(), self.statistics.maximum.cpu()
        return SiteRecord(
            low=low.clamp_max(0) if self._padded else low,
            high=high.clamp_min(0) if self._padded else high,
            rms=self.statistics.rms.cpu(),
            percentile=None if percentile is None else self.statistics.percentile(percentile).cpu(),
            rows_seen=self.statistics.count,
            parts=tuple(part.rows() for part in self.parts),
            tops=None if self._extremes is None else self._extremes.tops,
            samples_seen=0 if self._extremes is None else self._extremes.seen,
        )

    def _reach(self, samples: torch.Tensor | None, keep: torch.Tensor | None) -> None:
        """Take in how far samples (B, L, C) reach; keep (B, L) masks padding. Without samples once, there are none for good."""
        if samples is None or self._extremes is None:
            self._extremes = None
            return
        if keep is None:
            self._extremes.update(samples.amax(dim=1), samples.amin(dim=1))
        else:
            padding = ~keep.to(samples.device).unsqueeze(2)
            high, low = (samples.masked_fill(padding, bound) for bound in (-math.inf, math.inf))
            self._extremes.update(high.amax(dim=1), low.amin(dim=1))


def _by_sample(x: torch.Tensor, current: CurrentBatch) -> torch.Tensor | None:
    """(B, L, C) the rows of every sample in x (..., C), as ``RowNames`` tells them apart; None where it cannot."""
    shape, size = x.shape[:-1], current.size
    count = shape.numel()
    if not shape or count % size or not count:
        return None
    if len(shape) > 1 and shape[0] != size and shape[1] == size:  # time is the first dimension
        x = x.transpose(0, 1)
    return x.reshape(size, -1, x.shape[-1])


def unwatchable(site: Site) -> str:
    """Why no data of a site can be captured; empty if it can."""
    owned = [operator for operator in site.operators if not operator.raw]
    if not owned:
        return "all its operators use their weights through functional calls"
    for operator in owned:
        if operator.in_channels != site.channels:
            return f"operator {operator.name} reads {operator.in_channels} channels, the site has {site.channels}"
    return ""


def part_seed(seed: int, site: str, part: int) -> int:
    """Seed of one part; a digest of its name makes it independent of the other sites."""
    digest = hashlib.sha256(f"{seed}/{site}/{part}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, with every module's own training flag restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def watching(model: nn.Module, watch: SiteWatch, part: PartWatch, current: CurrentBatch) -> Iterator[None]:
    """Show the inputs of a part's first operator to its site; the module is left as it was."""
    module = _module(model, part.layout.operators[0])
    if not part.layout.is_convolution:

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            with _naming(part.operator, current):
                watch.linear(part, x, current)

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        return

    def seen(x: torch.Tensor, window: Window) -> None:
        with _naming(part.operator, current):
            watch.convolution(part, x, window, current)

    weight = torch.as_tensor(module.weight)
    inner, own = module.forward, "forward" in vars(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with ConvolutionTap(weight, seen):
            return inner(*args, **kwargs)

    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own:
            vars(module)["forward"] = inner
        else:
            del vars(module)["forward"]


@contextmanager
def _naming(operator: str, current: CurrentBatch) -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        raise InputError(
            f"activations of {operator}",
            f"{error} (batch {current.number})",
            "remove the offending samples, or load the model in float32",
        ) from error


def _module(model: nn.Module, operator: Operator) -> nn.Module:
    try:
        return model.get_submodule(operator.name)
    except AttributeError as error:
        raise InputError(
            f"operator {operator.name}", "is no module of the model", "pass the sites of one discovery and its model"
        ) from error
