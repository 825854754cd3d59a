"""What a layer reads: sampled rows and the range of every channel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.calibrate import calibrate
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites.types import Operator, Site

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerRows:
    """Rows that a layer multiplies with its weight.

    Attributes:
        x: (T, D) float32; D = C of a linear layer, C * kernel of a convolution: patches laid out as ``weight.flatten(1)`` is.
        peaks: (C,) largest magnitude of every channel over all data; None: over ``x``.
        sample_peaks: (T, C) that of the sample which each patch was cut from; None: of the row itself.
    """

    x: Tensor
    peaks: Tensor | None = None
    sample_peaks: Tensor | None = None

    def channel_peaks(self, channels: int) -> Tensor:
        """(C,) largest magnitudes."""
        if self.peaks is not None:
            return self.peaks
        return self.x.abs().amax(0).reshape(channels, -1).amax(1)

    def check(self, weight: Tensor, name: str) -> None:
        """Refuse what a weight (O, C, kernel) cannot be multiplied with.

        Args:
            weight: Of the layer.
            name: What to call it in errors.

        Raises:
            InputError: Shapes do not fit, or there is no row.
            NonFiniteError: A row, a range or the weight holds NaN or infinity.
        """
        if weight.dim() < 2 or not weight.numel() or not weight.is_floating_point():
            problem = f"{tuple(weight.shape)} of {weight.dtype} is no weight of a layer"
            raise InputError(name, problem, "give a floating (O, C), or (O, C, kernel)")
        columns, channels = weight[0].numel(), weight.shape[1]
        if self.x.dim() != 2 or not self.x.shape[0] or self.x.shape[1] != columns:
            problem = f"rows {tuple(self.x.shape)} do not fit {tuple(weight.shape)}"
            raise InputError(name, problem, f"give at least one row of {columns} numbers")
        for what, values, shape in (
            ("peaks", self.peaks, (channels,)),
            ("sample_peaks", self.sample_peaks, (self.x.shape[0], channels)),
        ):
            if values is not None and tuple(values.shape) != shape:
                raise InputError(name, f"{what} {tuple(values.shape)} are not {shape}", "give one a channel")
        for what, found in (
            ("weight", weight),
            ("rows", self.x),
            ("peaks", self.peaks),
            ("sample peaks", self.sample_peaks),
        ):
            if found is not None and not bool(torch.isfinite(found).all()):
                raise NonFiniteError(f"{name}: NaN or infinity in its {what}")


def collect_rows(
    model: nn.Module, batches: Iterable[Batch], *, count: int, seed: int, layers: Sequence[str] | None = None
) -> dict[str, LayerRows]:
    """Rows of linear layers and convolutions while the model runs once over the data, in bounded memory. Source: claim A-1.

    Args:
        model: Left as it was.
        batches: Read once.
        count: Rows kept of a layer.
        seed: Of the sampling; rows depend on it, on the layer's name and on the samples, not on the batch size.
        layers: Names; None: all, but for grouped convolutions.

    Returns:
        Name -> rows, for the layers that the data reach.

    Raises:
        InputError: No batches, a layer that does not exist, or activations that are not finite.
    """
    known = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, CONVOLUTIONS) and module.groups == 1)
    }
    for name in layers or ():
        if name not in known:
            raise InputError(name, "is no linear layer or convolution of one group", f"use one of {', '.join(known)}")
    sites = [_site(name, known[name]) for name in (known if layers is None else layers)]
    record = calibrate(model, sites, batches, rows=count, seed=seed)
    found = {}
    for name, seen in record.sites.items():
        (part,) = seen.parts
        of_samples = None
        if part.sample is not None and part.sample_low is not None and part.sample_high is not None:
            of_samples = torch.maximum(part.sample_high, -part.sample_low).clamp_min(0)[part.sample]
        found[name] = LayerRows(x=part.x, peaks=seen.absmax.clamp_min(0), sample_peaks=of_samples)
    return found


def _site(name: str, module: nn.Module) -> Site:
    """A layer by itself: its scales are divided at its own input, whoever else reads the tensor."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    convolution = isinstance(module, CONVOLUTIONS)
    operator = Operator(
        name=name,
        weight=f"{name}.weight",
        bias=None,
        kind="conv" if convolution else "linear",
        transposed=False,
        raw=False,
        in_channels=weight.shape[1],
        out_channels=weight.shape[0],
        kernel=tuple(weight.shape[2:]),
    )
    return Site(
        name=name,
        operators=(operator,),
        channels=weight.shape[1],
        mode="explicit",
        reason="",
        ties=torch.arange(weight.shape[1]),
        edits=(),
        producers=(),
    )
