"""A weight and its rows under smoothing scales, decomposed once. Source: formulas fA1 to fA3, fB4."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from alphasmith.objectives.groups import group_channels
from alphasmith.objectives.joint.branch.rows import LayerRows
from alphasmith.objectives.joint.branch.settings import BranchSettings
from alphasmith.objectives.joint.low_rank.decomposition import Factors, decompose
from alphasmith.objectives.quantization.quantizers import code_scale
from alphasmith.objectives.smoothing import group_scales
from alphasmith.objectives.text import counted


class SmoothedWeight:
    """W s and X / s of one layer for one choice of alphas; the singular values are found when they are first asked for.

    Args:
        weight: (O, C, kernel), checked.
        rows: Of the layer, checked.
        settings: Their alphas and groups count.
        name: What to call the weight in errors and notes.

    Attributes:
        weight: As given.
        rows: As given.
        scales: (C,) s; None: 1.
        matrix: (O, D) float32 W s.
        notes: What people should know, a line each.
    """

    def __init__(self, weight: Tensor, rows: LayerRows, settings: BranchSettings, name: str) -> None:
        self.weight, self.rows, self._name = weight.detach(), rows, name
        self.notes: tuple[str, ...] = ()
        matrix = self.weight.to("cpu", torch.float32).flatten(1)
        channels = weight.shape[1]
        self._peaks = rows.channel_peaks(channels)
        self.scales: Tensor | None = None
        if settings.alphas:
            magnitudes = matrix.abs().amax(0).reshape(channels, -1).amax(1)
            self.scales = self._found(magnitudes, settings)
            self._peaks = self._peaks / self.scales
            matrix = matrix * self.scales.repeat_interleave(matrix.shape[1] // channels)
        self.matrix = matrix.contiguous()

    @cached_property
    def outputs(self) -> Tensor:
        """(T, O) of the float layer without its bias."""
        return self.rows.x @ self.weight.to("cpu", torch.float32).flatten(1).t()

    @cached_property
    def _factors(self) -> Factors:
        return decompose(self.matrix, rank=min(self.matrix.shape), name=self._name)

    def factors(self, rank: int) -> Factors:
        """The first ``rank`` singular values of the smoothed weight; what they were found from is kept."""
        whole = self._factors
        squares = whole.singular.double().square()
        total = float(squares.sum())
        return Factors(
            left=whole.left[:, :rank],
            right=whole.right[:rank],
            singular=whole.singular,
            kept=float(squares[:rank].sum()) / total if total else 1.0,
            notes=whole.notes,
        )

    def input_scale(self, bits: int) -> Tensor:
        """() step of a static range that holds all calibrated inputs."""
        return code_scale(self._peaks.amax(), "int4" if bits == 4 else "int8")

    def _found(self, magnitudes: Tensor, settings: BranchSettings) -> Tensor:
        alphas = settings.alphas
        labels = torch.zeros(magnitudes.shape, dtype=torch.int64)
        if len(alphas) > 1:
            grouping = group_channels(self._peaks, method=settings.group_method, k=len(alphas))
            labels = grouping.labels
            if grouping.k < len(alphas):
                self.notes += (
                    f"{self._name}: its channels make {counted(grouping.k, 'group')}, the first alphas count",
                )
                alphas = alphas[: grouping.k]
        return group_scales(self._peaks, magnitudes, alphas, labels)
