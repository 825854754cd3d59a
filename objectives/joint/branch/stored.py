"""Branch and residual as plain tensors and a JSON-able entry, and back, bit for bit. Source: formula fB11."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.branch.settings import ActivationBits, BranchBits, BranchSettings
from alphasmith.objectives.joint.codebook.tensors import (
    CodebookEntry,
    CodebookSettings,
    WeightType,
    decode_weight,
    encode_weight,
    stored_digest,
)
from alphasmith.objectives.joint.low_rank.decomposition import Factors
from alphasmith.objectives.literals import ResidualForm
from alphasmith.objectives.quantization.quantizers import (
    QuantizedTensor,
    dequantize_weight,
    pack_int4,
    quantize_weight,
    unpack_int4,
)
from alphasmith.objectives.quantization.scheme import ActivationGranularity, Scheme

Size = Annotated[int, Field(ge=1)]
#: What one table of a codebook has beside its entries: their number.
_TABLE_BYTES = 4
#: A factor of the branch in 8 bits: a step for every singular value.
_FACTOR = Scheme(weights="int8", weight_granularity="channel", activations="none")


class BranchEntry(BaseModel):
    """What is stored of a weight beside its tensors, as JSON.

    Attributes:
        shape: Shape of the weight, (O, C, kernel).
        dtype: Type the weight had.
        rank: Of the branch.
        branch_bits: Of a number of its factors.
        residual: Form of the residual.
        group_size: Columns of the matrix (O, D) that share a step; None: all of an output channel.
        codebook: Of the residual, where it is one.
        smoothed: Whether the input is divided by scales.
        activation_bits: Of the input of the residual; None: not quantized.
        activation_granularity: Where its range comes from.
        digest: SHA-256 over all this and the tensors, 64 hexadecimal digits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    shape: tuple[Size, ...] = Field(strict=False, min_length=2)  # JSON has lists
    dtype: WeightType
    rank: int = Field(ge=0)
    branch_bits: BranchBits
    residual: ResidualForm
    group_size: int | None = Field(ge=2)
    codebook: CodebookEntry | None
    smoothed: bool
    activation_bits: ActivationBits | None
    activation_granularity: ActivationGranularity
    digest: str

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(O, D) of the weight as a matrix."""
        return self.shape[0], math.prod(self.shape[1:])


@dataclass(frozen=True, eq=False, kw_only=True)
class BranchParts:
    """Branch and residual as they are multiplied.

    Attributes:
        smooth: (C,) the input is divided by; None: by nothing.
        left: (O, r) float32, the scales of the singular values in it; None: no branch.
        right: (r, D) float32.
        codes: (O, D) int8 of a residual with one step an output channel; else None.
        step: (O,) float32, the steps of the codes; else None.
        residual: (O, D) float32, what the stored residual stands for.
        input_scale: () float32 step of the residual's input; None: taken from it, or it is not quantized.
    """

    smooth: Tensor | None
    left: Tensor | None
    right: Tensor | None
    codes: Tensor | None
    step: Tensor | None
    residual: Tensor
    input_scale: Tensor | None

    def smoothed_weight(self) -> Tensor:
        """(O, D) branch and residual together: what stands for W s."""
        if self.left is None or self.right is None:
            return self.residual
        return self.left @ self.right + self.residual


def seal(
    weight: Tensor, settings: BranchSettings, tensors: Mapping[str, Tensor], codebook: CodebookEntry | None
) -> BranchEntry:
    """The entry of stored tensors, with its digest.

    Args:
        weight: (O, C, kernel) that they stand for.
        settings: How they were made.
        tensors: All that is stored.
        codebook: Entry of the residual, where it is a codebook.
    """
    entry = BranchEntry(
        shape=tuple(weight.shape),
        dtype=str(weight.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # one of those that a layer can have
        rank=settings.rank,
        branch_bits=settings.branch_bits,
        residual=settings.residual,
        group_size=settings.group_size if settings.residual != "codebook" else None,
        codebook=codebook,
        smoothed=settings.alpha is not None,
        activation_bits=settings.activation_bits,
        activation_granularity=settings.activation_granularity,
        digest="",
    )
    return entry.model_copy(update={"digest": stored_digest(entry, tensors)})


def store_factors(factors: Factors, bits: BranchBits) -> dict[str, Tensor]:
    """Both factors below one scale per singular value, so that small ones keep their bits and any unit will do.

    Args:
        factors: Of a matrix (O, D) at rank r.
        bits: Of a stored number.

    Returns:
        ``left`` (r, O), ``right`` (r, D) and ``branch_scale`` (r,), their product of scales.
    """
    thin = (factors.left.to(torch.float32).t(), factors.right.to(torch.float32))
    if bits == 8:
        made = [quantize_weight(one.contiguous(), _FACTOR) for one in thin]
        values, scales = [one.values for one in made], [one.scale.reshape(-1) for one in made]
    else:
        peaks = [one.abs().amax(1) for one in thin]
        scales = [torch.where(peak == 0, 1.0, peak) for peak in peaks]
        values = [(one / scale.unsqueeze(1)).to(torch.float16) for one, scale in zip(thin, scales, strict=True)]
    return {"left": values[0], "right": values[1], "branch_scale": scales[0] * scales[1]}


def restore_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(O, r) and (r, D) float32 of what :func:`store_factors` made, the scales in the first."""
    left = tensors["left"].to(torch.float32) * tensors["branch_scale"].unsqueeze(1)
    return left.t().contiguous(), tensors["right"].to(torch.float32)


