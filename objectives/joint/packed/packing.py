"""Every tensor of a model under a codebook or as it is, and the bytes of all of it. Source: claim B-6, formula fB10."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.codebook.clustering import MOST_ENTRIES
from alphasmith.objectives.joint.codebook.tensors import (
    CodebookEntry,
    CodebookSettings,
    CodebookWeight,
    decode_weight,
    encode_weight,
)
from alphasmith.objectives.joint.packed._classes import LayerClass, layer_classes
from alphasmith.objectives.joint.packed._layout import ModelLayout, read_layout
from alphasmith.objectives.joint.packed._lossless import SqueezedEntry, squeeze
from alphasmith.objectives.literals import CodebookStart, PackedCoding, StoredAs
from alphasmith.objectives.stored_types import misfit
from alphasmith.objectives.text import error_line, matches


@dataclass(frozen=True, kw_only=True)
class ClassClusters:
    """Entries of a table for every class of layer, 2 to 65536; None: its tensors stay float.

    Attributes:
        conv: Convolutions, transposed ones included, and their factors.
        recurrent: LSTM, GRU and RNN, also where they are taken apart into linear layers, and their factors.
        linear: Linear layers and their factors.
        embedding: Tables of vectors that are looked up.
        other: Tensors of two axes or more of any other module.
    """

    conv: int | None = 32
    recurrent: int | None = 64
    linear: int | None = 32
    embedding: int | None = 256
    other: int | None = 256

    def of(self, kind: LayerClass) -> int | None:
        """Those of one class."""
        found: int | None = getattr(self, kind)
        return found


@dataclass(frozen=True, kw_only=True)
class PackedSettings:
    """How the tensors of a model are stored.

    Attributes:
        clusters: Entries for every class of layer.
        start: Where the clustering starts from.
        coding: How indices are stored.
        float16: Store float32 tensors that stay float, and the tables, as float16 where that is fine enough for them.
        squeeze: Store buffers in fewer bytes without changing a bit, where that is possible.
        minimum: Tensors of fewer elements stay float; 0: whether a codebook saves bytes decides alone.
        channels: Output channels that share a table; None: one table a tensor.
        keep_zero: Hold one entry at 0; None: where a tenth of the weights is zero.
        exclude: ``fnmatch`` patterns of tensors or layers that stay float.
        iterations: Most steps of Lloyd's iteration.
        seed: Of the drawn start.
    """

    clusters: ClassClusters = ClassClusters()
    start: CodebookStart = "optimal"
    coding: PackedCoding = "smallest"
    float16: bool = False
    squeeze: bool = True
    minimum: int = 0
    channels: int | None = None
    keep_zero: bool | None = None
    exclude: Sequence[str] = ()
    iterations: int = 1000
    seed: int = 0


class PackedStructure(BaseModel):
    """What is stored of a model beside its tensors, as JSON.

    Tensors are named ``codebook/NAME/PART``, ``squeezed/NAME`` and ``plain/NAME``.

    Attributes:
        version: Of this layout of JSON and tensors.
        layout: What was done to the modules of the architecture.
        codebooks: Name -> codebook, with its digest.
        squeezed: Name -> shape and type of a tensor whose bytes are stored as LZMA2.
        halves: Names of float32 tensors that are stored as float16.
        strides: Name -> strides of a tensor whose elements do not lie in the order of its axes.
        aliases: Name of a tied tensor -> the name that it is stored under.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    layout: ModelLayout = ModelLayout()
    codebooks: dict[str, CodebookEntry] = {}
    squeezed: dict[str, SqueezedEntry] = {}
    halves: tuple[str, ...] = Field(default=(), strict=False)
    strides: dict[str, tuple[int, ...]] = Field(default={}, strict=False)
    aliases: dict[str, str] = {}

    def to_json(self) -> str:
        """Canonical text in one line; what has its default is left out."""
        return json.dumps(
            self.model_dump(mode="json", exclude_defaults=True), sort_keys=True, separators=(",", ":"),
            ensure_ascii=False,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """What became of one tensor.

    Attributes:
        name: Its full name.
        layer: The module it belongs to.
        kind: Class of that layer.
        stored: How it is stored.
        numbers: Its elements.
        entries: Entries of its largest table; 0 where it has none.
        requested: Entries asked for.
        bits: Bits of a packed index.
        coding: How its indices are stored; empty where it has none.
        float_bytes: Bytes it had.
        stored_bytes: Bytes of what is stored.
        packed_bytes: What it would take with packed indices, tables included; 0 where it has none.
        huffman_bytes: Likewise with a Huffman code.
        sqnr: Energy of the tensor over that of what was lost [dB]; None where nothing was, or the tensor is zero.
        reason: Why it is no codebook.
        notes: What the clustering has to say.
    """

    name: str
    layer: str
    kind: LayerClass
    stored: StoredAs
    numbers: int
    entries: int = 0
    requested: int = 0
    bits: int = 0
    coding: str = ""
    float_bytes: int
    stored_bytes: int
    packed_bytes: int = 0
    huffman_bytes: int = 0
    sqnr: float | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PackedBytes:
    """Bytes of a packed model by part. A safetensors file has a header besides, of names and places.

    Attributes:
        tables: Entries of all tables, and how many each has.
        indices: Packed or coded, with what it takes to read the code.
        floats: Tensors that stay float.
        integers: All other tensors.
        structure: The JSON.
    """

    tables: int
    indices: int
    floats: int
    integers: int
    structure: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, one.name) for one in fields(self))


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedModel:
    """A model as what is stored of it.

    Attributes:
        structure: What is stored as JSON.
        tensors: What is stored as tensors, on the CPU.
        report: What became of every tensor, tied ones once; empty where the model was read from a file.
    """

    structure: PackedStructure
    tensors: Mapping[str, Tensor]
    report: tuple[PackedTensor, ...] = ()

    def bytes(self) -> PackedBytes:
        """Bytes of all that is stored, by part."""
        parts = {"tables": 0, "indices": 0, "floats": 0, "integers": 0}
        for name, tensor in self.tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "codebook":
                part = "tables" if name.rpartition("/")[2] in ("table", "sizes") else "indices"
            elif kind == "squeezed" and rest in self.structure.squeezed:
                part = "floats" if "float" in self.structure.squeezed[rest].dtype else "integers"
            else:
                part = "floats" if tensor.is_floating_point() or tensor.is_complex() else "integers"
            parts[part] += tensor.nbytes
        return PackedBytes(**parts, structure=len(self.structure.to_json().encode()))

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors and of the JSON."""
        return self.bytes().total


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model as it is: parameters and persistent buffers, tied ones once."""
    return sum(tensor.nbytes for tensor in _owners(_tensors(model))[0].values())


