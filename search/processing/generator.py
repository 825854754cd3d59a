"""Texts that follow prompts, written by the integer model of a language model."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import CALL_ERRORS
from alphasmith.objectives.media.text import check_vocabulary, load_tokenizer
from alphasmith.objectives.model.hf_folder import quiet_transformers
from alphasmith.objectives.reading import refusing
from alphasmith.objectives.text import error_line
from alphasmith.search.processing.opening import IntegerModel, ModelPlace, open_model

#: Settings of a configuration that say how many tokens a decoder can see.
_POSITIONS = ("max_target_positions", "max_position_embeddings", "n_positions")
_MOST_TOKENS = 2**20


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        max_tokens: Tokens that are written at most.
        temperature: Logits are divided by it before one is drawn; 0: the most probable token is taken, and nothing is drawn.
        top_p: One is drawn of the fewest tokens that have this share of the probability together.
        seed: Of the first prompt; the next ones have the numbers after it, so that a text depends on no other.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= _MOST_TOKENS:
            raise InputError("--max-tokens", f"{self.max_tokens} is not in 1 to {_MOST_TOKENS}", "give another number")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(
                "--temperature", f"{self.temperature} is not 0 or above", "give 0 for no drawing, or e.g. 0.8"
            )
        if not 0 < self.top_p <= 1:
            raise InputError("--top-p", f"{self.top_p} is not above 0 and at most 1", "give a share, e.g. 0.9")
        if self.top_p < 1 and not self.temperature:
            raise InputError("--top-p", "is given without drawing", "add --temperature, e.g. 1")
        if not 0 <= self.seed < 2**32:
            raise InputError("--seed", f"{self.seed} is not in 0 to {2**32 - 1}", "give another number")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What a model wrote.

    Attributes:
        prompt: What it follows.
        text: What was written, without the prompt.
        tokens: Number of tokens written, the one that ends the text left out.
        stopped: ``end``: the model ended the text. ``length``: it was ended at the most tokens.
        notes: What one might not expect, e.g. that the model sees no more tokens.
    """

    prompt: str
    text: str
    tokens: int
    stopped: Literal["end", "length"]
    notes: tuple[str, ...] = ()


