"""Calibration in bounded memory: statistics of every channel and a fixed number of rows per site.

Shapes: X (T, C) rows of a site, C channels, D columns of a part (C for linear, C * kernel volume for convolutions), S samples.
Sources: claim A-1 (a_j over all samples), trap T7. Percentile and RMS withstand single outlier tokens, padding is left out
of every statistic, and sites that no row reached (experts without tokens) have none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import nn

from alphasmith.objectives.calibration.capture import (
    CurrentBatch,
    PartRows,
    PartWatch,
    RowNames,
    SiteRecord,
    SiteWatch,
    evaluating,
    part_layouts,
    part_seed,
    unwatchable,
    watching,
)
from alphasmith.objectives.calibration.site_data import ProducerRows, SiteData, SitePart
from alphasmith.objectives.calibration.statistics import ChannelStatistics, RowReservoir
from alphasmith.objectives.calibration.weight_matrix import as_matrix
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.literals import ChannelStatistic
from alphasmith.objectives.media.batch import Batch, call, data_errors
from alphasmith.objectives.sites.types import Operator, Site
from alphasmith.objectives.smoothing import ChannelRange

_STATE_VERSION = 2
#: Tensors of a part beside its rows; those that are not there mean None.
_OF_ROWS = ("sample", "sample_low", "sample_high", "row_weight", "output_weight")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Statistics and rows of every site that calibration data reached.

    Attributes:
        sites: Site name -> record.
        missing: Site name -> reason why it has no record.
        statistics: The statistics that ``SiteData.activation_statistics`` carries, the default first.
        percentile: Percent of the statistic ``percentile``.
    """

    sites: Mapping[str, SiteRecord]
    missing: Mapping[str, str]
    statistics: tuple[ChannelStatistic, ...]
    percentile: float

    @property
    def rows_seen(self) -> dict[str, int]:
        """Site name -> unpadded rows that passed, 0 for missing sites."""
        return {name: record.rows_seen for name, record in self.sites.items()} | dict.fromkeys(self.missing, 0)

    def record(self, site: Site | str) -> SiteRecord:
        """Record of a site.

        Raises:
            InputError: The site has none; the message says why.
        """
        name = site if isinstance(site, str) else site.name
        if name not in self.sites:
            reason = self.missing.get(name, "it was not calibrated")
            raise InputError(f"site {name}", f"has no calibration rows: {reason}", "leave it out of the search")
        return self.sites[name]

    def input_range(self, site: Site | str) -> ChannelRange:
        """Range of every channel of a site over all calibration data: its static quantization range."""
        record = self.record(site)
        return ChannelRange(record.low.clone(), record.high.clone())

    def activation_statistic(self, site: Site | str) -> torch.Tensor:
        """(C,) float32 a_j of a site under the default statistic."""
        return next(iter(self.activation_statistics(site).values()))

    def activation_statistics(self, site: Site | str) -> dict[str, torch.Tensor]:
        """(C,) float32 a_j of a site under every statistic, the default first (formula fA1)."""
        record = self.record(site)
        known = {"absmax": record.absmax, "rms": record.rms, "percentile": record.percentile}
        found: dict[str, torch.Tensor] = {}
        for name in self.statistics:
            value = known[name]
            if value is not None:
                found[name] = value.clone()
        return found

    def site_data(
        self,
        site: Site,
        parameters: Mapping[str, torch.Tensor],
        *,
        ranges_from: Calibration | None = None,
        producers: Sequence[ProducerRows] = (),
    ) -> SiteData:
        """Everything needed to score scales at a site.

        Args:
            site: A site of the calibrated model.
            parameters: Full name -> value of at least the weights of the site's operators, pristine (not smoothed).
            ranges_from: For held-out rows: the calibration whose statistics set a_j and the static range, since a deployed
                model has seen no other. None: this one.
            producers: The quantized weights that the scales divide.

        Returns:
            Rows of this calibration, on the CPU; weights as float32 views or copies of ``parameters``.

        Raises:
            InputError: The site has no rows here or no record in ``ranges_from``, or a weight is missing or misshapen.
            NonFiniteError: A weight holds NaN or infinite values.
        """
        record = self.record(site)
        ranges = ranges_from or self
        operators = {operator.name: operator for operator in site.operators}
        parts = tuple(
            _site_part(part, [operators[name] for name in part.operators], parameters) for part in record.parts
        )
        return SiteData(
            name=site.name,
            parts=parts,
            activation_statistics=ranges.activation_statistics(site),
            input_range=ranges.input_range(site),
            weight_absmax=weight_absmax(site, parameters),
            ties=site.ties,
            producers=tuple(producers),
            rows_seen=ranges.record(site).rows_seen,
            tops=ranges.record(site).tops,
            samples_seen=ranges.record(site).samples_seen,
        )

    def only(self, site: Site | str) -> Calibration:
        """What is known of one site: its record, or the reason why it has none. The record is shared, not copied.

        Raises:
            InputError: The site was not calibrated.
        """
        name = site if isinstance(site, str) else site.name
        if name not in self.sites and name not in self.missing:
            raise InputError(f"site {name}", "was not calibrated", "calibrate it first")
        return replace(
            self,
            sites={key: record for key, record in self.sites.items() if key == name},
            missing={key: reason for key, reason in self.missing.items() if key == name},
        )

    @classmethod
    def merged(cls, parts: Sequence[Calibration]) -> Calibration:
        """One calibration of all sites of ``parts``, in their order: the inverse of :meth:`only` over all sites.

        Raises:
            InputError: No parts, a site in two of them, or parts with different statistics.
        """
        settings = {(part.statistics, part.percentile) for part in parts}
        if len(settings) != 1:
            problem = "there is no part" if not parts else "parts were made with different statistics"
            raise InputError("calibration", problem, "calibrate again")
        sites = {name: record for part in parts for name, record in part.sites.items()}
        missing = {name: reason for part in parts for name, reason in part.missing.items()}
        if len(sites.keys() | missing.keys()) != sum(len(part.sites) + len(part.missing) for part in parts):
            raise InputError("calibration", "a site is in more than one part", "calibrate again")
        return replace(parts[0], sites=sites, missing=missing)

    def state(self) -> dict[str, torch.Tensor]:
        """The whole calibration as contiguous CPU tensors that share no memory, e.g. for safetensors.

        The names and numbers that are no tensors stand in ``structure``, UTF-8 JSON as uint8.
        """
        tensors: dict[str, torch.Tensor] = {}
        sites = []
        for i, (name, record) in enumerate(self.sites.items()):
            parts = []
            for j, part in enumerate(record.parts):
                parts.append({"operators": list(part.operators), "kernel_volume": part.kernel_volume})
                tensors |= _present(f"{i}.{j}", part, ("x", *_OF_ROWS))
            tensors |= _present(f"{i}", record, ("low", "high", "rms", "percentile", "tops"))
            seen = {"rows_seen": record.rows_seen, "samples_seen": record.samples_seen}
            sites.append({"name": name, **seen, "parts": parts})
        structure = {
            "version": _STATE_VERSION,
            "statistics": list(self.statistics),
            "percentile": self.percentile,
            "missing": dict(self.missing),
            "sites": sites,
        }
        tensors["structure"] = torch.tensor(list(json.dumps(structure).encode()), dtype=torch.uint8)
        return tensors

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Calibration:
        """The calibration whose ``state`` this is, equal to the bit.

        Raises:
            InputError: A tensor is missing, or another version of Alphasmith wrote it.
        """
        try:
            structure = json.loads(bytes(state["structure"].tolist()))
            if structure["version"] != _STATE_VERSION:
                raise InputError(
                    "calibration state",
                    f"has version {structure['version']}, not {_STATE_VERSION}",
                    "calibrate again with this version of Alphasmith",
                )
            sites = {
                entry["name"]: SiteRecord(
                    low=state[f"{i}.low"],
                    high=state[f"{i}.high"],
                    rms=state[f"{i}.rms"],
                    percentile=state.get(f"{i}.percentile"),
                    rows_seen=entry["rows_seen"],
                    tops=state.get(f"{i}.tops"),
                    samples_seen=entry.get("samples_seen", 0),
                    parts=tuple(
                        PartRows(
                            operators=tuple(part["operators"]),
                            x=state[f"{i}.{j}.x"],
                            kernel_volume=part["kernel_volume"],
                            **{name: state.get(f"{i}.{j}.{name}") for name in _OF_ROWS},
                        )
                        for j, part in enumerate(entry["parts"])
                    ),
                )
                for i, entry in enumerate(structure["sites"])
            }
            return cls(
                sites=sites,
                missing=structure["missing"],
                statistics=tuple(structure["statistics"]),
                percentile=structure["percentile"],
            )
        except InputError:
            raise
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise InputError("calibration state", f"is incomplete ({error})", "calibrate again") from error


