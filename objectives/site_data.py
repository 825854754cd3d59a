"""What is needed to score scales at one site without the model."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True, kw_only=True)
class SitePart:
    """Operators of a site that read the same rows, with their weights concatenated over outputs.

    Linear operators of a site share one part. Convolutions with different kernels or strides each have their own,
    because their patches differ.

    Attributes:
        operators: Names of the operators, in the order in which their rows stand in ``weight``.
        x: (T, D) float32 rows; D = C for linear, channels*kernel (flattened patch, all groups) for conv.
        weight: (O, D // groups) float32.
        out_features: Rows of ``weight`` that belong to each operator; sums to O. A per-tensor weight scale is one per operator.
        channel: (D,) int64: the site channel of every column of x.
        groups: Convolution groups: outputs o in block g see columns of block g only. 1 = dense.
        sample: (T,) int64 or None: for conv, the row of ``sample_absmax`` each patch was cut from.
        sample_absmax: (S, C) float32 or None: for conv, abs-max per channel of every sampled input (its dynamic range).
    """

    operators: tuple[str, ...]
    x: torch.Tensor
    weight: torch.Tensor
    out_features: tuple[int, ...]
    channel: torch.Tensor
    groups: int = 1
    sample: torch.Tensor | None = None
    sample_absmax: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SiteData:
    """One site's rows, weights and statistics.

    Attributes:
        name: Site name.
        parts: One or more parts that share the C channels.
        activation_statistic: (C,) the statistic a_j chosen for smoothing (abs-max, percentile or RMS), float32.
        activation_absmax: (C,) abs-max over ALL calibration data: the static quantization range.
        weight_absmax: (C,) w_j = max over every output of every operator of |W_:j|.
        ties: (C,) int64, see ``Site.ties``.
    """

    name: str
    parts: tuple[SitePart, ...]
    activation_statistic: torch.Tensor
    activation_absmax: torch.Tensor
    weight_absmax: torch.Tensor
    ties: torch.Tensor


def to_device(data: SiteData, device: torch.device | str) -> SiteData:
    """The same data with every tensor on ``device``."""

    def move(record: SiteData | SitePart) -> dict[str, torch.Tensor]:
        values = {f.name: getattr(record, f.name) for f in fields(record)}
        return {name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}

    parts = tuple(replace(part, **move(part)) for part in data.parts)  # type: ignore[arg-type]
    return replace(data, parts=parts, **move(data))  # type: ignore[arg-type]
