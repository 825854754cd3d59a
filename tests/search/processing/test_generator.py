"""Texts that follow prompts: greedy, drawn, alone and in company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.text import load_tokenizer
from alphasmith.search import Generator, load_quantized
from alphasmith.search.processing.generator import Decoding

PROMPTS = ("scale the range", "a", "fold. the site and", "row row row")
SHORT = Decoding(max_tokens=12)


@pytest.fixture(scope="module")
def generator(writer_result: Path) -> Generator:
    return Generator.opened(writer_result)


def texts(generator: Generator, prompts: Any, **options: Any) -> list[str]:
    return [found.text for found in generator.generate(prompts, **options)]


def test_greedy_takes_the_most_probable_token_of_the_integer_model(generator: Generator, writer_result: Path) -> None:
    model: Any = load_quantized(writer_result)
    letters = "?abcdefghijklmnopqrstuvwxyz ."
    ids = [letters.index(c) for c in PROMPTS[0]]
    before = len(ids)
    with torch.no_grad():
        for _ in range(12):  # without a cache of keys and values, the whole text at every step
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    (found,) = generator.generate([PROMPTS[0]], decoding=SHORT)
    written = [token for token in ids[before:] if token < len(letters)]
    assert found.text.replace(" ", "") == "".join(letters[token] for token in written).replace(" ", "")
    assert (found.tokens, found.stopped) == (12, "length")


def test_a_decoder_writes_after_what_its_encoder_reads(translator_result: Path) -> None:
    from tests.support.writers import START, VOCABULARY

    model: Any = load_quantized(translator_result)
    tokenizer = load_tokenizer(translator_result / "quantized")
    read = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    written = [START]
    with torch.no_grad():
        for _ in range(12):
            answer = model(input_ids=read, decoder_input_ids=torch.tensor([written]))
            written.append(int(answer.logits[0, -1].argmax()))
    generator = Generator.opened(translator_result)
    (found,) = generator.generate([PROMPTS[0]], decoding=SHORT)
    assert len(set(written)) > 1
    assert all(token < VOCABULARY for token in written)
    assert found.text == tokenizer.decode(written[1:], skip_special_tokens=True)
    assert (found.tokens, found.stopped) == (12, "length")
    drawn = Decoding(max_tokens=12, temperature=1.0, seed=3)
    first = texts(generator, PROMPTS, decoding=drawn)
    assert texts(generator, PROMPTS, decoding=drawn) == first != texts(generator, PROMPTS, decoding=SHORT)


def test_greedy_is_the_same_for_one_and_many(generator: Generator) -> None:
    together = texts(generator, PROMPTS, decoding=SHORT)
    assert together == [texts(generator, [prompt], decoding=SHORT)[0] for prompt in PROMPTS]
    assert len(set(together)) > 1


def test_drawn_texts_follow_the_seed(generator: Generator) -> None:
    drawn = Decoding(max_tokens=12, temperature=1.0, top_p=0.95, seed=7)
    state = torch.random.get_rng_state()
    first = texts(generator, PROMPTS, decoding=drawn)
    assert texts(generator, PROMPTS, decoding=drawn) == first
    assert (
        texts(generator, PROMPTS[1:2], decoding=Decoding(max_tokens=12, temperature=1.0, top_p=0.95, seed=8))
        == first[1:2]
    )
    many = {
        texts(generator, PROMPTS[:1], decoding=Decoding(max_tokens=12, temperature=2.0, seed=s))[0] for s in range(4)
    }
    assert len(many) > 1
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left as it was"


def test_a_vanishing_share_is_greedy(generator: Generator) -> None:
    least = Decoding(max_tokens=12, temperature=1.0, top_p=1e-9)
    assert texts(generator, PROMPTS, decoding=least) == texts(generator, PROMPTS, decoding=SHORT)


def test_a_text_ends_where_the_model_ends_it(generator: Generator, mute_result: Path) -> None:
    ended = next(Generator.opened(mute_result).generate(["abc"], decoding=SHORT))
    assert (ended.text, ended.tokens, ended.stopped) == ("", 0, "end")
    assert next(generator.generate(["abc"], decoding=SHORT)).tokens == 12


def test_the_model_sees_so_many_tokens(generator: Generator) -> None:
    (found,) = generator.generate(["a" * 60], decoding=SHORT)
    assert found.tokens == 4
    assert found.notes == ("at most 4 tokens: the model sees 64",)
    with pytest.raises(InputError, match=r"--prompt: 'a+' has 64 tokens, and the model sees 64"):
        generator.generate(["a" * 64])


def test_chat_puts_the_prompt_into_the_template(generator: Generator, image_result: Path) -> None:
    assert texts(generator, ["row"], chat=True, decoding=SHORT) == texts(generator, ["row."], decoding=SHORT)


@pytest.mark.parametrize("prompts", [[], [""], ["row", " "]])
def test_prompts_that_are_none(prompts: list[str], generator: Generator) -> None:
    with pytest.raises(InputError, match="--prompt"):
        generator.generate(prompts)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": 0}, "--max-tokens"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p"),
        ({"top_p": 0.5}, "--top-p"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_settings_that_cannot_be_used(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        Decoding(**options)
    assert caught.value.field == field


def test_models_that_write_no_texts(image_result: Path) -> None:
    with pytest.raises(InputError, match="ViTForImageClassification writes no texts; give a language model"):
        Generator.opened(image_result)