def calibrate(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    rows: int,
    seed: int,
    statistics: Sequence[ChannelStatistic] = ("absmax",),
    percentile: float = 99.9,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> Calibration:
    """Run the model once over the batches and keep statistics and sampled rows of every site (claim A-1).

    Memory does not grow with the number of batches. The rows of a site depend on the seed, its name and the order of the samples
    only: not on the other sites, nor on the batch size, except where a row's sample is unknown (tokens routed to experts).

    Padding: rows of a linear input whose leading dimensions are ``Batch.mask``'s (B, L), or flattened B*L, are dropped where the
    mask is False, and so are positions of a convolution's input (B, C, L). Inputs cut differently (windows, pooled or
    routed tokens) are kept whole.

    Args:
        model: Already on ``device``; run in eval mode without gradients, every training flag restored afterwards.
        sites: Sites of this model; operators that are not raw are watched.
        batches: Read once, one at a time.
        rows: Rows kept per part of a site.
        seed: Seed of the sampling.
        statistics: What a_j can be, the default first; the exact range is kept in any case.
        percentile: Percent of the magnitudes of a channel, in (0, 100]; see ``ChannelStatistics.percentile``.
        device: Where the batches are moved to.
        on_batch: Called with the number of batches done, after each.

    Raises:
        InputError: A bad argument, no batches, only padding, or NaN or infinite activations (named by operator).
    """
    _validate(rows, statistics, percentile)
    names = [site.name for site in sites]
    if len(set(names)) != len(names):
        raise InputError("sites", "two sites have the same name", "pass the sites of one discovery")
    missing: dict[str, str] = {}
    watches: list[SiteWatch] = []
    for site in sites:
        reason = unwatchable(site)
        if reason:
            missing[site.name] = reason
            continue
        running = ChannelStatistics(site.channels, percentiles="percentile" in statistics, device=device)
        layouts = part_layouts(model, site)
        names_of = [RowNames(part_seed(seed, site.name, j)) for j in range(len(layouts))]
        parts = [PartWatch(layout, RowReservoir(rows), names_of[j]) for j, layout in enumerate(layouts)]
        watches.append(SiteWatch(site.name, running, parts))
    masked = _run(model, watches, batches, device, on_batch)
    records = {}
    watched = bool(watches)
    while watches:
        watch = watches.pop(0)  # so that its reservoir is freed before the next one is copied
        if watch.statistics.count == 0 or any(part.reservoir.seen == 0 for part in watch.parts):
            missing[watch.name] = "no unpadded calibration row reached every operator of it"
        else:
            records[watch.name] = watch.record(percentile if "percentile" in statistics else None)
    if watched and not records:
        problem = "no unpadded position reached any site" if masked else "no row reached any site"
        raise InputError("data", problem, "give calibration data with real content, and check its padding mask")
    return Calibration(
        sites=records,
        missing={name: missing[name] for name in names if name in missing},
        statistics=tuple(statistics),
        percentile=percentile,
    )


def weight_absmax(site: Site, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """w_j = max over every output of every operator of |W_:j| (formula fA1, trap T5).

    Args:
        site: The site.
        parameters: Full name -> weight. A raw operator counts if the last dimension of its weight is C (its last but one, when
            transposed).

    Returns:
        (C,) float32.

    Raises:
        InputError: A weight is missing or misshapen.
        NonFiniteError: A weight holds NaN or infinite values.
    """
    result = torch.zeros(site.channels)
    for operator in site.operators:
        weight = _parameter(operator, parameters)
        if operator.kind == "linear":
            weight = weight.transpose(-1, -2) if operator.transposed and weight.dim() > 1 else weight
            if operator.raw and weight.shape[-1] != site.channels:
                continue
            blocks = weight.reshape(1, -1, weight.shape[-1], 1)
        else:
            matrix = as_matrix(weight, operator.kind, operator.transposed, operator.groups)
            kernel = math.prod(operator.kernel)
            blocks = matrix.reshape(operator.groups, matrix.shape[0] // operator.groups, -1, kernel)
        magnitude = blocks.abs().amax(dim=(1, 3)).flatten().to(device="cpu", dtype=torch.float32)
        if magnitude.shape != result.shape:
            raise InputError(
                f"parameter {operator.weight}",
                f"has {magnitude.shape[0]} input channels, site {site.name} has {site.channels}",
                "pass the sites of one discovery and its model's parameters",
            )
        if not bool(torch.isfinite(magnitude).all()):
            raise NonFiniteError(f"weight {operator.weight} holds NaN or infinite values")
        result = torch.maximum(result, magnitude)
    return result


def _validate(rows: int, statistics: Sequence[str], percentile: float) -> None:
    if rows < 1:
        raise InputError("rows", f"{rows} is below 1", "keep at least one row per site")
    unknown = [name for name in statistics if name not in get_args(ChannelStatistic)]
    if unknown or not statistics or len(set(statistics)) != len(statistics):
        problem = f"{unknown[0]!r} is unknown" if unknown else f"{list(statistics)} is empty or repeats one"
        raise InputError("statistics", problem, f"give some of {', '.join(get_args(ChannelStatistic))}")
    if not 0.0 < percentile <= 100.0:
        raise InputError("percentile", f"{percentile} is not in (0, 100]", "use for example 99.9")


def _run(
    model: nn.Module,
    watches: Sequence[SiteWatch],
    batches: Iterable[Batch],
    device: torch.device | str,
    on_batch: Callable[[int], None] | None,
) -> bool:
    """Run every batch under the watches; whether any batch carried a mask."""
    current = CurrentBatch()
    masked = False
    with evaluating(model), torch.no_grad(), ExitStack() as stack:
        for watch in watches:
            for part in watch.parts:
                stack.enter_context(watching(model, watch, part, current))
        for batch in batches:
            moved = batch.to(device)
            current.start(moved)
            masked = masked or moved.mask is not None
            with data_errors():
                call(model, moved)
            current.end()
            if on_batch is not None:
                on_batch(current.number)
    if current.number == 0:
        raise InputError("data", "no calibration batches", "give at least one batch")
    return masked


def _parameter(operator: Operator, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if operator.weight not in parameters:
        raise InputError(f"parameter {operator.weight}", "is missing", "pass all parameters of the model")
    return parameters[operator.weight].detach()


def _site_part(part: PartRows, operators: Sequence[Operator], parameters: Mapping[str, torch.Tensor]) -> SitePart:
    matrices = []
    for operator in operators:
        weight = _parameter(operator, parameters)
        weight = as_matrix(weight, operator.kind, operator.transposed, operator.groups)
        weight = weight.to(device="cpu", dtype=torch.float32)
        if weight.shape[1] * operator.groups != part.x.shape[1]:
            raise InputError(
                f"parameter {operator.weight}",
                f"has {weight.shape[1]} columns in {operator.groups} group(s), its rows have {part.x.shape[1]}",
                "pass the parameters of the calibrated model",
            )
        matrices.append(weight)
    return SitePart(
        operators=part.operators,
        x=part.x,
        weight=matrices[0].contiguous() if len(matrices) == 1 else torch.cat(matrices),
        out_features=tuple(matrix.shape[0] for matrix in matrices),
        channel=torch.arange(part.x.shape[1]) // part.kernel_volume,
        groups=operators[0].groups,
        sample=part.sample,
        sample_low=part.sample_low,
        sample_high=part.sample_high,
        row_weight=part.row_weight,
        output_weight=part.output_weight,
    )


def _present(prefix: str, record: SiteRecord | PartRows, fields: Sequence[str]) -> dict[str, torch.Tensor]:
    """The fields of a record that are tensors, by prefixed name."""
    values = {f"{prefix}.{field}": getattr(record, field) for field in fields}
    return {name: value.contiguous() for name, value in values.items() if value is not None}
