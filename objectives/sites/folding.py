"""Smoothing folded into parameters: the one home of ``p' = (p + offset) * s**power - offset`` (formulas fA2, fA3; claim A-11).

Consumers' weights grow with s (power +1) and producers' outputs shrink (power -1), so the float model computes the same. A
shift z moves from the producers' biases, ``b' = (b - z) / s``, into the consumers', ``b' = b + W z``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.sites.types import ParameterEdit, ShiftEdit, Site
from alphasmith.objectives.smoothing import Smoothing

#: Elements of a parameter that are turned into float64 at a time: bounds the temporaries of a large weight to some tens of MiB.
EDITED_ELEMENTS = 1 << 21


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
    if value.numel() <= EDITED_ELEMENTS or value.dim() < 2:
        return _edited_block(value, channel, edit, scales)
    result = torch.empty_like(value)
    whole = channel.dim() < value.dim() or channel.shape[0] == 1  # the same for every row
    for rows in _row_blocks(value):
        result[rows] = _edited_block(value[rows], channel if whole else channel[rows], edit, scales)
    return result


def _edited_block(value: Tensor, channel: Tensor, edit: ParameterEdit, scales: Tensor) -> Tensor:
    # One factor for every channel that is named, not for every element: most edits name a whole row or column at once.
    factor = scales.to(device=value.device, dtype=torch.float64)[channel.clamp(min=0)] ** edit.power
    # p * f + offset * (f - 1) is the same number and returns p exactly where f = 1
    result = value.double() * factor
    if edit.offset:
        result += edit.offset * (factor - 1.0)
    edited, touched = result.to(value.dtype), channel >= 0
    return edited if bool(touched.all()) else torch.where(touched, edited, value)


def _row_blocks(value: Tensor) -> list[slice]:
    """Slices of the first axis with at most ``EDITED_ELEMENTS`` elements each, or one row."""
    rows = max(1, EDITED_ELEMENTS * value.shape[0] // value.numel())
    return [slice(start, start + rows) for start in range(0, value.shape[0], rows)]


def shift_product(weight: Tensor, channel: Tensor, transposed: bool, shift: Tensor) -> Tensor:
    """What a weight makes of a shift of its input: ``sum over W[o, ...] of W * z[channel]``, kernels included.

    Args:
        weight: (O, ...), or (C, O) when ``transposed``; any floating dtype.
        channel: int64 site channel of every element, broadcastable to ``weight``; -1 counts as 0.
        transposed: Whether outputs are the last axis.
        shift: (C,) z.

    Returns:
        (O,) float64.
    """
    z = shift.to(device=weight.device, dtype=torch.float64)
    weight, channel = weight.detach(), channel.to(weight.device).expand(weight.shape)
    if transposed:
        weight, channel = weight.transpose(0, -1), channel.transpose(0, -1)
    blocks = []
    for rows in _row_blocks(weight):
        shifts = torch.where(channel[rows] >= 0, z[channel[rows].clamp(min=0)], 0.0)
        blocks.append((weight[rows].double() * shifts).flatten(1).sum(1))
    return torch.cat(blocks)


def shift_bias(
    bias: Tensor, edit: ShiftEdit, shift: Tensor, weight: Tensor | None = None, *, undo: bool = False
) -> Tensor:
    """Apply one shift edit to one bias, or take it back.

    Args:
        bias: The bias, any floating dtype.
        edit: Which elements take which channel's shift.
        shift: (C,) z.
        weight: The consumer's weight before this site's scales; needed, and used, for consumers only.
        undo: Apply the opposite edit.

    Returns:
        A new tensor of the shape, dtype and device of ``bias``, computed in float64; untouched elements keep their bits.

    Raises:
        InputError: A consumer's weight is missing, or the edit does not fit the tensors.
    """
    if edit.weight:
        if weight is None:
            raise _missing(edit.weight, "a shift")
        change, touched = shift_product(weight, edit.channel, edit.transposed, shift), None
    else:
        channel = edit.channel.to(bias.device)
        change, touched = -shift.to(bias.device, torch.float64)[channel.clamp(min=0)], channel >= 0
    if change.shape != bias.shape:
        raise InputError(
            edit.parameter,
            f"shape {tuple(bias.shape)} does not fit the site's {tuple(change.shape)}",
            "use the model that the site was discovered in",
        )
    moved = (bias.double() + (-change if undo else change)).to(bias.dtype)
    return moved if touched is None else torch.where(touched, moved, bias)


def folded_parameters(parameters: Mapping[str, Tensor], site: Site, smoothing: Smoothing) -> dict[str, Tensor]:
    """The parameters that folding one site changes, with their new values.

    Two sites can edit one parameter (a weight's inputs for one, its outputs for the other), so apply sites one after the
    other, each on the result of the one before; the order does not matter.

    Args:
        parameters: Parameters and persistent buffers by full name; not modified.
        site: A site with mode ``fold`` (producers and consumers are edited; the float model stays the same) or
            ``explicit`` (only the consumers' weights are multiplied; the caller divides their input by s). A shift goes into
            biases where the site has ``shift_edits``; elsewhere it is the input quantizer's and changes no parameter.
        smoothing: Scales and shift.

    Returns:
        New tensors by parameter name; empty for a site with mode ``left``.

    Raises:
        InputError: The smoothing or the parameters do not fit the site.
        NonFiniteError: A scale or a shift is NaN or infinite.
    """
    check_smoothing(site, smoothing)
    changed: dict[str, Tensor] = {}

    def current(name: str) -> Tensor:
        value = changed.get(name, parameters.get(name))
        if value is None:
            raise _missing(name, f"site {site.name}")
        return value

    if smoothing.shift is not None:
        for shifted in site.shift_edits:  # before any weight grows: the product is that of the weight before its scales
            weight = current(shifted.weight) if shifted.weight else None
            changed[shifted.parameter] = shift_bias(current(shifted.parameter), shifted, smoothing.shift, weight)
    for edit in site.edits:
        changed[edit.parameter] = edit_parameter(current(edit.parameter), edit, smoothing.scales)
    return changed


def fold(model: nn.Module, site: Site, smoothing: Smoothing) -> None:
    """Fold one site's smoothing into ``model``, in place: call it on a private copy.

    For an ``explicit`` site only the consumers' weights change; the builder of the quantized model divides their input by
    the same scales.

    Args:
        model: The model that ``site`` was discovered in, or a copy of it.
        site: The site.
        smoothing: See :func:`folded_parameters`.

    Raises:
        InputError: The smoothing does not fit the site, or the model is another one; the model is then unchanged.
        NonFiniteError: A scale or a shift is NaN or infinite; likewise.
    """
    wanted = {edit.parameter for edit in site.edits}
    wanted |= {name for edit in site.shift_edits for name in (edit.parameter, edit.weight)}
    named = {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if name in wanted}
    changed = folded_parameters(named, site, smoothing)
    with torch.no_grad():
        for name, value in changed.items():
            named[name].copy_(value)


def check_smoothing(site: Site, smoothing: Smoothing) -> None:
    """Require that a smoothing can be applied at a site.

    Raises:
        InputError: A wrong shape, a scale or a range factor that is not positive, values that differ within a tie, or scales
            or a shift at a site that takes none.
        NonFiniteError: A scale, a shift or the range factor is NaN or infinite.
    """
    field = f"scales[{site.name}]"
    _check_vector(site, field, "a scale", smoothing.scales)
    if not bool((smoothing.scales > 0).all()):
        raise InputError(field, "a scale is not positive", "use 1 for channels left alone")
    if site.mode == "left" and not bool((smoothing.scales == 1).all()):
        raise InputError(field, f"the site takes no scales ({site.reason})", "leave it out")
    if not math.isfinite(smoothing.range_factor):
        raise NonFiniteError(f"site {site.name}: the range factor is NaN or infinite")
    if smoothing.range_factor <= 0:
        raise InputError(f"range_factor[{site.name}]", f"{smoothing.range_factor} is not positive", "use 1 for abs-max")
    if smoothing.shift is None:
        return
    if not site.shiftable:
        reason = site.reason if site.mode == "left" else "an operator does more than multiply its input"
        raise InputError(f"shift[{site.name}]", f"the site takes no shift ({reason})", "leave the shift out")
    _check_vector(site, f"shift[{site.name}]", "a shift", smoothing.shift)


def _check_vector(site: Site, field: str, what: str, values: Tensor) -> None:
    if values.shape != (site.channels,):
        raise InputError(field, f"shape {tuple(values.shape)} is not ({site.channels},)", "give one per channel")
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"site {site.name}: {what} is NaN or infinite")
    _, tie = torch.unique(site.ties.to(values.device), return_inverse=True)
    first = torch.zeros(int(tie.max()) + 1, dtype=values.dtype, device=values.device)
    first[tie] = values  # whichever member lands here, all others must equal it
    if not torch.equal(first[tie], values):
        raise InputError(field, f"{what} differs among tied channels", "give tied channels one value")


def _missing(name: str, whose: str) -> InputError:
    return InputError(name, f"is missing, but {whose} edits it", "use the model that the site was discovered in")
