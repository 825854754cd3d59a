"""A model of plain linear and convolution operators in place of the user's, and the way back to the user's tensors.

Computed weights are baked in, recurrent layers unrolled, and attention modules split into their projections.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.model._attention import Piece, split, split_modules
from alphasmith.objectives.model._parametrizations import BakedWeight, bake, baked_weights, joined, taken_apart
from alphasmith.objectives.model._recurrent import fuse, original_names, unroll, unrolled

__all__ = [
    "BakedWeight",
    "Piece",
    "Rewriting",
    "TakenApart",
    "bake_plain",
    "fuse",
    "needs_rewriting",
    "rewrite",
    "rewrite_like",
    "taken_apart_modules",
]


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """How the tensors of a rewritten model relate to those of the user's.

    Attributes:
        renamed: New name -> name in the user's model.
        pieces: Tensors that are rows of one of the user's.
        baked: Weights that the user's model computes.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    pieces: tuple[Piece, ...] = ()
    baked: tuple[BakedWeight, ...] = ()

    @property
    def names(self) -> dict[str, str]:
        """New name -> name of the tensor of the user's model that it is, or is a part of, where they differ."""
        return dict(self.renamed) | {piece.name: piece.whole for piece in self.pieces}

    def original(self, tensors: Mapping[str, Tensor], known: Container[str] | None = None) -> dict[str, Tensor]:
        """A rewritten model's tensors as the user's model has them.

        Args:
            tensors: All tensors of the rewritten model.
            known: Names that there may be; None: any. Weights that were computed in another way than by weight norm, or from
                tensors of other names than these, stay plain.

        Raises:
            InputError: Two tensors would get one name.
        """
        found = dict(tensors)
        for baked in self.baked:
            if known is None or all(name in known for name in baked.originals):
                taken_apart(found, baked)
        wholes: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            wholes.setdefault(piece.whole, []).append(piece)
        for whole, pieces in wholes.items():
            if all(piece.name in found for piece in pieces):
                ordered = sorted(pieces, key=lambda piece: piece.start)
                found[whole] = torch.cat([found.pop(piece.name) for piece in ordered])
        return original_names(found, self.renamed)

    def rewritten(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`original`, but for ``renamed``: those keep the names of the user's model."""
        found = dict(tensors)
        for piece in self.pieces:
            if piece.whole in tensors:
                found.pop(piece.whole, None)
                found[piece.name] = tensors[piece.whole][piece.start : piece.stop]
        for baked in self.baked:
            joined(found, baked)
        return found


@dataclass(frozen=True, kw_only=True)
class TakenApart:
    """Which modules of a model are built of linear layers in place of those that the user's model has.

    Attributes:
        recurrent: Names of recurrent layers, see :func:`rewrite`; all names of a module that has several.
        attention: Names of attention modules, likewise.
    """

    recurrent: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()


def taken_apart_modules(model: nn.Module) -> TakenApart:
    """The modules of a model that :func:`rewrite` has made."""
    return TakenApart(recurrent=unrolled(model), attention=split_modules(model))


def rewrite_like(model: nn.Module, modules: TakenApart, plain: Container[str]) -> None:
    """Rewrite a private copy of the user's model as another one was rewritten.

    Args:
        model: In evaluation mode; changed in place.
        modules: What is to be built of linear layers; computed weights in there are baked.
        plain: Full names of weights to bake where they are computed; all others stay computed.

    Raises:
        InputError: A module is not in the model, or cannot be replaced.
    """
    inside = tuple(f"{name}." for name in (*modules.recurrent, *modules.attention))
    names = {weight.name for weight in baked_weights(model)}
    bake(model, only={name for name in names if name in plain or name.startswith(inside)})
    if modules.recurrent:
        unroll(model, only=modules.recurrent)
    if modules.attention:
        split(model, only=modules.attention)
    made = taken_apart_modules(model)
    for wanted, found in ((modules.recurrent, made.recurrent), (modules.attention, made.attention)):
        for name in wanted:
            if name not in found:
                raise InputError("model", f"has no {name} that is taken apart", "pass the architecture that was packed")


def needs_rewriting(model: nn.Module) -> bool:
    """Whether :func:`rewrite` would change the model."""
    kinds = (nn.RNNBase, nn.MultiheadAttention)
    return any(isinstance(module, kinds) for module in model.modules()) or bool(baked_weights(model))


def rewrite(model: nn.Module, *, recurrent: bool = True, attention: bool = True) -> Rewriting:
    """Make a model of plain operators out of a private copy.

    Args:
        model: In evaluation mode; changed in place.
        recurrent: Also unroll ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``.
        attention: Also split ``nn.MultiheadAttention``.

    Raises:
        InputError: It is a bare recurrent layer.
    """
    baked = bake(model)
    renamed = unroll(model) if recurrent else {}
    others, pieces = split(model) if attention else ({}, ())
    return Rewriting(renamed=renamed | others, pieces=pieces, baked=baked)


def bake_plain(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Bake the computed weights of a private copy that a checkpoint holds plain.

    Args:
        model: In evaluation mode; changed in place.
        tensors: The checkpoint.
    """
    bake(model, only=tensors.keys())
