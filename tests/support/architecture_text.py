"""Language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.media.batch import Batch
from tests.support.architecture_records import (
    HEADS,
    HIDDEN,
    INNER,
    KEY_VALUE_HEADS,
    LAYERS,
    VOCABULARY,
    Architecture,
    Folded,
    Kept,
    attention,
    pretrained,
    tokens,
)

DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "use_cache": False,
}
ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": 32,
    "num_labels": 3,
}


def _gated(norm: str = "model.layers.{n}.post_attention_layernorm") -> tuple[Folded, ...]:
    """gate and up behind one norm, down behind up."""
    mlp = "model.layers.{n}.mlp"
    return (
        Folded(operators=(f"{mlp}.gate_proj", f"{mlp}.up_proj"), producers=(norm,), repeat=LAYERS),
        Folded(operators=(f"{mlp}.down_proj",), producers=(f"{mlp}.up_proj",), repeat=LAYERS),
    )


_HEAD = Folded(operators=("lm_head",), producers=("model.norm",))
_LLAMA = (*attention("model.layers.{n}.self_attn", "model.layers.{n}.input_layernorm"), *_gated(), _HEAD)


def _bert_folded(root: str) -> Folded:
    layer = f"{root}.encoder.layer.{{n}}.attention"
    return Folded(operators=(f"{layer}.output.dense",), producers=(f"{layer}.self.value",), repeat=LAYERS)


def _bert_kept(root: str) -> tuple[Kept, ...]:
    """What reads a norm that also feeds the residual."""
    layer = f"{root}.encoder.layer.{{n}}"
    attention = f"{layer}.attention.self"
    return (
        Kept(operators=(f"{attention}.query", f"{attention}.key", f"{attention}.value"), repeat=LAYERS),
        Kept(operators=(f"{layer}.intermediate.dense",), repeat=LAYERS),
        Kept(operators=("classifier",)),
    )


def padded(generator: torch.Generator, samples: int) -> Batch:
    """Token batches whose last sample ends in padding."""
    ids = torch.randint(4, VOCABULARY, (samples, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 4:] = 0
    return Batch(kwargs={"input_ids": ids, "attention_mask": mask}, mask=mask.bool())


def mixtral(experts: int, chosen: int, implementation: str = "eager") -> Callable[[], nn.Module]:
    """Factory of a Mixtral with ``chosen`` of ``experts`` experts per token."""
    return pretrained(
        "MixtralForCausalLM",
        "MixtralConfig",
        **DECODER,
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        experts_implementation=implementation,
    )


_OPT = "model.decoder.layers.{n}"

TEXT: tuple[Architecture, ...] = (
    Architecture(
        name="opt",
        factory=pretrained(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            ffn_dim=INNER,
            max_position_embeddings=32,
            tie_word_embeddings=False,
            use_cache=False,
        ),
        batch=tokens,
        folded=(
            *attention(f"{_OPT}.self_attn", f"{_OPT}.self_attn_layer_norm", kv_heads=HEADS, output="out_proj"),
            Folded(operators=(f"{_OPT}.fc1",), producers=(f"{_OPT}.final_layer_norm",), repeat=LAYERS),
            Folded(operators=(f"{_OPT}.fc2",), producers=(f"{_OPT}.fc1",), repeat=LAYERS),
            Folded(operators=("lm_head",), producers=("model.decoder.final_layer_norm",)),
        ),
    ),
    Architecture(
        name="opt-post-norm",
        factory=pretrained(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            word_embed_proj_dim=16,
            do_layer_norm_before=False,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            ffn_dim=INNER,
            max_position_embeddings=32,
            use_cache=False,
        ),
        batch=tokens,
        folded=(
            Folded(operators=(f"{_OPT}.fc2",), producers=(f"{_OPT}.fc1",), repeat=LAYERS),
            Folded(operators=(f"{_OPT}.self_attn.out_proj",), producers=(f"{_OPT}.self_attn.v_proj",), repeat=LAYERS),
            Folded(operators=("model.decoder.project_out",), producers=("model.decoder.layers.1.final_layer_norm",)),
        ),
        kept=(Kept(operators=(f"{_OPT}.fc1",), repeat=LAYERS),),
        skipped=("lm_head",),
    ),
    Architecture(
        name="llama",
        factory=pretrained("LlamaForCausalLM", "LlamaConfig", **DECODER, attention_bias=True),
        batch=tokens,
        folded=_LLAMA,
    ),
    Architecture(
        name="llama-sdpa-cache",
        factory=pretrained(
            "LlamaForCausalLM", "LlamaConfig", **{**DECODER, "use_cache": True, "attn_implementation": "sdpa"}
        ),
        batch=tokens,
        folded=_LLAMA,
    ),
    Architecture(
        name="mistral",
        factory=pretrained("MistralForCausalLM", "MistralConfig", **DECODER, sliding_window=4),
        batch=tokens,
        folded=_LLAMA,
    ),
    Architecture(
        name="qwen2",
        factory=pretrained("Qwen2ForCausalLM", "Qwen2Config", **DECODER),
        batch=tokens,
        folded=_LLAMA,
    ),
    Architecture(
        name="qwen3",
        factory=pretrained("Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=HIDDEN // HEADS),
        batch=tokens,
        folded=_LLAMA,
    ),
    Architecture(
        name="gemma2",
        factory=pretrained("Gemma2ForCausalLM", "Gemma2Config", **DECODER, head_dim=HIDDEN // HEADS),
        batch=tokens,
        folded=(
            *attention("model.layers.{n}.self_attn", "model.layers.{n}.input_layernorm"),
            *_gated("model.layers.{n}.pre_feedforward_layernorm"),
            _HEAD,
        ),
    ),
    Architecture(
        name="gpt2",
        factory=pretrained(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=32,
            use_cache=False,
        ),
        batch=tokens,
        folded=(
            Folded(operators=("transformer.h.{n}.attn.c_attn",), producers=("transformer.h.{n}.ln_1",), repeat=LAYERS),
            Folded(
                operators=("transformer.h.{n}.attn.c_proj",),
                producers=("transformer.h.{n}.attn.c_attn",),
                repeat=LAYERS,
            ),
            Folded(operators=("transformer.h.{n}.mlp.c_fc",), producers=("transformer.h.{n}.ln_2",), repeat=LAYERS),
        ),
        kept=(Kept(operators=("transformer.h.{n}.mlp.c_proj",), repeat=LAYERS),),
        skipped=("lm_head",),
    ),
    Architecture(
        name="gpt-neox",
        factory=pretrained(
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            **{k: v for k, v in DECODER.items() if k != "num_key_value_heads"},
            use_parallel_residual=True,
        ),
        batch=tokens,
        folded=(
            Folded(
                operators=("gpt_neox.layers.{n}.attention.query_key_value",),
                producers=("gpt_neox.layers.{n}.input_layernorm",),
                repeat=LAYERS,
            ),
            Folded(
                operators=("gpt_neox.layers.{n}.attention.dense",),
                producers=("gpt_neox.layers.{n}.attention.query_key_value",),
                repeat=LAYERS,
            ),
            Folded(
                operators=("gpt_neox.layers.{n}.mlp.dense_h_to_4h",),
                producers=("gpt_neox.layers.{n}.post_attention_layernorm",),
                repeat=LAYERS,
            ),
        ),
        kept=(Kept(operators=("gpt_neox.layers.{n}.mlp.dense_4h_to_h",), repeat=LAYERS),),
    ),
    Architecture(
        name="falcon-new",
        factory=pretrained(
            "FalconForCausalLM",
            "FalconConfig",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_kv_heads=KEY_VALUE_HEADS,
            new_decoder_architecture=True,
            bias=True,
            tie_word_embeddings=False,
            use_cache=False,
        ),
        batch=tokens,
        folded=(
            Folded(
                operators=("transformer.h.{n}.self_attention.query_key_value",),
                producers=("transformer.h.{n}.ln_attn",),
                repeat=LAYERS,
            ),
            Folded(
                operators=("transformer.h.{n}.self_attention.dense",),
                producers=("transformer.h.{n}.self_attention.query_key_value",),
                repeat=LAYERS,
                tied=KEY_VALUE_HEADS * HIDDEN // HEADS,
            ),
            Folded(
                operators=("transformer.h.{n}.mlp.dense_h_to_4h",),
                producers=("transformer.h.{n}.ln_mlp",),
                repeat=LAYERS,
            ),
        ),
        kept=(Kept(operators=("transformer.h.{n}.mlp.dense_4h_to_h",), repeat=LAYERS),),
    ),
    Architecture(
        name="falcon-multi-query",
        factory=pretrained(
            "FalconForCausalLM",
            "FalconConfig",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            multi_query=True,
            parallel_attn=True,
            tie_word_embeddings=False,
            use_cache=False,
        ),
        batch=tokens,
        folded=(
            Folded(
                operators=(
                    "transformer.h.{n}.self_attention.query_key_value",
                    "transformer.h.{n}.mlp.dense_h_to_4h",
                ),
                producers=("transformer.h.{n}.input_layernorm",),
                repeat=LAYERS,
            ),
            Folded(
                operators=("transformer.h.{n}.self_attention.dense",),
                producers=("transformer.h.{n}.self_attention.query_key_value",),
                repeat=LAYERS,
                tied=HIDDEN // HEADS,
            ),
        ),
    ),
    Architecture(
        name="bloom",
        factory=pretrained(
            "BloomForCausalLM",
            "BloomConfig",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            tie_word_embeddings=False,
            use_cache=False,
        ),
        batch=tokens,
        folded=(
            Folded(
                operators=("transformer.h.{n}.self_attention.query_key_value",),
                producers=("transformer.h.{n}.input_layernorm",),
                repeat=LAYERS,
            ),
            Folded(
                operators=("transformer.h.{n}.self_attention.dense",),
                producers=("transformer.h.{n}.self_attention.query_key_value",),
                repeat=LAYERS,
            ),
            Folded(
                operators=("transformer.h.{n}.mlp.dense_h_to_4h",),
                producers=("transformer.h.{n}.post_attention_layernorm",),
                repeat=LAYERS,
            ),
        ),
        kept=(Kept(operators=("transformer.h.{n}.mlp.dense_4h_to_h",), repeat=LAYERS),),
    ),
    Architecture(
        name="mixtral",
        factory=mixtral(3, 2),
        batch=tokens,
        folded=(*attention("model.layers.{n}.self_attn", "model.layers.{n}.input_layernorm"), _HEAD),
    ),
    Architecture(
        name="phi3",
        factory=pretrained("Phi3ForCausalLM", "Phi3Config", **DECODER),
        batch=tokens,
        folded=(
            Folded(
                operators=("model.layers.{n}.self_attn.qkv_proj",),
                producers=("model.layers.{n}.input_layernorm",),
                repeat=LAYERS,
            ),
            Folded(
                operators=("model.layers.{n}.self_attn.o_proj",),
                producers=("model.layers.{n}.self_attn.qkv_proj",),
                repeat=LAYERS,
                tied=KEY_VALUE_HEADS * HIDDEN // HEADS,
            ),
            Folded(
                operators=("model.layers.{n}.mlp.gate_up_proj",),
                producers=("model.layers.{n}.post_attention_layernorm",),
                repeat=LAYERS,
            ),
            Folded(
                operators=("model.layers.{n}.mlp.down_proj",),
                producers=("model.layers.{n}.mlp.gate_up_proj",),
                repeat=LAYERS,
            ),
            _HEAD,
        ),
    ),
    Architecture(
        name="cohere",
        factory=pretrained("CohereForCausalLM", "CohereConfig", **DECODER),
        batch=tokens,
        folded=(
            Folded(
                operators=(
                    *(f"model.layers.{{n}}.self_attn.{x}_proj" for x in "qkv"),
                    *(f"model.layers.{{n}}.mlp.{x}_proj" for x in ("gate", "up")),
                ),
                producers=("model.layers.{n}.input_layernorm",),
                repeat=LAYERS,
            ),
            Folded(
                operators=("model.layers.{n}.mlp.down_proj",),
                producers=("model.layers.{n}.mlp.up_proj",),
                repeat=LAYERS,
            ),
        ),
    ),
    Architecture(
        name="t5",
        factory=pretrained(
            "T5EncoderModel",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=HIDDEN // HEADS,
            d_ff=INNER,
            num_layers=LAYERS,
            num_heads=HEADS,
        ),
        batch=tokens,
        folded=(
            Folded(
                operators=tuple(f"encoder.block.{{n}}.layer.0.SelfAttention.{x}" for x in "qkv"),
                producers=("encoder.block.{n}.layer.0.layer_norm",),
                repeat=LAYERS,
            ),
            Folded(
                operators=("encoder.block.{n}.layer.1.DenseReluDense.wo",),
                producers=("encoder.block.{n}.layer.1.DenseReluDense.wi",),
                repeat=LAYERS,
            ),
        ),
    ),
    Architecture(
        name="bert",
        factory=pretrained("BertForSequenceClassification", "BertConfig", **ENCODER),
        batch=padded,
        folded=(_bert_folded("bert"),),
        kept=(*_bert_kept("bert"), Kept(operators=("bert.encoder.layer.{n}.output.dense",), repeat=LAYERS)),
    ),
    Architecture(
        name="ernie",
        factory=pretrained("ErnieForSequenceClassification", "ErnieConfig", **ENCODER, hidden_act="relu"),
        batch=tokens,
        folded=(
            _bert_folded("ernie"),
            Folded(
                operators=("ernie.encoder.layer.{n}.output.dense",),
                producers=("ernie.encoder.layer.{n}.intermediate.dense",),
                repeat=LAYERS,
            ),
        ),
        kept=_bert_kept("ernie"),
    ),
)
