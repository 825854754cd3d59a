"""Text: windows of plain files, fields of jsonl records, columns of parquet files, tokenized by the model's tokenizer."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alphasmith.objectives.batch import Batch
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batches import MediaBatches, plan_batches
from alphasmith.objectives.media.source import MediaSource, is_transformers_config, setting

#: Bytes read per wanted token: about three times the average of English BPE, enough for one token per CJK character.
_BYTES_PER_TOKEN = 12
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
    never overlap. Of jsonl and parquet files, ``source.samples`` non-empty records are drawn from ``seed`` (reservoir
    sampling, claim A-1's "several sampled"), out of the first 200 000 records.

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
    tokenizer = _load_tokenizer(model_folder)
    limit = _token_limit(source, tokenizer, model_config)
    generator = np.random.default_rng(seed)
    texts = _sample_texts(source, files, limit, generator)
    ids = [row for text in texts if (row := tokenizer(text, truncation=True, max_length=limit)["input_ids"])]
    if not ids:
        raise InputError("data.path", f"{source.path} holds no text", "give files that are not empty")
    ids = [ids[i] for i in generator.permutation(len(ids))]
    vocabulary = setting(model_config, "vocab_size")
    highest = max(max(row) for row in ids)
    if isinstance(vocabulary, int) and highest >= vocabulary:
        raise InputError(
            "model.path",
            f"its tokenizer gives token {highest}, its model knows {vocabulary}",
            "put the tokenizer of this model into its folder",
        )
    # Any id will do where the tokenizer has none: padded positions are masked everywhere.
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    plan = plan_batches(len(ids), source.batch_size)

    def load(number: int) -> Batch:
        return _pad([ids[i] for i in plan[number]], pad, model_config)

    notes = (
        ("the tokenizer has no padding token: padded positions are masked",) if tokenizer.pad_token_id is None else ()
    )
    return MediaBatches(sizes=tuple(map(len, plan)), load=load, notes=notes)


def _pad(rows: list[list[int]], pad: int, config: Any) -> Batch:
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    padded = None if bool(mask.all()) else mask
    if not is_transformers_config(config):
        return Batch(args=(ids,), mask=padded)
    kwargs = {"input_ids": ids, "attention_mask": mask.long()}
    start = setting(config, "decoder_start_token_id")
    if setting(config, "is_encoder_decoder", False) and start is not None:
        # Teacher forcing on the text itself; same length as the encoder's input, so one mask serves both.
        kwargs["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    return Batch(kwargs=kwargs, mask=padded)


def _load_tokenizer(folder: Path | None) -> Any:
    if folder is None or not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(
            "data.kind",
            f"text needs a tokenizer, and {'no model folder was given' if folder is None else f'{folder} has none'}",
            "put tokenizer.json beside the model, or pass token ids as in-memory batches",
        )
    from transformers import AutoTokenizer

    try:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (folder / name).is_file():  # the tokenizers library reports broken JSON without naming the file
                json.loads((folder / name).read_text(encoding="utf-8"))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise InputError("model.path", f"the tokenizer in {folder} cannot be loaded ({error})", "repair it") from error


def _token_limit(source: MediaSource, tokenizer: Any, config: Any) -> int:
    limits = [source.max_length, int(min(tokenizer.model_max_length, 2**31))]
    for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
        value = setting(config, name)
        if isinstance(value, int) and value > 0:
            limits.append(value)
    return min(limits)


def _sample_texts(source: MediaSource, files: list[Path], limit: int, generator: np.random.Generator) -> list[str]:
    plain = [f for f in files if f.suffix.lower() == ".txt"]
    records = [f for f in files if f.suffix.lower() != ".txt"]
    if plain and records:
        raise InputError(
            "data.path", f"{source.path} mixes .txt with jsonl or parquet files", "name one file or folder"
        )
    return _windows(source, plain, limit, generator) if plain else _reservoir(source, records, generator)


def _windows(source: MediaSource, files: list[Path], limit: int, generator: np.random.Generator) -> list[str]:
    sizes = np.array([f.stat().st_size for f in files])
    if not sizes.sum():
        raise InputError("data.path", f"{source.path} is empty", "give files with text")
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


def _reservoir(source: MediaSource, files: list[Path], generator: np.random.Generator) -> list[str]:
    records = (text for file in files for text in _records(file, source.column) if text.strip())
    chosen: list[tuple[int, str]] = []
    for number, text in enumerate(islice(records, _MAX_RECORDS)):
        if number < source.samples:
            chosen.append((number, text))
        elif (slot := int(generator.integers(number + 1))) < source.samples:
            chosen[slot] = (number, text)
    return [text for _, text in sorted(chosen)]


def _records(file: Path, column: str) -> Iterator[str]:
    return _parquet(file, column) if file.suffix.lower() == ".parquet" else _jsonl(file, column)


def _jsonl(file: Path, column: str) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _field(json.loads(line), column, f"{file} line {number}")
    except json.JSONDecodeError as error:
        raise InputError("data.path", f"{file} line {number} is not JSON ({error.msg})", "repair the line") from error
    except UnicodeDecodeError as error:
        raise InputError("data.path", f"{file} is not UTF-8 text", "convert it to UTF-8") from error
    except OSError as error:
        raise InputError("data.path", f"{file} cannot be read ({error.strerror})", "give a readable file") from error


def _field(record: Any, column: str, where: str) -> str:
    value = record.get(column) if isinstance(record, dict) else None
    if not isinstance(value, str):
        names = ", ".join(sorted(record)) if isinstance(record, dict) else "no fields"
        raise InputError(
            "data.column", f"{where} has no text in {column!r} (it has {names})", "name the field that holds it"
        )
    return value


def _parquet(file: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError("data.path", f"{file} is not a readable parquet file ({error})", "repair it") from error
    with table:
        fields = table.schema_arrow
        if column not in fields.names:
            raise InputError("data.column", f"{file} has no column {column!r}", f"use one of {', '.join(fields.names)}")
        if str(fields.field(column).type) not in ("string", "large_string", "string_view"):
            raise InputError(
                "data.column", f"{column!r} in {file} is {fields.field(column).type}", "name a text column"
            )
        try:
            for rows in table.iter_batches(batch_size=1024, columns=[column]):
                yield from (text for text in rows.column(0).to_pylist() if text is not None)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError("data.path", f"{file} cannot be read to its end ({error})", "repair it") from error
