"""Operators of a quantized model in other formats than it has, stored beside it so that they can be exchanged without the float model.

Of every operator only what differs from the quantized model is stored: a scale, a zero point, or the whole weight where the site is in
float. A model put together this way has the bits of one that was quantized so in the first place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.literals import SiteFormat
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.formats import scheme_of
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.objectives.stored_types import same_bits

#: Where a tensor of an operator is: in the file of the quantized model, or among those stored beside it.
_QUANTIZED, _BESIDE = "quantized", "beside"


def stored_forms(
    candidate: CandidateModel,
    smoothings: Mapping[str, Smoothing],
    own: SiteSchemes,
    kept: SiteSchemes,
    formats: Mapping[str, Sequence[SiteFormat]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Operators of sites in the formats that a choice may give them.

    Args:
        candidate: The model; the float one afterwards.
        smoothings: What is done to its sites.
        own: The model's own.
        kept: Schemes of the quantized model that this is stored beside.
        formats: Site -> formats to store.

    Returns:
        Tensors that the quantized model does not hold, and a structure of JSON types: ``order`` of operators, and ``sites``: site -> format ->
        operator -> ``entry`` (as in ``payload``; null: in float), ``tensors`` (name -> ``in`` and ``name``) and ``aliases``.

    Raises:
        InputError: As ``CandidateModel.apply``.
        NonFiniteError: Likewise.
    """
    sites = {site.name: site for site in candidate.sites if site.name in formats}
    beside: dict[str, Tensor] = {}
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in sites}
    base, _ = _payload(candidate, kept, smoothings)
    order: list[str] = []
    for name in dict.fromkeys(name for names in formats.values() for name in names):
        those = [site for site, names in formats.items() if name in names and site in sites]
        schemes = own.changed({site: scheme_of(name, own.default) for site in those})
        tensors, structure = _payload(candidate, schemes, smoothings)
        entries = {entry["name"]: entry for entry in structure["operators"]}
        order = _merged(order, list(entries))
        for site in those:
            found[site][name] = {
                operator.name: _form(operator.name, name, entries, tensors, structure["aliases"], base, beside)
                for operator in sites[site].operators
                if not operator.raw and operator.name
            }
    return beside, {"order": order, "sites": found}


def exchanged(
    tensors: Mapping[str, Tensor],
    structure: Mapping[str, Any],
    beside: Mapping[str, Tensor],
    forms: Mapping[str, Any],
    formats: Mapping[str, SiteFormat],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A quantized model with sites in other formats.

    Args:
        tensors: Stored tensors of the quantized model.
        structure: Its description, see ``payload``.
        beside: Tensors that :func:`stored_forms` returned.
        forms: The structure that it returned.
        formats: Site -> format.

    Returns:
        Tensors and description of the model that has these formats.

    Raises:
        InputError: A site or format is not among what was stored.
        IntegrityError: What was stored does not hold together.
    """
    made, aliases = dict(tensors), dict(structure.get("aliases", {}))
    entries = {entry["name"]: entry for entry in structure["operators"]}
    for site, name in formats.items():
        stored = forms["sites"].get(site, {}).get(name)
        if stored is None:
            raise InputError("formats", f"{name} was not stored for {site}", "pick a point of the front")
        for operator, form in stored.items():
            inside = f"{operator}."
            for key in [key for key in made if key.startswith(inside)]:
                del made[key]
            for key in [key for key in aliases if key.startswith(inside)]:
                del aliases[key]
            entries.pop(operator, None)
            if form["entry"] is not None:
                entries[operator] = form["entry"]
            aliases.update(form["aliases"])
            for key, place in form["tensors"].items():
                source = tensors if place["in"] == _QUANTIZED else beside
                if place["name"] not in source:
                    raise IntegrityError(f"{place['name']}, of {site} in {name}, is in no file")
                made[key] = source[place["name"]]
    order = {name: number for number, name in enumerate(_merged(list(forms["order"]), list(entries)))}
    listed = [entries[name] for name in sorted(entries, key=order.__getitem__)]
    return made, {**structure, "operators": listed, "aliases": dict(sorted(aliases.items()))}


def _payload(
    candidate: CandidateModel, schemes: SiteSchemes, smoothings: Mapping[str, Smoothing]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with candidate.using(schemes), candidate.applied(smoothings):
        return candidate.payload()


def _form(
    operator: str,
    name: SiteFormat,
    entries: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    base: Mapping[str, Tensor],
    beside: dict[str, Tensor],
) -> dict[str, Any]:
    """One operator in one format; what the quantized model does not hold goes to ``beside``."""
    inside = f"{operator}."
    places = {}
    for key in sorted(key for key in tensors if key.startswith(inside)):
        value = tensors[key]
        if key in base and same_bits(value, base[key]):
            places[key] = {"in": _QUANTIZED, "name": key}
            continue
        equal = (other for other in beside if other.endswith(f":{key}") and same_bits(value, beside[other]))
        stored = next(equal, f"{name}:{key}")
        beside.setdefault(stored, value.clone())
        places[key] = {"in": _BESIDE, "name": stored}
    return {
        "entry": entries.get(operator),
        "tensors": places,
        "aliases": {alias: target for alias, target in aliases.items() if alias.startswith(inside)},
    }


def _merged(order: list[str], more: list[str]) -> list[str]:
    """Both orders in one: what only the second has stands behind what precedes it there."""
    merged = list(order)
    for place, name in enumerate(more):
        if name not in merged:
            before = next((other for other in reversed(more[:place]) if other in merged), None)
            merged.insert(0 if before is None else merged.index(before) + 1, name)
    return merged
