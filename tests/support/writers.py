"""Tiny models that write: encoder-decoders of every medium, with random weights that lean towards varied texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor, nn

VOCABULARY, START, END, PAD = 300, 257, 258, 259
_SPECIAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": START,
    "decoder_start_token_id": START,
}
_BART: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "position" not in name:
                    parameter.normal_(0, 0.4)
    return model


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **_BART,
        **_SPECIAL,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=40,
        begin_suppress_tokens=None,
    )
    return _seeded(lambda: WhisperForConditionalGeneration(config))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(**_BART, **_SPECIAL, max_position_embeddings=40, forced_eos_token_id=None)
    return _seeded(lambda: BartForConditionalGeneration(config))


def marian() -> nn.Module:
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(**_BART, **_SPECIAL, max_position_embeddings=40, forced_eos_token_id=None)
    return _seeded(lambda: MarianMTModel(config))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    special = {name: value for name, value in _SPECIAL.items() if name != "bos_token_id"}
    config = T5Config(**special, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=2, num_heads=2)
    return _seeded(lambda: T5ForConditionalGeneration(config))


def captioner() -> nn.Module:
    from transformers import BertConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    small: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    encoder = ViTConfig(**small, num_hidden_layers=1, image_size=8, patch_size=4)
    decoder = BertConfig(**small, num_hidden_layers=1, vocab_size=VOCABULARY, is_decoder=True, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    for name, value in _SPECIAL.items():
        if name != "vocab_size":
            setattr(config, name, value)
    return _seeded(lambda: VisionEncoderDecoderModel(config=config))


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _tokens(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(5))


#: Name -> model and the inputs of its encoder, 12 samples.
WRITERS: Mapping[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "whisper": (whisper, {"input_features": _floats(12, 8, 100)}),
    "bart": (bart, {"input_ids": _tokens(12, 9), "attention_mask": torch.ones(12, 9).long()}),
    "marian": (marian, {"input_ids": _tokens(12, 9), "attention_mask": torch.ones(12, 9).long()}),
    "t5": (t5, {"input_ids": _tokens(12, 9), "attention_mask": torch.ones(12, 9).long()}),
    "captioner": (captioner, {"pixel_values": _floats(12, 3, 8, 8)}),
}


def save_tokenizer(folder: Path) -> None:
    """A tokenizer with a token for every byte, and three that mark texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<free>", "<start>", "<end>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def save_whisper(folder: Path) -> nn.Module:
    """The tiny Whisper as a folder, with its feature extractor (one second of sound) and a tokenizer."""
    from transformers import WhisperFeatureExtractor

    model: Any = whisper()
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    save_tokenizer(folder)
    return model  # type: ignore[no-any-return]


def write_clips(folder: Path, count: int = 16) -> list[Path]:
    """Short noises of several lengths."""
    folder.mkdir()
    generator = np.random.default_rng(4)
    files = []
    for i in range(count):
        file = folder / f"{i:02d}.wav"
        soundfile.write(file, generator.normal(0, 0.1, 8000 + 300 * i).astype(np.float32), 16000)
        files.append(file)
    return files
