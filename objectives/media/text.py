"""Text: windows of plain files, fields of records, conversations, tokenized by the model's tokenizer."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media._conversations import FIELDS, Conversation, conversation_of, is_conversation
from alphasmith.objectives.media._records import TABLES, Record, read_records
from alphasmith.objectives.media._source import LISTS, MediaSource, is_transformers_config, setting
from alphasmith.objectives.media._targets import COLUMNS, target_column
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.batches import MediaBatches
from alphasmith.objectives.reading import is_regular, read_object, refusing
from alphasmith.objectives.text import counted

#: Bytes read per wanted token: about three times the average of English BPE, enough for one token per CJK character.
_BYTES_PER_TOKEN = 12
#: Bytes of a token on average, where a text is cut into pieces that follow each other.
_USUAL_BYTES = 4
#: A short file gives fewer windows rather than ones of a few letters [bytes].
_SHORTEST_WINDOW = 64
#: Records looked at per source: reading time stays bounded on files of any size.
_MAX_RECORDS = 200_000
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
)


def load_text(
    source: MediaSource, files: list[Path], *, model_folder: Path | None, model_config: Any, seed: int
) -> MediaBatches:
    """Tokenize samples of text files.

    A plain text file is cut into one window per sample, spread evenly over it at places drawn from ``seed``; windows
    never overlap. Of jsonl, csv and parquet files, ``source.samples`` non-empty records are drawn from ``seed`` (reservoir
    sampling, claim A-1's "several sampled"), out of the first 200 000 records. Conversations become text by the
    tokenizer's chat template.

    Args:
        source: What to read.
        files: Text files, in order.
        model_folder: Folder with the tokenizer.
        model_config: The model's configuration, for its vocabulary and longest input.
        seed: Draws the samples and their order.

    Returns:
        Batches of ``input_ids`` and ``attention_mask`` (B, L), padded on the right; ``mask`` where anything is padded.

    Raises:
        InputError: No tokenizer, no such column, no text, an unreadable file, or tokens the model does not know.
    """
    tokenizer = load_tokenizer(model_folder)
    limit = token_limit(source, tokenizer, model_config)
    generator = np.random.default_rng(seed)
    passages, notes = _sample_texts(source, files, limit, generator)
    tokens = [(row, p.target) for p in passages if (row := _tokens(p.text, tokenizer, limit))]
    if not tokens:
        raise InputError("data.path", f"{source.path} holds no text", "give files that are not empty")
    if not source.whole:
        tokens = [tokens[i] for i in generator.permutation(len(tokens))]
    ids, targets = [row for row, _ in tokens], [target for _, target in tokens]
    check_vocabulary(ids, model_config)
    vocabulary = setting(model_config, "vocab_size")
    # Any id will do where the tokenizer has none: padded positions are masked everywhere.
    known = vocabulary if isinstance(vocabulary, int) else 2**31
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int) and i < known), 0)

    def load(numbers: tuple[int, ...]) -> Batch:
        return token_batch([ids[i] for i in numbers], pad, model_config)

    if tokenizer.pad_token_id is None:
        notes = (*notes, "the tokenizer has no padding token: padded positions are masked")
    # A model that is not told of the padding gives other answers beside it, and a mask of the encoder's positions says nothing
    # of the decoder's: then texts of one length share a batch.
    padded = is_transformers_config(model_config) and not setting(model_config, "is_encoder_decoder", False)
    alike = () if padded else [len(row) for row in ids]
    targets = targets if source.targets else []
    return MediaBatches.of(len(ids), source.batch_size, load, alike=alike, targets=targets, notes=notes)


def check_vocabulary(rows: Sequence[Sequence[int]], config: Any) -> None:
    """Refuse tokens that a model does not know.

    Args:
        rows: Tokens of each text, at least one of each.
        config: The model's configuration.

    Raises:
        InputError: Its vocabulary is smaller.
    """
    vocabulary = setting(config, "vocab_size")
    highest = max(max(row) for row in rows)
    if isinstance(vocabulary, int) and highest >= vocabulary:
        raise InputError(
            "model.path",
            f"its tokenizer gives token {highest}, its model knows {vocabulary}",
            "put the tokenizer of this model into its folder",
        )


def token_batch(rows: list[list[int]], pad: int, config: Any) -> Batch:
    """Tokens of texts as one batch, padded on the right.

    Args:
        rows: Tokens of each text.
        pad: The token to pad with.
        config: The model's configuration.
    """
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    padded = None if bool(mask.all()) else mask
    if not is_transformers_config(config):
        return Batch(args=(ids,), mask=padded)
    return Batch(kwargs={"input_ids": ids, "attention_mask": mask.long()}, mask=padded)


def has_tokenizer(folder: Path | None) -> bool:
    """Whether a model's folder holds a tokenizer."""
    return folder is not None and any(is_regular(folder / name) for name in _TOKENIZER_FILES)


def load_tokenizer(folder: Path | None) -> Any:
    """The tokenizer of a model's folder; nothing is fetched, and no code of the folder runs.

    Raises:
        InputError: There is none, or it cannot be loaded.
    """
    if folder is None or not has_tokenizer(folder):
        raise InputError(
            "data.kind",
            f"text needs a tokenizer, and {'no model folder was given' if folder is None else f'{folder} has none'}",
            "put tokenizer.json beside the model, or pass token ids as in-memory batches",
        )
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        if is_regular(folder / name):  # the tokenizers library reports broken JSON without naming the file
            read_object(folder / name, field="model.path")
    with refusing("model.path", f"the tokenizer in {folder} cannot be loaded", "repair it"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def token_limit(source: MediaSource, tokenizer: Any, config: Any) -> int:
    """Longest text that is asked for and that tokenizer and model can take [tokens].

    Args:
        source: What the user asked for.
        tokenizer: The model's.
        config: The model's configuration.

    Raises:
        InputError: The tokenizer's own is none.
    """
    own = tokenizer.model_max_length
    if not isinstance(own, (int, float)) or not own >= 1:
        raise InputError("model.path", f"its tokenizer takes {str(own)[:100]!r} tokens", "repair tokenizer_config.json")
    limits = [source.max_length, int(min(own, 2**31))]
    for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
        value = setting(config, name)
        if isinstance(value, int) and value > 0:
            limits.append(value)
    return min(limits)


@dataclass(frozen=True)
class _Passage:
    """A text, and what it stands for where the data say so."""

    text: str | Conversation
    target: Any = None


def _tokens(text: str | Conversation, tokenizer: Any, limit: int) -> list[int]:
    # The template of a conversation writes the special tokens itself.
    whole, special = (text, True) if isinstance(text, str) else (text.text(tokenizer), False)
    with refusing("model.path", "its tokenizer fails on a text", "repair the tokenizer"):
        return list(tokenizer(whole, truncation=True, max_length=limit, add_special_tokens=special)["input_ids"])


def _sample_texts(
    source: MediaSource, files: list[Path], limit: int, generator: np.random.Generator
) -> tuple[list[_Passage], tuple[str, ...]]:
    records = [f for f in files if f.suffix.lower() in TABLES]
    plain = [f for f in files if f not in records]
    if plain and all(f.suffix.lower() in LISTS for f in records):
        records = []
    if plain and records:
        raise InputError(
            "data.path", f"{source.path} mixes .txt with jsonl, csv or parquet files", "name one file or folder"
        )
    if records:
        return _reservoir(source, records, generator)
    return [_Passage(text) for text in _windows(source, plain, limit, generator)], ()


def _windows(source: MediaSource, files: list[Path], limit: int, generator: np.random.Generator) -> list[str]:
    sizes = np.array([f.stat().st_size for f in files])
    if not sizes.sum():
        raise InputError("data.path", f"{source.path} is empty", "give files with text")
    if source.whole:
        counts = np.maximum(sizes // (limit * _USUAL_BYTES), 1)
    else:
        # Largest remainder: each file gets windows in proportion to its bytes, and all together source.samples.
        share = sizes / sizes.sum() * source.samples
        counts = np.floor(share).astype(int)
        counts[np.argsort(counts - share, kind="stable")[: source.samples - counts.sum()]] += 1
    texts: list[str] = []
    for file, size, count in zip(files, sizes, counts, strict=True):
        count = min(int(count), max(int(size) // _SHORTEST_WINDOW, 1))
        if not count or not size:
            continue
        stratum = int(size) // count
        length = min(stratum, limit * _BYTES_PER_TOKEN)
        try:
            with file.open("rb") as stream:
                for i in range(count):
                    stream.seek(i * stratum + int(generator.integers(stratum - length + 1)))
                    texts.append(_decode(stream.read(length), file))
        except OSError as error:
            raise InputError(
                "data.path", f"{file} cannot be read ({error.strerror})", "give a readable file"
            ) from error
    return [text for text in texts if text.strip()]


def _decode(data: bytes, file: Path) -> str:
    """UTF-8 text of a window, without the characters cut at its two ends."""
    start = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data[start:])
    except UnicodeDecodeError as error:
        raise InputError("data.path", f"{file} is not UTF-8 text", "convert it to UTF-8") from error


def _reservoir(
    source: MediaSource, files: list[Path], generator: np.random.Generator
) -> tuple[list[_Passage], tuple[str, ...]]:
    wanted = (source.column, source.label, *FIELDS, *(COLUMNS[source.targets] if source.targets else ()))
    records = (record for file in files for record in read_records(file, wanted))
    chosen: list[tuple[int, _Passage]] = []
    number = nulls = 0
    for record in islice(records, _MAX_RECORDS):
        passage = _passage(record, source)
        if passage is None:
            nulls += 1
        elif not isinstance(passage.text, str) or passage.text.strip():
            if source.whole or number < source.samples:
                chosen.append((number, passage))
            elif (slot := int(generator.integers(number + 1))) < source.samples:
                chosen[slot] = (number, passage)
            number += 1
    named = "text or label" if source.targets else "text"
    notes: tuple[str, ...] = ()
    if nulls:
        notes += (f"{counted(nulls, 'record')} without a {named} (null) passed over",)
    if source.whole and next(records, None) is not None:
        notes += (f"only the first {_MAX_RECORDS} records are read",)
    return [passage for _, passage in sorted(chosen, key=lambda item: item[0])], notes


def _passage(record: Record, source: MediaSource) -> _Passage | None:
    """What a record says, and what it stands for; None where either is null."""
    if source.targets == "text" and source.column not in record.fields and is_conversation(record):
        asked = conversation_of(record)
        if asked is None:
            return None
        # An encoder-decoder reads the question and writes the answer.
        roles = [role for role, _ in asked.messages[:2]]
        if roles == ["user", "assistant"]:
            return _Passage(asked.messages[0][1], asked.messages[1][1])
    text = _text(record, source.column)
    column = target_column(record, source, COLUMNS[source.targets] if source.targets else ())
    target = None if column is None else record.fields[column]
    return None if text is None or (column is not None and target is None) else _Passage(text, target)


def _text(record: Record, column: str) -> str | Conversation | None:
    """What a record says; None where that is null."""
    value = record.fields.get(column)
    if column in record.fields:
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, (list, tuple)):
            return conversation_of(record, column)
    elif is_conversation(record):
        return conversation_of(record)
    raise InputError(
        "data.column",
        f"{record.where} has no text in {column!r} (it has {record.names})",
        "name the field that holds it",
    )
