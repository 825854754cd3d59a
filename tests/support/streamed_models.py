"""Small Hugging Face folders whose models have repeated blocks, and some whose models have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.run_cases import LENGTH, VOCABULARY, WIDTH, seeded


def deep_llama(layers: int = 3, **changes: Any) -> nn.Module:
    """Grouped-query attention, loud norm channels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes, **changes)
    return seeded(lambda: LlamaForCausalLM(config))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
    )
    return seeded(lambda: GPT2LMHeadModel(config))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return seeded(lambda: BertModel(BertConfig(vocab_size=VOCABULARY, **sizes)))


def _gemma2() -> nn.Module:
    """Blocks in turn with a window and without: they are called with two masks."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(vocab_size=VOCABULARY, num_hidden_layers=4, head_dim=8, sliding_window=4, **sizes)
    return seeded(lambda: Gemma2ForCausalLM(config))


def _t5() -> nn.Module:
    """The first block holds the positions of all."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=24, num_layers=2, num_heads=2, d_kv=8, decoder_start_token_id=0
    )
    return seeded(lambda: T5ForConditionalGeneration(config))


def _one_layer() -> nn.Module:
    return deep_llama(1)


#: Models that can be read block by block, and those that cannot.
WITH_BLOCKS: Mapping[str, Callable[[], nn.Module]] = {
    "llama": deep_llama,
    "tied llama": lambda: deep_llama(tie_word_embeddings=True),
    "gpt2": _gpt2,
    "bert": _bert,
    "gemma2": _gemma2,
}
WITHOUT_BLOCKS: Mapping[str, Callable[[], nn.Module]] = {"t5": _t5, "one layer": _one_layer}


def saved(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a model."""
    save: Any = model.to(dtype).save_pretrained
    save(folder)
    return folder