def store_residual(
    residual: Tensor, settings: BranchSettings, name: str
) -> tuple[dict[str, Tensor], CodebookEntry | None, tuple[str, ...]]:
    """A residual (O, D) in its stored form, its entry if that is a codebook, and notes.

    Args:
        residual: float32.
        settings: Which form.
        name: What to call it in errors and notes.
    """
    if settings.residual == "codebook":
        book = CodebookSettings(k=settings.k, channels=settings.channels)
        made = encode_weight(residual, book, name=name)
        return {f"residual_{key}": value for key, value in made.tensors.items()}, made.entry, made.notes
    found = quantize_weight(residual, _codes(settings.residual, settings.group_size))
    values = pack_int4(found.values) if settings.residual == "int4" else found.values
    return {"residual_codes": values, "residual_scale": found.scale}, None, ()


def assembled(entry: BranchEntry, tensors: Mapping[str, Tensor], name: str) -> BranchParts:
    """Branch and residual of tensors that fit their entry; :func:`restore_branch` checks that.

    Args:
        entry: Of the weight.
        tensors: What is stored.
        name: What to call it in errors.

    Raises:
        InputError: Its codebook is corrupt.
    """
    left, right = restore_factors(tensors) if entry.rank else (None, None)
    codes = step = None
    if entry.codebook is not None:
        books = {key.removeprefix("residual_"): value for key, value in tensors.items() if key.startswith("residual_")}
        residual = decode_weight(name, entry.codebook, books).contiguous()
    else:
        values, scale = tensors["residual_codes"], tensors["residual_scale"]
        found = unpack_int4(values, entry.matrix_shape[1]) if entry.residual == "int4" else values
        residual = dequantize_weight(QuantizedTensor(found, scale), _codes(entry.residual, entry.group_size))
        if entry.group_size is None:
            codes, step = found, scale.reshape(-1)
    return BranchParts(
        smooth=tensors.get("smooth"),
        left=left,
        right=right,
        codes=codes,
        step=step,
        residual=residual,
        input_scale=tensors.get("input_scale"),
    )


