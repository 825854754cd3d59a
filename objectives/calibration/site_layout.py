"""How the rows and weights of a site lie in memory, by convolution group and by subset, and whether they fit together."""

from __future__ import annotations

import torch
from torch import Tensor

from alphasmith.objectives.calibration.site_data import SiteData, SitePart
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.finite import all_finite


def subset_rows(size: int, rows: int, part_rows: int) -> int:
    """Rows of a part in a subset of ``size`` of the ``rows`` rows of the largest part: the same fraction, rounded up."""
    return -(-size * part_rows // rows)


def row_block(part: SitePart) -> Tensor | None:
    """Convolution group of every weight row, (O,) int64; None for a dense part."""
    if part.groups == 1:
        return None
    device = part.weight.device
    blocks = [torch.arange(f, device=device) // (f // part.groups) for f in part.out_features]
    return torch.cat(blocks)


def by_block(weight: Tensor, part: SitePart) -> Tensor:
    """Weights (O, D // groups) as (groups, O // groups, D // groups): rows of one convolution group together."""
    block = row_block(part)
    if block is not None and len(part.out_features) > 1:
        weight = weight[torch.argsort(block, stable=True)]
    return weight.reshape(part.groups, -1, weight.shape[1])


def outputs_by_block(part: SitePart) -> Tensor | None:
    """Weights of the outputs (groups, O // groups), in the order of :func:`by_block`; None where they all count alike."""
    return None if part.output_weight is None else by_block(part.output_weight.unsqueeze(1), part).squeeze(2)


def columns_by_block(x: Tensor, groups: int) -> Tensor:
    """Rows (T, D) as (groups, T, D // groups)."""
    return x.reshape(x.shape[0], groups, -1).transpose(0, 1)


def kernel_columns(channel: Tensor) -> int:
    """Columns of a part that every input channel has, side by side: kernel positions of a convolution, 1 for linear.

    Args:
        channel: (D,) int64 site channel of every column, or shaped otherwise.
    """
    return channel.numel() // (int(channel.max()) + 1)


def check_site_data(data: SiteData) -> None:
    """Refuse data whose shapes contradict each other or whose tensors are not finite.

    Raises:
        InputError: A shape, an index or a range does not fit; names the site and the tensor.
        NonFiniteError: A tensor holds NaN or infinity; names the site and the tensor.
    """
    channels = data.weight_absmax.shape[0] if data.weight_absmax.dim() == 1 else 0
    if not data.parts or channels == 0:
        raise InputError(data.name, "has no rows or no channels", "calibrate the site before scoring it")
    if not data.activation_statistics:
        raise InputError(data.name, "has no activation_statistics", "give at least the abs-max of every channel")
    magnitudes = {f"activation_statistics {name}": values for name, values in data.activation_statistics.items()}
    magnitudes["weight_absmax"] = data.weight_absmax
    ranges = {"input_range low": data.input_range.low, "input_range high": data.input_range.high}
    tensors = magnitudes | ranges | {"ties": data.ties}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != (channels,):
            raise InputError(
                data.name, f"{name} has shape {tuple(tensor.shape)}", f"give one value for each of {channels}"
            )
    for index, part in enumerate(data.parts):
        name = f"part {index}"
        _check_part(data.name, name, part, channels)
        tensors |= {f"{name} x": part.x, f"{name} weight": part.weight}
        if part.sample_low is not None and part.sample_high is not None:
            tensors |= {f"{name} sample_low": part.sample_low, f"{name} sample_high": part.sample_high}
        weights = {"row_weight": part.row_weight, "output_weight": part.output_weight}
        given = {f"{name} {kind}": values for kind, values in weights.items() if values is not None}
        tensors |= given
        for weight_name, values in given.items():
            if bool((values < 0).any()):
                raise InputError(data.name, f"{weight_name} holds negative weights", "weigh errors with 0 or more")
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise NonFiniteError(f"site {data.name}: {name} holds NaN or infinity")
    for name, tensor in magnitudes.items():
        if bool((tensor < 0).any()):
            raise InputError(data.name, f"{name} holds negative magnitudes", "give abs-max, percentile or RMS")
    _check_order(data.name, "input_range", data.input_range.low, data.input_range.high)
    for index, part in enumerate(data.parts):
        if part.sample_low is not None and part.sample_high is not None:
            _check_order(data.name, f"the sample range of part {index}", part.sample_low, part.sample_high)


def _check_order(site: str, name: str, low: Tensor, high: Tensor) -> None:
    if bool((low > high).any()):
        raise InputError(site, f"{name} has a low end above its high end", "give the smallest and the largest value")


def _check_part(site: str, name: str, part: SitePart, channels: int) -> None:
    rows, columns = part.x.shape if part.x.dim() == 2 else (0, 0)
    fits = {
        "x": rows > 0 and columns > 0 and part.x.dtype == torch.float32,
        "groups": part.groups >= 1 and columns % part.groups == 0,
        "weight": part.weight.shape == (sum(part.out_features), columns // max(part.groups, 1))
        and part.weight.dtype == torch.float32,
        "out_features": all(f > 0 and f % max(part.groups, 1) == 0 for f in part.out_features),
        "channel": part.channel.shape == (columns,) and _indexes(part.channel, channels),
        "row_weight": part.row_weight is None
        or (part.row_weight.shape == (rows,) and part.row_weight.dtype == torch.float32),
        "output_weight": part.output_weight is None
        or (part.output_weight.shape == part.weight.shape[:1] and part.output_weight.dtype == torch.float32),
        "sample": part.sample is None or part.sample.shape == (rows,),
        "sample_low": _fits_samples(part, part.sample_low, channels),
        "sample_high": _fits_samples(part, part.sample_high, channels),
    }
    for field, fit in fits.items():
        if not fit:
            raise InputError(
                site, f"{field} of {name} has the wrong shape or type", "build the part as SitePart describes"
            )


def _fits_samples(part: SitePart, values: Tensor | None, channels: int) -> bool:
    if part.sample is None or values is None:
        return part.sample is None and values is None
    return values.dim() == 2 and values.shape[1] == channels and _indexes(part.sample, values.shape[0])


def _indexes(index: Tensor, size: int) -> bool:
    return index.numel() > 0 and int(index.min()) >= 0 and int(index.max()) < size


def read_energies(data: SiteData) -> Tensor:
    """(C,) float64 squared error at the output, summed over all rows, for every unit of squared error of a channel in every row."""
    read = torch.zeros(data.channels, dtype=torch.float64, device=data.device)
    for part in data.parts:
        squares, weight = by_block(part.weight, part).square(), outputs_by_block(part)
        squares = squares if weight is None else squares * weight.unsqueeze(2)
        read.index_add_(0, part.channel, part.mass * squares.sum(dim=1, dtype=torch.float64).flatten())
    return read
