"""Demo (b): a LLaMA-architecture language model trained on the English text of Python's own ``pydoc_data.topics``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.demo._task import DemoTask, describe_outliers
from alphasmith.objectives.demo.outliers import find_pairs, with_outliers
from alphasmith.objectives.demo.training import Progress, cache_key, make_seeded, restore_or_train, train
from alphasmith.objectives.errors import NonFiniteError
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.media.batches import MediaBatches, Splits

_VERSION = 1
_VOCABULARY = 512
_LENGTH = 64
_MODEL = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query attention, as the models this stands for
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "use_cache": False,
}
_STEPS, _RATE, _BATCH = 500, 3e-3, 8
_TEST, _CALIBRATION, _TUNING, _HELD_OUT, _PROOF = 64, 64, 32, 32, 16
_GAINS = (40.0, 60.0)
_EVALUATION_BATCH = 16


def text_demo(seed: int, cache_dir: Path, progress: Progress | None = None) -> DemoTask:
    """The language demo: byte-level BPE of 512 tokens, windows of 64 tokens, 4 layers of width 128.

    64 windows are test data. The model is trained on the rest but for 32 held-out and 16 proof windows; calibration uses
    64 of the training windows, tuning 32 others. The text differs a little between Python versions, and so do the numbers.
    """
    tokenizer = _tokenizer()
    windows = _windows(tokenizer)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    test, held_out, proof, training = torch.split(
        order, [_TEST, _HELD_OUT, _PROOF, len(order) - _TEST - _HELD_OUT - _PROOF]
    )
    settings = {"version": _VERSION, "model": _MODEL, "steps": _STEPS, "rate": _RATE, "batch": _BATCH}
    key = cache_key("text", seed, settings, windows.numpy().tobytes() + tokenizer.to_str().encode())
    model = make_seeded(_build, seed)

    def loss(generator: torch.Generator) -> torch.Tensor:
        ids = windows[training[torch.randint(len(training), (_BATCH,), generator=generator)]]
        logits = main_output(model(input_ids=ids))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    restore_or_train(
        model, cache_dir / key, lambda: train(model, loss, steps=_STEPS, rate=_RATE, seed=seed, progress=progress)
    )
    endings = ("input_layernorm", "post_attention_layernorm")
    norms = [name for name, _ in model.named_modules() if name.endswith(endings)]
    pairs = find_pairs(model, norms, Batch(kwargs={"input_ids": windows[training[:_CALIBRATION]]}))
    spiked, outliers = with_outliers(model, pairs, gains=_GAINS, seed=seed)

    def metric(candidate: nn.Module) -> float:
        total = 0.0
        with torch.no_grad():
            for rows in torch.split(test, _EVALUATION_BATCH):
                ids = windows[rows]
                logits = main_output(call(candidate, Batch(kwargs={"input_ids": ids})))[:, :-1].flatten(0, 1)
                total += float(nn.functional.cross_entropy(logits.double(), ids[:, 1:].flatten(), reduction="sum"))
        mean = total / (_TEST * (_LENGTH - 1))
        if not mean < 700:  # exp() overflows above 709; NaN fails the comparison too
            raise NonFiniteError(f"perplexity of the text demo is not finite: the mean loss is {mean} nats per token")
        return math.exp(mean)

    return DemoTask(
        name="text",
        description="English text of Python's pydoc_data.topics predicted by a LLaMA-architecture model of 4 layers, "
        "width 128, 512 BPE tokens. " + describe_outliers(outliers),
        model=spiked,
        splits=Splits(
            calibration=_batches(windows, training[:_CALIBRATION]),
            tuning=_batches(windows, training[_CALIBRATION : _CALIBRATION + _TUNING]),
            held_out=_batches(windows, held_out),
            proof=_batches(windows, proof),
        ),
        metric=metric,
        metric_name="perplexity",
        higher_is_better=False,
        outliers=outliers,
        files={
            "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
            "tokenizer_config.json": json.dumps(
                {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": _MODEL["max_position_embeddings"]},
                indent=2,
            )
            + "\n",
        },
    )


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] + "\n\n" for name in sorted(topics)]


def _tokenizer() -> Any:
    """Byte-level BPE trained on the topics; deterministic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_topics(), trainer)
    return tokenizer


def _windows(tokenizer: Any) -> torch.Tensor:
    """All topics one after the other as windows (N, 64) of token ids; the incomplete last one is dropped."""
    ids = [token for topic in _topics() for token in tokenizer.encode(topic).ids]
    count = len(ids) // _LENGTH
    return torch.tensor(ids[: count * _LENGTH]).view(count, _LENGTH)


def _build() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(LlamaConfig(**_MODEL, attn_implementation="eager"))
    return model


def _batches(windows: torch.Tensor, rows: torch.Tensor) -> MediaBatches:
    def load(numbers: tuple[int, ...]) -> Batch:
        chosen = rows[list(numbers)]
        return Batch(kwargs={"input_ids": windows[chosen]})

    return MediaBatches.of(len(rows), 16, load)