def pack(model: nn.Module, settings: PackedSettings, *, covariances: Mapping[str, Tensor] | None = None) -> PackedModel:
    """Store a model: what saves bytes as a codebook, factors rather than their products, everything else as it is.

    Args:
        model: Dense, factored by :func:`~alphasmith.objectives.joint.low_rank.factorization.factorize`, taken apart by
            :func:`~alphasmith.objectives.model.plain_operators.rewrite`, normalizations folded, branches of
            :func:`~alphasmith.objectives.joint.branch.placement.branch_layers`, in any mixture; not modified.
            Buffers that are not persistent are taken from the architecture when it is restored.
        settings: How.
        covariances: Parameter -> (D, D) mean of x x^T over what it is multiplied with, see
            :func:`~alphasmith.objectives.joint.packed.inputs.parameter_inputs`: the indices of these make up for each other's errors
            (fB12). What the second factor of a layer reads follows from the first. None: every weight takes the nearest entry.

    Returns:
        The packed model; :func:`~alphasmith.objectives.joint.packed.restoring.restore` gives the model back.

    Raises:
        InputError: A setting is out of range, or the model keeps state that is no tensor.
        NonFiniteError: A parameter is NaN or infinite.
    """
    _check(settings)
    owners, aliases = _owners(_tensors(model))
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    classes = layer_classes(model, list(owners))
    layout = read_layout(model)
    tensors: dict[str, Tensor] = {}
    codebooks: dict[str, CodebookEntry] = {}
    squeezed: dict[str, SqueezedEntry] = {}
    known = dict(covariances or {})
    halves: list[str] = []
    strides: dict[str, tuple[int, ...]] = {}
    report: list[PackedTensor] = []
    for name, value in owners.items():
        layer, kind = classes[name]
        if name in parameters and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{name}: NaN or infinity in the parameter")
        # What a branch stores has its own types, under a digest.
        plain = _plain(name, value, settings.float16 and layer not in layout.branches)
        read = known.get(name)
        book, reason = _codebook(name, value, kind, plain, settings, covariance=read, weight=name in parameters)
        if read is not None and name.endswith(".right"):
            known[f"{layer}.left"] = _read_behind(name, value, book, read)
        constant = book is None and name not in parameters and layer not in layout.branches
        small = _squeezed(value, plain) if settings.squeeze and constant else None
        if small is not None:
            squeezed[name], tensors[f"squeezed/{name}"] = small
        elif book is None:
            tensors[f"plain/{name}"] = plain
            halves += [name] * (plain.dtype != value.dtype)
        else:
            tensors |= {f"codebook/{name}/{part}": one for part, one in book.tensors.items()}
            codebooks[name] = book.entry
        if order := _order(value):
            strides[name] = order
        told: dict[str, Any] = {
            "name": name,
            "layer": layer,
            "kind": kind,
            "numbers": value.numel(),
            "float_bytes": value.nbytes,
        }
        if small is not None:
            report.append(PackedTensor(**told, stored="squeezed", stored_bytes=small[1].nbytes, reason=reason))
        elif book is None:
            report.append(_told(told, value, plain, reason))
        else:
            report.append(_told_codebook(told, value, book, kind, settings))
    structure = PackedStructure(
        layout=layout, codebooks=codebooks, squeezed=squeezed, halves=tuple(halves), strides=strides, aliases=aliases,
    )  # fmt: skip
    return PackedModel(structure=structure, tensors=tensors, report=tuple(report))