class Generator:
    """The integer model of a run as a writer. May be used from several threads, which take turns at the model.

    Every prompt is written on by itself: nothing is padded, and no text depends on another.

    Args:
        opened: The model.
        tokenizer: The model's.
    """

    def __init__(self, opened: IntegerModel, tokenizer: Any) -> None:
        self._model: Any = opened.model
        self._device = opened.device
        self._config = opened.config
        self._tokenizer = tokenizer
        self._cached = True
        self._turn = threading.Lock()
        self._own: Any = copy.deepcopy(self._model.generation_config)
        self._written_after = bool(opened.setting("is_encoder_decoder"))

    @classmethod
    def opened(cls, source: Path | str, **place: Any) -> Self:
        """The language model that a run made.

        Args:
            source: The id of a run or training, or the beginning of one, or an output folder; its digests are checked.
            **place: As of ``Classifier.opened``.

        Raises:
            InputError: No such run or folder, a run that is not finished, a file that is not as it was written, a model that cannot write, or no tokenizer.
        """
        opened = open_model(ModelPlace(source=source, **place), keep_dense=True)
        model: Any = opened.model
        if not getattr(model, "can_generate", bool)() or getattr(model, "main_input_name", "") != "input_ids":
            what = "takes no text" if getattr(model, "can_generate", bool)() else "writes no texts"
            remedy = "give a language model, such as ...ForCausalLM; one with classes works with alphasmith classify"
            raise InputError("RUN", f"{type(model).__name__} {what}", remedy)
        with opened.processors() as folder:
            tokenizer = load_tokenizer(folder)
            if folder is not None and (folder / "generation_config.json").is_file():
                from transformers import GenerationConfig

                with refusing("RUN", "its generation_config.json cannot be used", "run again"):
                    model.generation_config = GenerationConfig.from_pretrained(folder)
        return cls(opened, tokenizer)

    def generate(
        self, prompts: Sequence[str], *, chat: bool = False, decoding: Decoding | None = None
    ) -> Iterator[Generated]:
        """Texts that follow prompts, in their order, one at a time.

        Args:
            prompts: The prompts.
            chat: Put each into the tokenizer's chat template, as what a user says.
            decoding: How tokens are chosen; None: the most probable ones, 128 at most.

        Raises:
            InputError: There is no prompt, one is empty or longer than the model can see, or there is no chat template.
        """
        if not prompts:
            raise InputError("--prompt", "is missing", "give one, or --prompts FILE")
        if chat and not getattr(self._tokenizer, "chat_template", None):
            raise InputError("--chat", "the model's tokenizer has no chat template", "leave --chat out")
        rows = [self._tokens(prompt, chat) for prompt in prompts]
        return self._texts(prompts, rows, decoding or Decoding())

    def _texts(self, prompts: Sequence[str], rows: Sequence[list[int]], decoding: Decoding) -> Iterator[Generated]:
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            yield self._text(prompt, row, decoding, (decoding.seed + number) % 2**32)

    def _tokens(self, prompt: str, chat: bool) -> list[int]:
        text = prompt
        with refusing("--prompt", "the tokenizer fails on it", "give another prompt"):
            if chat:
                said = [{"role": "user", "content": prompt}]
                text = self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            tokens = list(self._tokenizer(text, add_special_tokens=not chat)["input_ids"])
        if not prompt.strip() or not tokens:
            raise InputError("--prompt", "is empty", "give one with words")
        check_vocabulary([tokens], self._config)
        limit = self._limit
        if limit is not None and len(tokens) + (0 if self._written_after else 1) > limit:
            problem = f"{prompt[:40]!r} has {len(tokens)} tokens, and the model sees {limit} with what it writes"
            raise InputError("--prompt", problem, "shorten it")
        return tokens

    @property
    def _limit(self) -> int | None:
        """Tokens that the model can see, the prompt among them unless an encoder reads it; None: it does not say."""
        config: Any = self._config
        parts = (config, config.get_text_config(decoder=True))
        found = (getattr(part, name, None) for part in parts for name in _POSITIONS)
        return min((value for value in found if isinstance(value, int) and value > 0), default=None)

    def _text(self, prompt: str, row: list[int], decoding: Decoding, seed: int) -> Generated:
        most = decoding.max_tokens
        notes: tuple[str, ...] = ()
        before = 0 if self._written_after else len(row)
        if self._limit is not None and before + most > self._limit:
            most = self._limit - before
            notes = (f"at most {most} tokens: the model sees {self._limit}",)
        written = self._written(row, decoding, most, seed)
        ends = self._ends()
        ended = next((i for i, token in enumerate(written) if token in ends), None)
        kept = written if ended is None else written[:ended]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        return Generated(
            prompt=prompt, text=text, tokens=len(kept), stopped="length" if ended is None else "end", notes=notes
        )

    def _written(self, row: list[int], decoding: Decoding, most: int, seed: int) -> list[int]:
        config: Any = copy.deepcopy(self._own)
        drawn = decoding.temperature > 0
        asked = {
            "do_sample": drawn,
            "temperature": decoding.temperature if drawn else None,
            "top_p": decoding.top_p if drawn else None,
            "top_k": 0 if drawn else None,  # transformers would take 50
            "num_beams": 1,
            "num_return_sequences": 1,
            "max_new_tokens": most,
            "max_length": None,
            "use_cache": self._cached,
        }
        for name, value in asked.items():
            setattr(config, name, value)
        if config.pad_token_id is None:  # nothing is padded, but transformers wants to know
            config.pad_token_id = next(iter(sorted(self._ends())), 0)
        ids = torch.tensor([row], device=self._device)
        devices = [self._device] if self._device.type == "cuda" else []
        with self._turn, torch.no_grad(), quiet_transformers(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)  # transformers draws from the global generator, which is put back afterwards
            try:
                made = self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            except CALL_ERRORS as error:
                if not self._cached:
                    raise InputError(
                        "RUN", f"its generate() fails ({error_line(error, 200)})", "give another model"
                    ) from error
                made = None
        if made is None:  # some models write without a cache only
            self._cached = False
            return self._written(row, decoding, most, seed)
        tokens: list[int] = made[0].tolist()
        return tokens[1:] if self._written_after else tokens[len(row) :]

    def _ends(self) -> frozenset[int]:
        own = self._own.eos_token_id
        found = own if isinstance(own, (list, tuple)) else [own]
        return frozenset(token for token in found if isinstance(token, int))
