"""How a weight becomes branch and residual. Source: formula fB11."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.codebook.clustering import MOST_ENTRIES
from alphasmith.objectives.literals import GroupMethod, ResidualForm
from alphasmith.objectives.quantization.scheme import ActivationGranularity

BranchBits = Literal[8, 16]
ActivationBits = Literal[4, 8]


@dataclass(frozen=True, kw_only=True)
class BranchSettings:
    """How one weight W (O, C, kernel) becomes smoothing scales s, a branch L of low rank and a residual R = W s - L. Source: formula fB11.

    Attributes:
        alpha: Coefficient of formula fA1 for all channels, or one a group of channels, in ascending order of magnitude; None: s = 1, and
            none is stored.
        group_method: How channels are divided where there are several alphas.
        rank: Of the branch, 0: none. At most the rank from which two factors have no fewer numbers than the weight.
        branch_bits: Of a number of its factors: 16 (float16 below a scale per singular value) or 8 (int8, likewise).
        residual: int4 or int8 codes, or entries of a codebook.
        group_size: Columns of the weight as a matrix (O, D) that share a step of the codes; None: all of an output channel.
        k: Entries of a table, 2 to 65536.
        channels: Output channels that share a table; None: one table.
        activation_bits: Of the input of the residual; None: it is not quantized. The branch reads the input as it is.
        activation_granularity: ``static``: one range, set by calibration; ``token``: that of every row at run time, for convolutions of
            every sample.
        refits: Most rounds that fit the branch again to what the residual leaves, 0: none.
    """

    alpha: float | tuple[float, ...] | None = 0.5
    group_method: GroupMethod = "kmeans"
    rank: int = 16
    branch_bits: BranchBits = 16
    residual: ResidualForm = "int4"
    group_size: int | None = None
    k: int = 16
    channels: int | None = None
    activation_bits: ActivationBits | None = 8
    activation_granularity: ActivationGranularity = "static"
    refits: int = 0

    def __post_init__(self) -> None:
        if not all(math.isfinite(alpha) for alpha in self.alphas):
            raise InputError("branch.alpha", f"{self.alpha} is not finite", "use numbers such as 0.5")
        if self.alpha == ():
            raise InputError("branch.alpha", "names no group", "give a number, or one a group")
        for field, value, known in (
            ("branch.group_method", self.group_method, get_args(GroupMethod)),
            ("branch.bits", self.branch_bits, get_args(BranchBits)),
            ("branch.residual", self.residual, get_args(ResidualForm)),
            ("branch.activation_bits", self.activation_bits, (None, *get_args(ActivationBits))),
            ("branch.activation_granularity", self.activation_granularity, get_args(ActivationGranularity)),
        ):
            _check_known(field, value, known)
        if not 2 <= self.k <= MOST_ENTRIES:
            raise InputError("branch.k", f"{self.k} entries make no table", f"use 2 to {MOST_ENTRIES}")
        for field, number, least in (
            ("branch.rank", self.rank, 0),
            ("branch.refits", self.refits, 0),
            ("branch.group_size", self.group_size, 2),
            ("branch.channels", self.channels, 1),
        ):
            if number is not None and number < least:
                raise InputError(field, f"{number} is below {least}", f"use {least} or more")

    @property
    def alphas(self) -> tuple[float, ...]:
        """One a group; empty without smoothing."""
        if self.alpha is None:
            return ()
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)


def _check_known(field: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        words = ", ".join("none" if word is None else str(word) for word in known)
        raise InputError(field, f"{value!r} is unknown", f"use one of {words}")