def read_packed(structure: str | bytes, tensors: Mapping[str, Tensor]) -> PackedModel:
    """A packed model from what was stored of it.

    Args:
        structure: The JSON.
        tensors: The tensors.

    Raises:
        InputError: The JSON is none of ours.
    """
    try:
        found = PackedStructure.model_validate_json(structure)
    except ValidationError as error:
        raise InputError(
            "structure", f"describes no packed model ({error_line(error, 160)})", "take an intact copy"
        ) from error
    return PackedModel(structure=found, tensors=tensors)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and persistent buffers under all their names, as the model holds them."""
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError("model", f"{name} is {type(value).__name__}, no tensor", "keep only tensors in its state")
    return {name: value.detach() for name, value in state.items()}


def _owners(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under the first of their names, and the other names with that one."""
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, value in tensors.items():
        if value.numel():
            key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
            if first.setdefault(key, name) != name:
                aliases[name] = first[key]
    return {name: value for name, value in tensors.items() if name not in aliases}, aliases


def _plain(name: str, value: Tensor, float16: bool) -> Tensor:
    """A tensor as it is stored where it has no codebook, nobody else's."""
    found = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
    if float16 and value.dtype == torch.float32 and not misfit({name: found}, {name: torch.float16}):
        return found.half()
    return found


