"""Scales folded into parameters: the one home of ``p' = (p + offset) * s**power - offset`` (formulas fA2, fA3; claim A-11).

Consumers' weights grow with s (power +1) and producers' outputs shrink (power -1), so the float model computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.sites.types import ParameterEdit, Site


def edit_parameter(value: Tensor, edit: ParameterEdit, scales: Tensor) -> Tensor:
    """Apply one edit to one parameter.

    Args:
        value: The parameter, any floating dtype.
        edit: Which elements take which channel's scale, and how; ``edit.channel`` broadcasts to the shape of ``value``.
        scales: (C,) positive.

    Returns:
        A new tensor of the shape, dtype and device of ``value``: ``(p + offset) * s[channel]**power - offset`` computed in
        float64; elements whose channel is -1 keep their bits. Source: formulas fA2 and fA3.

    Raises:
        InputError: ``scales`` has fewer channels than the edit names, or the edit does not fit the parameter.
    """
    if scales.dim() != 1 or (edit.channel.numel() and int(edit.channel.max()) >= scales.numel()):
        raise InputError(
            "scales",
            f"shape {tuple(scales.shape)} has no channel {int(edit.channel.max())} for {edit.parameter}",
            "give one scale per channel of the site",
        )
    try:
        fits = torch.broadcast_shapes(edit.channel.shape, value.shape) == value.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(
            edit.parameter,
            f"shape {tuple(value.shape)} does not fit the site's {tuple(edit.channel.shape)}",
            "use the model that the site was discovered in",
        )
    return _edited(value, edit, scales)


def _edited(value: Tensor, edit: ParameterEdit, scales: Tensor) -> Tensor:
    channel = edit.channel.to(value.device)
    factor = scales.to(device=value.device, dtype=torch.float64)[channel.clamp(min=0)] ** edit.power
    # p * f + offset * (f - 1) is the same number and returns p exactly where f = 1
    result = value.double() * factor
    if edit.offset:
        result += edit.offset * (factor - 1.0)
    return torch.where(channel >= 0, result.to(value.dtype), value)


def folded_parameters(parameters: Mapping[str, Tensor], site: Site, scales: Tensor) -> dict[str, Tensor]:
    """The parameters that folding one site changes, with their new values.

    Two sites can edit one parameter (a weight's inputs for one, its outputs for the other), so apply sites one after the
    other, each on the result of the one before.

    Args:
        parameters: Parameters and persistent buffers by full name; not modified.
        site: A site with mode ``fold`` (producers and consumers are edited; the float model stays the same) or
            ``explicit`` (only the consumers' weights are multiplied; the caller divides their input by s).
        scales: (C,) finite, positive, equal within ``site.ties``.

    Returns:
        New tensors by parameter name; empty for a site with mode ``left``.

    Raises:
        InputError: The scales or the parameters do not fit the site.
    """
    _validate(site, scales)
    changed: dict[str, Tensor] = {}
    for edit in site.edits:
        value = changed.get(edit.parameter, parameters.get(edit.parameter))
        if value is None:
            raise InputError(
                edit.parameter,
                f"is missing, but site {site.name} edits it",
                "use the model that the site was discovered in",
            )
        changed[edit.parameter] = edit_parameter(value, edit, scales)
    return changed


def fold(model: nn.Module, site: Site, scales: Tensor) -> None:
    """Fold one site's scales into ``model``, in place: call it on a private copy.

    For an ``explicit`` site only the consumers' weights change; the builder of the quantized model divides their input by
    the same scales.

    Args:
        model: The model that ``site`` was discovered in, or a copy of it.
        site: The site.
        scales: (C,) finite, positive, equal within ``site.ties``.

    Raises:
        InputError: The scales do not fit the site, or the model is another one; the model is then unchanged.
    """
    wanted = {edit.parameter for edit in site.edits}
    named = {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if name in wanted}
    changed = folded_parameters(named, site, scales)
    with torch.no_grad():
        for name, value in changed.items():
            named[name].copy_(value)


def _validate(site: Site, scales: Tensor) -> None:
    if scales.shape != (site.channels,):
        raise InputError(
            "scales",
            f"shape {tuple(scales.shape)} is not ({site.channels},) as site {site.name} needs",
            "give one per channel",
        )
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise InputError(
            "scales", f"some scale of site {site.name} is not finite and positive", "use s = 1 for such channels"
        )
    _, group = torch.unique(site.ties.to(scales.device), return_inverse=True)
    largest = torch.zeros_like(scales).scatter_reduce_(0, group, scales, "amax")
    if not torch.equal(scales, largest[group]):
        raise InputError("scales", f"tied channels of site {site.name} have different scales", "use one scale per tie")
