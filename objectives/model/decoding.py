"""What the decoder of an encoder-decoder reads: the text it shall write as the data have it, else the one it writes itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import CALL_ERRORS, Batch, call
from alphasmith.objectives.media.batches import MediaBatches, lengths_in_common
from alphasmith.objectives.media.text import has_tokenizer, load_tokenizer
from alphasmith.objectives.model.hf_folder import quiet_transformers
from alphasmith.objectives.text import error_line

#: Samples that a model answers at once: a constant, so that the answers do not depend on the batch size of a run.
_AT_ONCE = 8
#: Longest answer of a model [tokens].
_LONGEST = 128
#: Tokens that may precede every text, such as a language: looked for in one answer, and left free in all.
_PROMPT = 8
#: Arguments that say what the decoder reads.
_GIVEN = ("decoder_input_ids", "decoder_inputs_embeds")


def reads_its_own_text(model: nn.Module) -> bool:
    """Whether a model's forward reads what its decoder has written before."""
    config: Any = getattr(model, "config", None)
    takes = inspect.signature(model.forward).parameters
    return bool(getattr(config, "is_encoder_decoder", False)) and _GIVEN[0] in takes


def with_decoder_inputs(
    model: nn.Module,
    media: MediaBatches,
    *,
    folder: Path | None,
    longest: int,
    device: torch.device | str = "cpu",
    on_sample: Callable[[int], None] = lambda count: None,
) -> MediaBatches:
    """Batches on which the decoder reads a whole text (teacher forcing), and whose labels are its next tokens.

    Texts come from the labels of the batches, else from the targets of the data, else the model writes them, greedily and once.
    Those of nearly one length are cut to the shortest of them, so that they share batches and nothing is padded.

    Args:
        model: Its decoder reads its own text; moved to ``device``.
        media: What its encoder reads.
        folder: The model's folder, for the tokenizer.
        longest: Longest text [tokens].
        device: Where it writes.
        on_sample: Called with the number of samples written, after each few.

    Raises:
        InputError: Neither the data nor the model says what the decoder reads.
    """
    numbers = sorted(number for batch in media.plan for number in batch)
    first = media.load((numbers[0],))
    if any(name in first.kwargs for name in _GIVEN):
        return media
    model.to(device)
    writer = _Writer(model, str(device))
    limit = min(longest, writer.limit)
    notes = media.notes
    given = _of_labels(media, numbers) if first.labels is not None else _of_targets(media, numbers, folder, writer)
    if given is None and not writer.can_write:
        return _own_text(model, media, first, writer)
    made = given is None
    if given is None:
        given = writer.write_all(media, numbers, min(longest, max(1, writer.limit - _PROMPT), _LONGEST), on_sample)
        missing = sum(not isinstance(target, str) for target in media.targets)
        whose = f"{missing} of {len(numbers)} samples" if 0 < missing < len(numbers) else "it"
        notes = (*notes, f"the decoder reads what the model itself writes: the data have no text for {whose}")
    rows = {n: writer.shifted(tokens, limit) for n, tokens in zip(numbers, given, strict=True)}
    kinds = [media.alike[n] if media.alike else None for n in numbers]
    lengths = dict(zip(numbers, lengths_in_common([len(rows[n].read) for n in numbers], kinds), strict=True))
    load = media.load

    def loaded(samples: tuple[int, ...]) -> Batch:
        batch = load(samples)
        end = lengths[samples[0]]
        if batch.mask is not None and batch.mask.shape[1] == end:
            end = max(
                1, end - 1
            )  # the mask is of the encoder's places; as many of the decoder's would be taken for them
        read = torch.tensor([rows[n].read[:end] for n in samples])
        written = torch.tensor([rows[n].written[:end] for n in samples])
        return replace(batch, kwargs={**batch.kwargs, _GIVEN[0]: read}, labels=written)

    alike = tuple((media.alike[n] if media.alike else None, lengths.get(n)) for n in range(max(numbers) + 1))
    plan = tuple(part for batch in media.plan for part in replace(media, alike=alike).regrouped(batch, len(batch)).plan)
    # Two machines may write another token at a tie: what is digested is what the model and the data decide.
    return replace(media, load=loaded, origin=load if made else None, alike=alike, plan=plan, notes=notes)


@dataclass(frozen=True)
class _Row:
    """What a decoder reads, and what it shall write at each place."""

    read: tuple[int, ...]
    written: tuple[int, ...]