def _codebook(
    name: str,
    value: Tensor,
    kind: LayerClass,
    plain: Tensor,
    settings: PackedSettings,
    *,
    covariance: Tensor | None,
    weight: bool,
) -> tuple[CodebookWeight | None, str]:
    """The codebook of a tensor, or None and why it has none."""
    k = settings.clusters.of(kind)
    if not weight:
        return None, "it is a buffer"
    if not value.is_floating_point() or value.element_size() < 2:
        return None, f"{value.dtype} is no floating type of 16 bits or more"
    if value.dim() < 2:
        return None, "it is no matrix"
    if k is None:
        return None, f"tensors of {kind} layers stay float"
    if matches(name, settings.exclude) or matches(name.rpartition(".")[0], settings.exclude):
        return None, "it is excluded"
    if value.numel() < max(settings.minimum, 1):
        return None, f"it has fewer than {settings.minimum} elements" if value.numel() else "it is empty"
    coding: Literal["packed", "huffman"] = "packed" if settings.coding == "smallest" else settings.coding
    given = CodebookSettings(
        k=k, start=settings.start, keep_zero=settings.keep_zero, channels=settings.channels, coding=coding,
        iterations=settings.iterations, seed=settings.seed, half_tables=settings.float16,
    )  # fmt: skip
    made = encode_weight(value, given, covariance=covariance, name=name)
    if settings.coding == "smallest" and made.huffman_bytes < made.packed_bytes:
        made = made.in_coding("huffman")
    if made.stored_bytes >= plain.nbytes:
        return None, f"its codebook takes {made.stored_bytes} bytes in place of {plain.nbytes}"
    return made, ""


def _squeezed(value: Tensor, plain: Tensor) -> tuple[SqueezedEntry, Tensor] | None:
    """A buffer in fewer bytes bit by bit, unless it takes fewer yet as float16."""
    made = squeeze(value)
    return made if made is not None and made[1].nbytes <= plain.nbytes else None


def _read_behind(name: str, value: Tensor, book: CodebookWeight | None, read: Tensor) -> Tensor:
    """(r, r) mean of x x^T over what the second factor of a layer reads; ``read`` is that of the first one's inputs."""
    first = value if book is None else decode_weight(name, book.entry, book.tensors)
    rows = first.detach().to("cpu", torch.float64).flatten(1)
    return rows @ read.to(rows) @ rows.T


def _order(value: Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor that is not contiguous; empty where it is, or is not dense."""
    if value.is_contiguous() or not value.numel():
        return ()
    size = 1
    for stride, length in sorted(zip(value.stride(), value.shape, strict=True)):
        if length > 1:
            if stride != size:
                return ()
            size *= length
    return tuple(value.stride())


def _told(about: dict[str, Any], value: Tensor, plain: Tensor, reason: str) -> PackedTensor:
    halved = plain.dtype != value.dtype
    lost = float((plain.to(value.dtype) - value.cpu()).double().square().sum()) if halved else 0.0
    return PackedTensor(
        **about,
        stored="float16" if halved else "plain",
        stored_bytes=plain.nbytes,
        sqnr=_sqnr(value, lost),
        reason=reason,
    )


def _told_codebook(
    about: dict[str, Any], value: Tensor, book: CodebookWeight, kind: LayerClass, settings: PackedSettings
) -> PackedTensor:
    return PackedTensor(
        **about,
        stored="codebook",
        entries=int(book.tensors["sizes"].max()),
        requested=settings.clusters.of(kind) or 0,
        bits=book.entry.bits,
        coding=book.entry.coding,
        stored_bytes=book.stored_bytes,
        packed_bytes=book.packed_bytes,
        huffman_bytes=book.huffman_bytes,
        sqnr=_sqnr(value, book.error),
        notes=book.notes,
    )


def _sqnr(value: Tensor, lost: float) -> float | None:
    energy = float(value.double().square().sum()) if value.is_floating_point() else 0.0
    return 10 * math.log10(energy / lost) if lost > 0 and energy > 0 else None


def _check(settings: PackedSettings) -> None:
    if settings.coding not in get_args(PackedCoding):
        known = ", ".join(get_args(PackedCoding))
        raise InputError("clusters.coding", f"{settings.coding!r} is unknown", f"use one of {known}")
    for one in fields(settings.clusters):
        k = getattr(settings.clusters, one.name)
        if k is not None and not 2 <= k <= MOST_ENTRIES:
            raise InputError(f"clusters.{one.name}", f"{k} entries make no table", f"use 2 to {MOST_ENTRIES}")
    if settings.minimum < 0:
        raise InputError("clusters.minimum", f"{settings.minimum} is negative", "use 0 or more")