def restore_branch(name: str, entry: Mapping[str, Any] | BranchEntry, tensors: Mapping[str, Tensor]) -> BranchParts:
    """Branch and residual out of what was stored: bit-identical wherever it is read. Source: formula fB11.

    Args:
        name: What to call the weight in errors.
        entry: What was stored as JSON.
        tensors: What was stored as tensors.

    Raises:
        InputError: Something is missing or of another shape, or the digest is another one.
    """
    known = checked_entry(name, entry)
    layout = stored_layout(known)
    own = {key: value for key, value in tensors.items() if known.codebook is None or not key.startswith("residual_")}
    found = {key: (value.dtype, tuple(value.shape)) for key, value in own.items()}
    wrong = sorted(key for key in {*found, *layout} if found.get(key) != layout.get(key))
    if wrong:
        raise _corrupt(name, f"{', '.join(wrong)} missing, unknown or of another shape than its entry says")
    digest = stored_digest(known, tensors)
    if digest != known.digest:
        raise _corrupt(name, f"it has the digest {digest}, {known.digest} is recorded")
    if known.codebook is not None and known.codebook.shape != known.matrix_shape:
        raise _corrupt(name, f"its residual has shape {known.codebook.shape}, not {known.matrix_shape}")
    return assembled(known, tensors, name)


def checked_entry(name: str, entry: Mapping[str, Any] | BranchEntry) -> BranchEntry:
    """An entry as it was stored.

    Args:
        name: What to call the weight in errors.
        entry: JSON.

    Raises:
        InputError: It is no entry, or contradicts itself.
    """
    try:
        known = entry if isinstance(entry, BranchEntry) else BranchEntry.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _corrupt(name, f"its entry cannot be read ({where}: {first['msg']})") from error
    if (known.residual == "codebook") != (known.codebook is not None):
        raise _corrupt(name, f"its residual {known.residual} contradicts its codebook")
    return known


def stored_layout(entry: BranchEntry) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> type and shape of every tensor that belongs to an entry, without those of a codebook."""
    rows, columns = entry.matrix_shape
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if entry.smoothed:
        found["smooth"] = (torch.float32, (entry.shape[1],))
    if entry.activation_bits is not None and entry.activation_granularity == "static":
        found["input_scale"] = (torch.float32, ())
    if entry.rank:
        factor = torch.float16 if entry.branch_bits == 16 else torch.int8
        found |= {"left": (factor, (entry.rank, rows)), "right": (factor, (entry.rank, columns))}
        found["branch_scale"] = (torch.float32, (entry.rank,))
    if entry.residual == "int4":
        found["residual_codes"] = (torch.uint8, (rows, -(-columns // 2)))
    elif entry.residual == "int8":
        found["residual_codes"] = (torch.int8, (rows, columns))
    if entry.residual != "codebook":
        groups = 1 if entry.group_size is None else -(-columns // entry.group_size)
        found["residual_scale"] = (torch.float32, (rows, groups))
    return found


def stored_size(shape: Sequence[int], settings: BranchSettings) -> int:
    """Bytes that a weight takes under given settings; of a codebook, at most.

    Args:
        shape: (O, C, kernel).
        settings: How.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    total = 4 * shape[1] * (settings.alpha is not None)
    total += 4 * (settings.activation_bits is not None and settings.activation_granularity == "static")
    total += settings.rank * ((rows + columns) * settings.branch_bits // 8 + 4)
    if settings.residual == "codebook":
        tables = 1 if settings.channels is None else -(-rows // settings.channels)
        bits = (settings.k - 1).bit_length()
        return total + tables * (4 * settings.k + _TABLE_BYTES) + (rows * columns * bits + 7) // 8
    groups = 1 if settings.group_size is None else -(-columns // settings.group_size)
    return total + rows * (-(-columns // 2) if settings.residual == "int4" else columns) + 4 * rows * groups


def _codes(residual: ResidualForm, group_size: int | None) -> Scheme:
    return Scheme(
        weights="int4" if residual == "int4" else "int8",
        weight_granularity="channel" if group_size is None else "group",
        group_size=group_size,
        activations="none",
    )


def _corrupt(name: str, problem: str) -> InputError:
    return InputError(name, problem, "export the model again, or take an intact copy")
