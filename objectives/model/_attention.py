"""``nn.MultiheadAttention`` as linear operators.

It computes its four products by functional calls, and in evaluation mode inside one fused kernel, where no quantizer reaches
them. Here q, k, v and the output are ``nn.Linear`` operators around the same attention.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive rows of a tensor of the user's model that are a tensor of their own here.

    Attributes:
        name: Full name of the piece.
        whole: Full name of the tensor in the user's model.
        start, stop: Rows.
    """

    name: str
    whole: str
    start: int
    stop: int


class SplitAttention(nn.Module):
    """An ``nn.MultiheadAttention`` built of ``nn.Linear`` operators, with the arguments and outputs of the module it replaces.

    Args:
        source: The module to replace; of its packed projections the parts are copied, everything else is shared.
    """

    #: What ``nn.TransformerEncoderLayer`` and its stack look at before they hand everything to one fused kernel.
    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = source.embed_dim, source.kdim, source.vdim
        self.num_heads, self.head_dim = source.num_heads, source.head_dim
        self.dropout = source.dropout
        self.batch_first = source.batch_first
        self.add_zero_attn = source.add_zero_attn
        packed = source.in_proj_weight
        bias = source.in_proj_bias
        separate = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        weights = separate if packed is None else packed.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(w, b, shared=packed is None) for w, b in zip(weights, biases, strict=True)
        )
        self.out_proj = source.out_proj
        self.bias_k, self.bias_v = source.bias_k, source.bias_v
        self.train(source.training)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.embed_dim}, {self.num_heads}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as ``nn.MultiheadAttention`` does.

        Args:
            query: (L, B, E), or (B, L, E) if ``batch_first``, or (L, E) for one sequence.
            key: (S, B, kdim), likewise.
            value: (S, B, vdim), likewise.
            key_padding_mask: (B, S), or (S,) for one sequence: True, or what is added, where a key is not attended to.
            need_weights: Also return the attention weights.
            attn_mask: (L, S) or (B * heads, L, S): True, or what is added, where no attention is allowed.
            average_attn_weights: Average the weights over the heads.
            is_causal: Says that ``attn_mask`` is the causal one.

        Returns:
            The output in the layout of ``query``; and the weights (B, L, S), (B, heads, L, S) if not averaged, without B for
            one sequence, or None.
        """
        batched = query.dim() == 3
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        batch, _, length, _ = q.shape
        k = self._extended(k, self.bias_k)
        v = self._extended(v, self.bias_v)
        causal = is_causal and attn_mask is not None and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k.shape[2])
        weights = None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        # (B, heads, L, d) -> the layout of the query
        order = (0, 2, 1, 3) if self.batch_first or not batched else (2, 0, 1, 3)
        rows = mixed.permute(order).reshape(*((batch, length) if order[0] == 0 else (length, batch)), self.embed_dim)
        output = self.out_proj(rows if batched else rows[0])
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        return output, weights

    def _heads(self, x: Tensor) -> Tensor:
        """Projected rows in the layout of the input -> (B, heads, L, d)."""
        if x.dim() == 2:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return torch.as_tensor(x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2))

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values with the learned one and the zero one after them, where the module has such."""
        if bias is not None:
            learned = bias.reshape(1, 1, self.num_heads, self.head_dim).transpose(1, 2)
            x = torch.cat([x, learned.expand(x.shape[0], -1, -1, -1)], dim=2)
        return functional.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
        """(B or 1, heads or 1, L, S) what is added to the scores; keys that were added are always attended to."""
        masks = []
        if attention is not None:
            added = _added(attention, q.dtype)
            masks.append(added.unflatten(0, (q.shape[0], -1)) if added.dim() == 3 else added[None, None])
        if padding is not None:
            masks.append(_added(padding, q.dtype).reshape(q.shape[0], 1, 1, -1))
        masks = [functional.pad(mask, (0, keys - mask.shape[-1])) for mask in masks]
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]


def split_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the attention modules that are built of ``nn.Linear``, every name of one that has several."""
    found = model.named_modules(remove_duplicate=False)
    return tuple(name for name, module in found if isinstance(module, SplitAttention))


def split(model: nn.Module, only: Container[str] | None = None) -> tuple[dict[str, str], tuple[Piece, ...]]:
    """Replace every ``nn.MultiheadAttention`` of a private copy by an equivalent built of ``nn.Linear``.

    Left as they are: subclasses that compute something else, modules with hooks, and those whose projections are shared
    with another module or are no parameters.

    Args:
        model: Changed in place.
        only: Names of the modules to replace; None: all.

    Returns:
        New parameter name -> original one for tensors that are only renamed, and the pieces of those that are split.
    """
    holders: dict[int, int] = {}
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            holders[id(tensor)] = holders.get(id(tensor), 0) + 1
    found = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.MultiheadAttention)
        and name
        and (only is None or name in only)
        and _can_be_split(module, holders)
    ]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # its way into the fused kernel
    built = {module: SplitAttention(module) for module in dict.fromkeys(module for _, module in found)}
    names: dict[str, str] = {}
    pieces: list[Piece] = []
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, built[module])
        for number, letter in enumerate("qkv"):
            start, stop = number * module.embed_dim, (number + 1) * module.embed_dim
            if module.in_proj_weight is None:
                names[f"{name}.{letter}_proj.weight"] = f"{name}.{letter}_proj_weight"
            for leaf in ("weight", "bias"):
                whole = f"in_proj_{leaf}"
                if module._parameters.get(whole) is not None:
                    pieces.append(
                        Piece(name=f"{name}.{letter}_proj.{leaf}", whole=f"{name}.{whole}", start=start, stop=stop)
                    )
    return names, tuple(pieces)


def _can_be_split(module: nn.MultiheadAttention, holders: dict[int, int]) -> bool:
    own = module._parameters
    packed = [name for name in ("in_proj_weight", "in_proj_bias") if own.get(name) is not None]
    separate = all(own.get(f"{letter}_proj_weight") is not None for letter in "qkv")
    return (
        type(module).forward is nn.MultiheadAttention.forward
        and not {"forward"}.intersection(vars(module))
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and ("in_proj_weight" in packed or separate)
        and all(holders[id(tensor)] == 1 for tensor in own.values() if tensor is not None)
    )


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores."""
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.bool(), float("-inf"))


def _linear(weight: Tensor | None, bias: Tensor | None, *, shared: bool) -> nn.Linear:
    if weight is None:
        raise ValueError("an attention module has neither packed nor separate projections")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight if shared and isinstance(weight, nn.Parameter) else _part(weight)
    if bias is not None:
        linear.bias = _part(bias)
    return linear


def _part(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
