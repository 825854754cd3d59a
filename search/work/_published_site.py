"""A site as another process needs it, without the model: its rows, its weights, and what folds into them before.

The process that has the model publishes every site once. Whoever searches a site later folds the winners of the sites before
it into the published, pristine weights, exactly as the pipeline does with the model's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphasmith.objectives.calibration.calibrate import Calibration
from alphasmith.objectives.calibration.producers import Producers
from alphasmith.objectives.calibration.site_data import ProducerRows, SiteData
from alphasmith.objectives.calibration.tensor_state import StateFormat, independent
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.sites.folded_weights import FoldedWeights
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing, tie_index
from alphasmith.search.inputs.calibration_cache import calibration_state, calibrations_of


@dataclass(frozen=True, kw_only=True)
class _SiteWeights:
    """What is kept of a site beside its calibration."""

    site: Site
    weights: Mapping[str, Tensor]
    depends_on: tuple[Site, ...]
    producers: tuple[ProducerRows, ...]


_WEIGHTS = StateFormat(_SiteWeights, version=2, what="published weights", remedy="start the run again")


@dataclass(frozen=True, kw_only=True)
class PublishedSite:
    """Everything that :meth:`data` needs beside the winners of earlier sites; where it travels, nothing beyond that.

    Attributes:
        site: The site.
        calibration: Rows to search on, of this site at least.
        held_out: Rows that judge the winner, likewise.
        weights: Pristine weights by full name, of the site's operators at least.
        depends_on: Sites whose winners fold into these weights, in search order; of their edits those that do, at least.
        producers: Quantized weights that the site's scales divide.
    """

    site: Site
    calibration: Calibration
    held_out: Calibration
    weights: Mapping[str, Tensor]
    depends_on: tuple[Site, ...]
    producers: tuple[ProducerRows, ...] = ()

    def data(self, smoothings: Mapping[str, Smoothing]) -> tuple[SiteData, SiteData]:
        """Search and held-out rows on the CPU, both with the calibrated ranges and the weights the site will really have.

        Args:
            smoothings: Site name -> winner, of at least the sites in ``depends_on``.

        Raises:
            InputError: A winner is missing or does not fit, or the site has no rows.
            NonFiniteError: A scale or a weight is NaN or infinite.
        """
        weights = FoldedWeights(self.weights)
        for before in self.depends_on:
            if before.name not in smoothings:
                problem = f"needs the winner of {before.name}"
                raise InputError(f"site {self.site.name}", problem, "search that site first")
            weights.fold(before, smoothings[before.name])
        data = self.calibration.site_data(self.site, weights, producers=self.producers)
        reserve = self.held_out.site_data(self.site, weights, ranges_from=self.calibration, producers=self.producers)
        if not self.depends_on or all(part.output_weight is None for part in data.parts):
            return data, reserve
        pristine = self.calibration.site_data(self.site, self.weights)
        return _in_folded_outputs(data, pristine), _in_folded_outputs(reserve, pristine)

    def weights_state(self) -> dict[str, Tensor]:
        """The site, its weights and what it depends on as tensors, e.g. for safetensors."""
        kept = _SiteWeights(site=self.site, weights=self.weights, depends_on=self.depends_on, producers=self.producers)
        return _WEIGHTS.state(kept)

    def calibration_state(self) -> dict[str, Tensor]:
        """Both calibrations as tensors, likewise."""
        return calibration_state(self.calibration, self.held_out, self.site.name)

    @classmethod
    def restored(cls, weights: Mapping[str, Tensor], calibration: Mapping[str, Tensor]) -> PublishedSite:
        """The site from its :meth:`weights_state` and its :meth:`calibration_state`, equal to the bit.

        Raises:
            InputError: Something is missing, another version wrote it, or the two are not of one site.
        """
        kept = _WEIGHTS.record(weights)
        search, held_out = calibrations_of(calibration)
        for part in (search, held_out):
            part.only(kept.site)
        return cls(
            site=kept.site,
            calibration=search,
            held_out=held_out,
            weights=kept.weights,
            depends_on=kept.depends_on,
            producers=kept.producers,
        )


def _in_folded_outputs(data: SiteData, pristine: SiteData) -> SiteData:
    """Weights of outputs that were found in the float model, for weights whose rows are divided by other sites' scales s.

    What such an output is off by, the next site multiplies by s: an error counts s^2 times as much.
    """
    parts = []
    for part, before in zip(data.parts, pristine.parts, strict=True):
        weight = part.output_weight
        if weight is not None:
            size, was = (torch.linalg.vector_norm(p.weight, dim=1, dtype=torch.float64) for p in (part, before))
            divided = torch.where((size > 0) & (was > 0), was / size, 1.0)
            weight = (weight * divided.square()).to(torch.float32)
        parts.append(replace(part, output_weight=weight))
    return replace(data, parts=tuple(parts))


def publish(
    sites: Sequence[Site],
    tensors: Mapping[str, Tensor],
    calibration: Calibration,
    held_out: Calibration,
    producers: Producers,
) -> Iterator[PublishedSite]:
    """Every site, one at a time: only one site's copies of weights need to exist.

    Args:
        sites: The sites that are searched, in that order (``producers_first``).
        tensors: Pristine parameters and buffers of the model by full name.
        calibration: Rows to search on.
        held_out: Rows that judge.
        producers: Producers of all sites of the model.

    Raises:
        InputError: A weight is missing, or a site was not calibrated.
    """
    by_name = {site.name: site for site in sites}
    before = dependencies(sites)
    for site in sites:
        weights = site_weights(site, tensors)
        yield PublishedSite(
            site=site,
            calibration=calibration.only(site),
            held_out=held_out.only(site),
            weights=weights,
            depends_on=tuple(_folding_into(by_name[name], weights) for name in before[site.name]),
            producers=producers.rows(site),
        )


def dependencies(sites: Sequence[Site]) -> dict[str, tuple[str, ...]]:
    """Site name -> earlier sites whose winners change its weights, in search order.

    Where sites depend on each other in a circle, only those that are searched earlier count, as in the pipeline.

    Args:
        sites: The sites that are searched, in that order (``producers_first``).
    """
    place = {site.name: index for index, site in enumerate(sites)}
    writers: dict[str, list[str]] = {}
    found: dict[str, tuple[str, ...]] = {}
    for site in sites:
        before = {name for operator in site.operators for name in writers.get(operator.weight, ())}
        found[site.name] = tuple(sorted(before, key=place.__getitem__))
        if site.mode == "fold":
            for parameter in {edit.parameter for edit in site.edits if edit.power < 0}:
                writers.setdefault(parameter, []).append(site.name)
    return found


def site_weights(site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the site's operators by full name: contiguous, on the CPU, copied only where they are not so already.

    Raises:
        InputError: One is missing.
    """
    return independent({operator.weight: _weight(operator.weight, tensors) for operator in site.operators})


