"""Encoder-decoders: their decoder reads whole texts, those of the data or those it writes itself, and never its start alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media import MediaBatches, MediaSource, data_digest, in_memory, load_media
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.media.batches import as_media
from alphasmith.objectives.model.decoding import reads_its_own_text, with_decoder_inputs
from alphasmith.objectives.model.metrics import perplexity
from tests.support.writers import END, START, WRITERS, save_tokenizer, save_whisper, t5, whisper, write_clips


def prepared(model: nn.Module, batches: Any, longest: int = 24, folder: Path | None = None) -> MediaBatches:
    return with_decoder_inputs(model, as_media(in_memory(batches)), folder=folder, longest=longest)


@pytest.mark.parametrize("name", WRITERS)
def test_without_texts_the_decoder_reads_what_the_model_writes(name: str) -> None:
    build, inputs = WRITERS[name]
    model = build()
    assert reads_its_own_text(model)
    media = prepared(model, inputs)
    assert "the decoder reads what the model itself writes" in media.notes[-1]
    lengths = set()
    for batch in media:
        read, written = batch.kwargs["decoder_input_ids"], batch.labels
        assert written is not None
        assert read[:, 0].tolist() == [START] * batch.size
        assert torch.equal(read[:, 1:], written[:, :-1])
        lengths.add(read.shape[1])
        with torch.no_grad():
            answer = main_output(call(model, batch)).argmax(-1)
        # Greedy: at every place the next token is the likeliest one.
        assert torch.equal(answer, written)
    assert max(lengths) > 4
    assert perplexity(model, list(media)) < 300


@pytest.mark.parametrize("name", WRITERS)
def test_batches_decide_neither_texts_nor_digest(name: str) -> None:
    build, inputs = WRITERS[name]
    model = build()
    parts = [{key: value[start : start + 5] for key, value in inputs.items()} for start in range(0, 12, 5)]
    one, other = prepared(model, inputs), prepared(model, parts)
    assert data_digest(one.one_by_one()) == data_digest(other.one_by_one())
    # A tie that another machine breaks otherwise makes no other data; texts that were given do.
    assert data_digest(one.one_by_one()) == data_digest(as_media(in_memory(inputs)).one_by_one())
    labels = torch.randint(0, 200, (12, 4), generator=torch.Generator().manual_seed(2))
    texts = [prepared(model, {**inputs, "labels": labels + i}) for i in range(2)]
    assert len({data_digest(media.one_by_one()) for media in (one, *texts)}) == 3
    for size in (1, 3):
        again = one.regrouped(range(12), size)
        rows = [row.tolist() for batch in again for row in batch.kwargs["decoder_input_ids"]]
        assert sorted(rows) == sorted(row.tolist() for b in other for row in b.kwargs["decoder_input_ids"])


def test_the_model_writes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    build, inputs = WRITERS["bart"]
    model: Any = build()
    asked: list[int] = []
    generate = model.generate

    def counted(**given: Any) -> Any:
        asked.append(len(given["input_ids"]))
        assert given["max_new_tokens"] <= 24
        return generate(**given)

    monkeypatch.setattr(model, "generate", counted)
    media = prepared(model, inputs)
    for _ in range(3):
        list(media)
    assert asked == [8, 4]


def test_labels_of_batches_come_first() -> None:
    _, inputs = WRITERS["t5"]
    labels = torch.tensor([[5, 6, 7, END], [8, END, -100, -100]] * 6)
    media = prepared(t5(), {**inputs, "labels": labels})
    rows = {tuple(row.tolist()) for batch in media for row in batch.kwargs["decoder_input_ids"]}
    assert rows == {(START, 5, 6, 7, END), (START, 8, END)}
    assert media.notes == ()
    given = torch.full((12, 3), 9)
    kept = prepared(t5(), {**inputs, "decoder_input_ids": given})
    assert torch.equal(kept[0].kwargs["decoder_input_ids"], given)


def spoken(folder: Path, tmp_path: Path, **settings: Any) -> MediaBatches:
    source = MediaSource(path=tmp_path / "clips", targets="text", **settings)
    model: Any = whisper()
    media = load_media(source, model_folder=folder, model_config=model.config)
    return with_decoder_inputs(model, media, folder=folder, longest=30)


@pytest.mark.parametrize("form", ["beside", "csv", "jsonl"])
def test_texts_of_the_data_are_what_the_decoder_reads(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_whisper(folder)
    files = write_clips(tmp_path / "clips", 6)
    texts = [f"word {'x' * i}" for i in range(6)]
    if form == "beside":
        for file, text in zip(files, texts, strict=True):
            file.with_suffix(".txt").write_text(f"{text}\n")
    elif form == "csv":
        rows = "".join(f"{file.name},{text}\n" for file, text in zip(files, texts, strict=True))
        (tmp_path / "clips" / "metadata.csv").write_text(f"file_name,transcription\n{rows}")
    else:
        rows = "".join(f'{{"file": "{f.name}", "said": "{t}"}}\n' for f, t in zip(files, texts, strict=True))
        (tmp_path / "clips" / "metadata.jsonl").write_text(rows)
    media = spoken(folder, tmp_path, label="said" if form == "jsonl" else "auto")
    assert media.notes == ()
    read = [bytes(batch.kwargs["decoder_input_ids"][0, 1:].tolist()) for batch in media.one_by_one()]
    wanted = {bytes(_tokens(folder, text)) for text in texts}
    assert all(any(text.startswith(part) and 4 * len(part) >= 3 * len(text) for text in wanted) for part in read)
    assert len(set(read)) >= 3
    for batch in media:
        assert batch.labels is not None
        assert torch.equal(batch.kwargs["decoder_input_ids"][:, 1:], batch.labels[:, :-1])


def test_what_precedes_every_text_is_taken_from_the_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<german>", "<plain>"])
    tokenizer.save_pretrained(tmp_path)
    prompt = tokenizer.convert_tokens_to_ids(["<german>", "<plain>"])
    model: Any = whisper()
    model.generate = lambda **_: torch.tensor([[START, *prompt, 65, 66, END]])
    media = as_media(in_memory({**WRITERS["whisper"][1]}))
    texts = ["ab", "<german><plain>ab"] * 6
    found = with_decoder_inputs(model, replace(media, targets=tuple(texts)), folder=tmp_path, longest=20)
    wanted = (START, *prompt, *tokenizer("ab")["input_ids"])
    assert {tuple(row.tolist()) for batch in found for row in batch.kwargs["decoder_input_ids"]} == {wanted}


def _tokens(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])


def test_padding_of_the_encoder_is_never_taken_for_the_decoders() -> None:
    _, inputs = WRITERS["t5"]
    attention = torch.ones(12, 9).long()
    attention[::2, 6:] = 0
    labels = torch.randint(0, 200, (12, 8), generator=torch.Generator().manual_seed(1))
    media = prepared(t5(), {"input_ids": inputs["input_ids"], "attention_mask": attention, "labels": labels})
    for batch in media:
        assert batch.mask is not None
        assert batch.kwargs["decoder_input_ids"].shape[1] != batch.mask.shape[1]


def test_what_the_decoder_reads_must_be_known(tmp_path: Path) -> None:
    model: Any = whisper()
    headless: Any = model.model
    write_clips(tmp_path / "clips", 3)
    save_tokenizer(tmp_path)
    features = WRITERS["whisper"][1]
    with pytest.raises(InputError, match="no head that writes") as caught:
        prepared(headless, features)
    assert "text beside each file" in caught.value.remedy
    assert "decoder_input_ids" in caught.value.remedy

    def broken(**_: Any) -> None:
        raise ValueError("no such thing")

    model.generate = broken
    with pytest.raises(InputError, match=r"generate\(\) fails .*no such thing"):
        prepared(model, features)
    model.generate = lambda **_: torch.tensor([[START, END]] * 8)
    with pytest.raises(InputError, match="writes nothing of any sample"):
        prepared(model, {name: value[:8] for name, value in features.items()})
    model.generate = lambda **_: torch.zeros(8, 3)
    with pytest.raises(InputError, match="returns no tokens"):
        prepared(model, features)


def test_models_without_a_head_read_as_they_would_themselves() -> None:
    from transformers import BartModel, T5EncoderModel, T5Model

    _, inputs = WRITERS["t5"]
    writer: Any = t5()
    own = prepared(T5Model(writer.config).eval(), inputs)
    assert torch.equal(own[0].kwargs["decoder_input_ids"][:, 1:], inputs["input_ids"][:, :-1])
    bart: Any = WRITERS["bart"][0]()
    assert "decoder_input_ids" not in prepared(BartModel(bart.config).eval(), inputs)[0].kwargs
    assert not reads_its_own_text(T5EncoderModel(writer.config))
    assert not reads_its_own_text(nn.Linear(2, 2))


def test_tokens_that_only_the_configuration_names_are_used() -> None:
    build, inputs = WRITERS["captioner"]
    model: Any = build()
    expected = prepared(model, inputs)[0].kwargs["decoder_input_ids"]
    for name in ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, None)
    assert torch.equal(prepared(model, inputs)[0].kwargs["decoder_input_ids"], expected)


def test_a_batch_of_a_writer_holds_labels_of_its_own_size() -> None:
    _, inputs = WRITERS["captioner"]
    media = prepared(WRITERS["captioner"][0](), inputs["pixel_values"])
    assert all(isinstance(batch, Batch) and batch.labels is not None for batch in media)
    assert all(batch.labels is not None and len(batch.labels) == batch.size for batch in media)