class _Writer:
    """A model that writes, with the tokens that begin and end a text."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self._model: Any = model
        self._device = device
        self._cached = True
        self.start = self._token("decoder_start_token_id", "bos_token_id", "pad_token_id")
        self.end = self._token("eos_token_id")
        self.pad = self._token("pad_token_id", "eos_token_id")
        self.can_write = self.start is not None and bool(getattr(model, "can_generate", bool)())

    @property
    def limit(self) -> int:
        """Tokens that the decoder can read at most."""
        config: Any = self._model.config
        decoder = config.get_text_config(decoder=True)
        found = [
            value
            for part in (config, decoder)
            for name in ("max_target_positions", "max_position_embeddings", "n_positions")
            if isinstance(value := getattr(part, name, None), int) and value > 0
        ]
        return min(found, default=2**31)

    def shifted(self, tokens: Sequence[int], limit: int) -> _Row:
        """A text as a decoder reads it, begun by the start token, beside the tokens that follow."""
        if self.start is None:
            raise _unknown(self._model, "its configuration has no decoder_start_token_id")
        written = [*tokens, *([self.end] if self.end is not None else [])][:limit]
        return _Row(read=(self.start, *written[:-1]), written=tuple(written))

    def plain(self, tokens: Sequence[int]) -> list[int]:
        """A text without the tokens that begin, end and fill it."""
        found = list(tokens)
        if found and found[0] == self.start:
            found = found[1:]
        while found and found[-1] in (self.pad, self.end):
            found.pop()
        return found

    def write_all(
        self, media: MediaBatches, numbers: Sequence[int], limit: int, on_sample: Callable[[int], None]
    ) -> list[list[int]]:
        """What the model writes of every sample.

        Raises:
            InputError: It cannot.
        """
        texts: dict[int, list[int]] = {}
        for samples in media.regrouped(numbers, _AT_ONCE).plan:
            texts |= dict(zip(samples, self.write(media.load(samples), limit), strict=True))
            on_sample(len(texts))
        if not any(texts.values()):
            raise _unknown(self._model, "it writes nothing of any sample")
        return [texts[number] for number in numbers]

    def write(self, batch: Batch, limit: int) -> list[list[int]]:
        """What the model writes of the samples of a batch.

        Raises:
            InputError: It cannot.
        """
        moved = batch.to(self._device)
        names = [self._model.main_input_name, *list(inspect.signature(self._model.forward).parameters)[1:]]
        given = {**dict(zip(names, moved.args, strict=False)), **moved.kwargs}
        asked = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_new_tokens": limit}
        own = getattr(self._model, "generation_config", None)
        known = {"decoder_start_token_id": self.start, "eos_token_id": self.end, "pad_token_id": self.pad}
        asked |= {
            name: token for name, token in known.items() if token is not None and getattr(own, name, None) is None
        }
        with torch.no_grad(), quiet_transformers():
            try:
                made = self._model.generate(**given, **asked, use_cache=self._cached)
            except CALL_ERRORS as error:
                if not self._cached:
                    raise _unknown(self._model, f"its generate() fails ({error_line(error, 200)})") from error
                self._cached = False  # some models write without a cache only
                return self.write(batch, limit)
        rows = getattr(made, "sequences", made)
        if not isinstance(rows, torch.Tensor) or rows.dim() != 2 or rows.is_floating_point():
            raise _unknown(self._model, "its generate() returns no tokens")
        return [self.plain(row) for row in rows.tolist()]

    def _token(self, *names: str) -> int | None:
        for name in names:
            for owner in (getattr(self._model, "generation_config", None), self._model.config):
                value = getattr(owner, name, None)
                value = value[0] if isinstance(value, (list, tuple)) and value else value
                if isinstance(value, int):
                    return value
        return None


def _of_labels(media: MediaBatches, numbers: Sequence[int]) -> list[list[int]] | None:
    """Texts in the labels of batches, which hide filled places behind negative numbers; None: they are no texts."""
    texts: list[list[int]] = []
    for number in numbers:
        labels = media.load((number,)).labels
        if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return None
        texts.append([token for token in labels[0].tolist() if token >= 0])
    return texts


def _of_targets(
    media: MediaBatches, numbers: Sequence[int], folder: Path | None, writer: _Writer
) -> list[list[int]] | None:
    """Texts of the data as tokens; None where a sample has none, or there is no tokenizer.

    What the model puts before every text, such as a language, is put before those whose tokenizer does not.
    """
    targets = [media.targets[n] for n in numbers] if media.targets else []
    if not targets or not has_tokenizer(folder) or any(not isinstance(text, str) or not text for text in targets):
        return None
    tokenizer = load_tokenizer(folder)
    texts = [writer.plain(tokenizer(text_target=text)["input_ids"]) for text in targets]
    if not writer.can_write:
        return texts
    added = set(getattr(tokenizer, "added_tokens_decoder", ()))
    own = writer.write(media.load((numbers[0],)), _PROMPT)[0]
    prompt = own[: next((i for i, token in enumerate(own) if token not in added), len(own))]
    return [text if text[: len(prompt)] == prompt else [*prompt, *text] for text in texts]


def _own_text(model: nn.Module, media: MediaBatches, first: Batch, writer: _Writer) -> MediaBatches:
    """For a model without a head: its own default, else the text its encoder reads."""
    with torch.no_grad():
        try:
            call(model, first.to(next(model.parameters()).device))
        except CALL_ERRORS:
            pass
        else:
            return media
    if "input_ids" not in first.kwargs or writer.start is None:
        raise _unknown(model, "it has no head that writes")
    start, load = writer.start, media.load

    def loaded(samples: tuple[int, ...]) -> Batch:
        batch = load(samples)
        ids = batch.kwargs["input_ids"]
        read = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
        return replace(batch, kwargs={**batch.kwargs, _GIVEN[0]: read})

    return replace(media, load=loaded, notes=(*media.notes, "the decoder reads the text of the encoder"))


def _unknown(model: nn.Module, why: str) -> InputError:
    return InputError(
        "data",
        f"what the decoder of {type(model).__name__} reads is unknown: the data have no text for it, and {why}",
        "put a text beside each file (clip.txt, or metadata.csv with file_name and text), name its column in data.label, or "
        "give batches with decoder_input_ids",
    )