def site_digest(site: Site, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of a layer, by which other runs find its winner: pristine weights and how they read the site's channels.

    Neither names nor rows count, so the same layer has the same digest in every run and in every model file. Whether an
    operator is raw or plain counts: it decides what a candidate may do to the input.

    Args:
        site: The site.
        tensors: Full name -> pristine weight of at least its operators, on any device.

    Raises:
        InputError: A weight is missing.
    """
    digest = hashlib.sha256()
    for operator in site.operators:
        weight = _weight(operator.weight, tensors).detach()
        read = (operator.kind, operator.transposed, operator.groups, operator.kernel, operator.raw, operator.plain)
        digest.update(json.dumps([*read, str(weight.dtype), list(weight.shape)]).encode())
        digest.update(weight.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    ties = tie_index(site.ties, site.channels).tolist()
    digest.update(json.dumps({"channels": site.channels, "ties": ties}).encode())
    return digest.hexdigest()


def _weight(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise InputError(f"parameter {name}", "is missing", "pass all parameters of the model")
    return tensors[name]


def _folding_into(site: Site, weights: Iterable[str]) -> Site:
    """The site with no edits but its producers' that change one of ``weights``: consumers' are large and not needed."""
    names = set(weights)
    edits = tuple(edit for edit in site.edits if edit.power < 0 and edit.parameter in names)
    return replace(site, edits=edits, shift_edits=())
