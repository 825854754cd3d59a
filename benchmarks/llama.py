"""LLaMA-shaped models of any size with function-preserving outlier channels, and media for them."""

from __future__ import annotations

import torch
from torch import nn

from alphasmith.objectives.demo.outliers import NormPair, with_outliers
from alphasmith.objectives.demo.training import make_seeded

_VOCABULARY = 512
_LENGTH = 64


def llama(*, hidden: int, layers: int, seed: int = 0) -> nn.Module:
    """A random LLaMA-architecture model; 1 % of the channels behind every norm are 20 to 60 times larger, undone in the weights.

    Its sites have real shapes, norms and folds; its language is noise, so only losses of sites and times mean something.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=_VOCABULARY,
        initializer_range=hidden**-0.5,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        attn_implementation="eager",
    )

    def build() -> nn.Module:
        model: nn.Module = LlamaForCausalLM(config).eval()
        return model

    pairs = []
    for n in range(layers):
        block = f"model.layers.{n}"
        attention = tuple(f"{block}.self_attn.{name}_proj" for name in "qkv")
        mlp = tuple(f"{block}.mlp.{name}_proj" for name in ("gate", "up"))
        pairs += [
            NormPair(norm=f"{block}.input_layernorm", consumers=attention),
            NormPair(norm=f"{block}.post_attention_layernorm", consumers=mlp),
        ]
    return with_outliers(make_seeded(build, seed), pairs, seed=seed)[0]


def token_batches(count: int, *, batch: int = 8, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """``count`` batches of ``batch`` random windows of 64 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, _VOCABULARY, (count * batch, _LENGTH), generator=generator)
    return [{"input_ids": part} for part in ids.split(batch)]
