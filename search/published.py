"""A site as another process needs it, without the model: its rows, its weights, and what folds into them before.

The process that has the model publishes every site once. Whoever searches a site later folds the winners of the sites before
it into the published, pristine weights, exactly as the pipeline does with the model's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from alphasmith.objectives.calibration import Calibration
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.site_data import SiteData, SitePart
from alphasmith.objectives.sites.folded_weights import FoldedWeights
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing, tie_index
from alphasmith.objectives.tensor_state import StateFormat, independent, prefixed, unprefixed

_SEARCH, _HELD_OUT = "search.", "held_out."

_FLOAT = 4
#: Buffers of one judge where no budget is given [bytes], and candidates that are scored together.
_JUDGE_BUDGET = 2**29
_TOGETHER = 24
#: Rows the noise model samples, entries it samples at least, and, on a GPU, those in flight, with their temporaries [bytes].
_NOISE_ROWS, _NOISE_ENTRIES = 512, 2**19
_IN_FLIGHT, _PER_ENTRY = 2**26, 3 * _FLOAT
#: One part in this many is lost to fragmentation.
_LOSS_DIVISOR = 8


@dataclass(frozen=True, kw_only=True)
class _SiteWeights:
    """What is kept of a site beside its calibration."""

    site: Site
    weights: Mapping[str, Tensor]
    depends_on: tuple[Site, ...]


_WEIGHTS = StateFormat(_SiteWeights, version=1, what="published weights", remedy="start the run again")


@dataclass(frozen=True, kw_only=True)
class PublishedSite:
    """Everything that :meth:`data` needs beside the winners of earlier sites.

    Attributes:
        site: The site.
        calibration: Rows to search on, of this site only.
        held_out: Rows that judge the winner, likewise.
        weights: Pristine weights of the site's operators by full name, on the CPU.
        depends_on: Sites whose winners fold into these weights, in search order; of their edits only those that do.
    """

    site: Site
    calibration: Calibration
    held_out: Calibration
    weights: Mapping[str, Tensor]
    depends_on: tuple[Site, ...]

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
        data = self.calibration.site_data(self.site, weights)
        return data, self.held_out.site_data(self.site, weights, ranges_from=self.calibration)

    def weights_state(self) -> dict[str, Tensor]:
        """The site, its weights and what it depends on as tensors, e.g. for safetensors."""
        return _WEIGHTS.state(_SiteWeights(site=self.site, weights=self.weights, depends_on=self.depends_on))

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
            site=kept.site, calibration=search, held_out=held_out, weights=kept.weights, depends_on=kept.depends_on
        )


def publish(
    sites: Sequence[Site], tensors: Mapping[str, Tensor], calibration: Calibration, held_out: Calibration
) -> Iterator[PublishedSite]:
    """Every site, one at a time: only one site's copies of weights need to exist.

    Args:
        sites: The sites that are searched, in that order (``producers_first``).
        tensors: Pristine parameters and buffers of the model by full name.
        calibration: Rows to search on.
        held_out: Rows that judge.

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
        )


def calibration_state(calibration: Calibration, held_out: Calibration, site: str) -> dict[str, Tensor]:
    """What both calibrations know of one site as tensors that share no memory; see :func:`calibrations_of`.

    Raises:
        InputError: The site was not calibrated.
    """
    search, reserve = calibration.only(site).state(), held_out.only(site).state()
    return independent(prefixed(_SEARCH, search) | prefixed(_HELD_OUT, reserve))


def calibrations_of(state: Mapping[str, Tensor]) -> tuple[Calibration, Calibration]:
    """The calibration to search on and the held-out one, each of one site; ``Calibration.merged`` joins those of many.

    Raises:
        InputError: A tensor is missing, or another version of Alphasmith wrote it.
    """
    return Calibration.from_state(unprefixed(_SEARCH, state)), Calibration.from_state(unprefixed(_HELD_OUT, state))


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


def work_memory(data: SiteData, held_out: SiteData, *, budget: int | None = None) -> int:
    """Upper bound of what the search of a site takes on a GPU at its peak, its rows included; less on the CPU [bytes].

    What the device's libraries take once per process is not included.

    Args:
        data: Rows to search on.
        held_out: Rows that judge.
        budget: Memory for the buffers of each judge, see ``SiteWork.budget``.
    """
    judges = sum(_judge_bytes(split, budget) for split in (data, held_out))
    total = sum(_tensor_bytes(split) for split in (data, held_out)) + judges + sum(map(_noise_bytes, data.parts))
    return total + total // _LOSS_DIVISOR


def _weight(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise InputError(f"parameter {name}", "is missing", "pass all parameters of the model")
    return tensors[name]


def _folding_into(site: Site, weights: Iterable[str]) -> Site:
    """The site with no edits but its producers' that change one of ``weights``: consumers' are large and not needed."""
    names = set(weights)
    edits = tuple(edit for edit in site.edits if edit.power < 0 and edit.parameter in names)
    return replace(site, edits=edits, shift_edits=())


def _tensor_bytes(data: SiteData) -> int:
    tensors = [getattr(part, field.name) for part in data.parts for field in fields(part)]
    tensors += [*data.activation_statistics.values(), data.input_range.low, data.input_range.high]
    tensors += [data.weight_absmax, data.ties]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _judge_bytes(data: SiteData, budget: int | None) -> int:
    """Weights and float output of a judge in its own order, and the buffers that its budget allows or candidates fill."""
    weights = _FLOAT * sum(part.weight.numel() for part in data.parts)
    outputs = _FLOAT * sum(part.x.shape[0] * part.weight.shape[0] for part in data.parts)
    passing = 2 * _FLOAT * sum(part.x.numel() for part in data.parts) + 2 * outputs
    # One candidate: its weights before and after rounding; half of a budget is for the one, half for the other.
    filled = _TOGETHER * (2 * weights + passing)
    allowed = max(_JUDGE_BUDGET, 4 * weights) if budget is None else budget
    return weights + outputs + min(filled, allowed)


def _noise_bytes(part: SitePart) -> int:
    """Sampled entries of rows and weights, those of all candidates in flight, float64 copies with gradients, squares."""
    sampled = [
        min(tensor.numel(), max(_NOISE_ROWS * tensor.shape[1], _NOISE_ENTRIES)) for tensor in (part.x, part.weight)
    ]
    in_flight = max(max(sampled), min(_IN_FLIGHT, _TOGETHER * max(sampled)))
    return _PER_ENTRY * in_flight + 8 * _FLOAT * sum(sampled) + _FLOAT * part.weight.numel()
