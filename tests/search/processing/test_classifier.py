"""Media to probabilities and classes: what holds of every answer, alone and in company, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media import NamedBytes
from alphasmith.objectives.media.items import ItemLimits
from alphasmith.search import Classifier, load_quantized
from alphasmith.search.processing.classifier import Classified, NamedItem, Refused
from tests.support.processed import (
    MOODS,
    RATE,
    Hearing,
    ToneClassifier,
    spotted_pictures,
    tone_classifier,
    waves,
    written_sounds,
    written_videos,
)
from tests.support.run_cases import launch, rows, vectors

WORDS = ("scale", "range of groups", "a", "fold the site", "quantized rows", "loss", "trial trial", "row.")


def sent(wave: np.ndarray[Any, Any], rate: int = RATE, name: str = "sent.wav") -> NamedBytes:
    """A sound as its bytes."""
    stream = io.BytesIO()
    soundfile.write(stream, wave, rate, format="WAV", subtype="FLOAT")
    return NamedBytes(name, stream.getvalue())


def image_items(tmp_path: Path) -> Sequence[Any]:
    return sorted(spotted_pictures(tmp_path / "pictures", 24, (8, 12, 9)).iterdir())


def text_items(tmp_path: Path) -> Sequence[Any]:
    return [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 2 + i % 4)) for i in range(24)]


def sound_items(tmp_path: Path) -> Sequence[Any]:
    return [sent(wave) for wave in waves([900 + 150 * (i % 5) for i in range(24)])]


def video_items(tmp_path: Path) -> Sequence[Any]:
    return sorted(written_videos(tmp_path / "clips", 12).glob("*/*"))


@pytest.fixture(params=["image", "text", "sound", "video"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any], Sequence[Any]]:
    """A result, how its model is built, and items of several shapes."""
    made = {"image": image_items, "text": text_items, "sound": sound_items, "video": video_items}
    items = made[request.param](tmp_path)
    place = {"model": tone_classifier()} if request.param == "sound" else {}
    return request.getfixturevalue(f"{request.param}_result"), place, items


def test_company_changes_no_probability(case: tuple[Path, dict[str, Any], Sequence[Any]]) -> None:
    result, place, items = case
    one = Classifier.opened(result, batch=1, **place)
    alone = [one.classify([item])[0] for item in items]
    assert len({answer.probabilities for answer in alone}) > len(set(items)) // 2, "the items differ"
    for batch in (2, 7, 32):
        together = Classifier.opened(result, batch=batch, **place).classify(items)
        assert [answer.name for answer in together] == [answer.name for answer in alone]
        for answer, expected in zip(together, alone, strict=True):
            assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


def test_answers_are_distributions_of_the_integer_model(case: tuple[Path, dict[str, Any], Sequence[Any]]) -> None:
    result, place, items = case
    classifier = Classifier.opened(result, **place)
    model = load_quantized(result, place.get("model"))
    for item in items[:4]:
        (answer,) = classifier.classify([item], top="all")
        assert sum(answer.probabilities) == pytest.approx(1, abs=1e-6)
        assert [c.probability for c in answer.top] == sorted(answer.probabilities, reverse=True)
        assert answer.best.index == max(range(len(answer.probabilities)), key=answer.probabilities.__getitem__)
        batch = classifier.decode(item).batch
        with torch.no_grad():
            output = model(*batch.args, **batch.kwargs)
        logits = getattr(output, "logits", output)
        assert answer.probabilities == pytest.approx(logits[0].double().softmax(-1).tolist(), abs=1e-12)


def test_names_come_from_the_model_or_as_told(text_result: Path, tmp_path: Path) -> None:
    def names(**options: Any) -> tuple[str, ...] | None:
        return Classifier.opened(text_result, **options).classes

    assert names() == MOODS
    assert names(labels=["a", "b", "c"]) == ("a", "b", "c")
    file = tmp_path / "labels"
    for content in (
        "x\ny\n\nz\n",
        '["x", "y", "z"]',
        '{"id2label": {"1": "y", "0": "x", "2": "z"}}',
        '{"dim": 64, "labels": ["x", "y", "z"]}',
    ):
        file.write_text(content)
        assert names(labels=file) == ("x", "y", "z")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("x\ny\n", "names 2 classes, and the model has 3"),
        ("x\ny\nx\n", "'x' is there twice"),
        ("", "there are none"),
        ('{"0": "x", "2": "y", "3": "z"}', "not numbered 0 to 2"),
        ("[1, 2", "not JSON"),
    ],
)
def test_labels_that_do_not_fit(content: str, problem: str, text_result: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(content)
    with pytest.raises(InputError, match=problem) as caught:
        Classifier.opened(text_result, labels=tmp_path / "labels")
    assert caught.value.field == "--labels"


def test_names_of_other_classes_than_the_model_answers_with(sound_result: Path) -> None:
    model: Any = tone_classifier()
    model.config = {"sampling_rate": RATE}
    classifier = Classifier.opened(sound_result, model=model, labels=["a", "b", "c"])
    with pytest.raises(InputError, match="3 classes have names, and the model answers with 4") as caught:
        classifier.classify([sent(waves([1500])[0])])
    assert caught.value.field == "--labels"


def test_more_classes_than_there_are(text_result: Path) -> None:
    classifier = Classifier.opened(text_result)
    with pytest.raises(InputError, match="4 classes are asked for, and the model has 3; give at most 3"):
        classifier.classify(["row"], top=4)
    with pytest.raises(InputError, match="not positive"):
        classifier.classify(["row"], top=0)
    (answer,) = classifier.classify(["row"])
    assert len(answer.top) == 3


def test_one_bad_item_is_one_answer(image_result: Path, tmp_path: Path) -> None:
    files = list(image_items(tmp_path))
    files[3].write_bytes(b"junk")
    files[20].write_bytes(files[21].read_bytes()[:90])
    items = [NamedItem(name=f"n{i}", item=file) for i, file in enumerate(files)]
    items.insert(5, Refused(name="before", error=InputError("item", "was refused before", "leave it")))  # type: ignore[arg-type]
    answers = list(Classifier.opened(image_result, batch=4).stream(items))
    assert [a.name for a in answers] == [item.name for item in items]
    assert [a.name for a in answers if isinstance(a, Refused)] == ["n3", "before", "n20"]
    good = [a for a in answers if isinstance(a, Classified)]
    alone = Classifier.opened(image_result).classify([files[int(a.name[1:])] for a in good])
    assert [a.probabilities for a in alone] == [a.probabilities for a in good]


def test_a_stream_is_read_as_it_is_needed(image_result: Path, tmp_path: Path) -> None:
    file = next(iter(image_items(tmp_path)))
    taken = 0

    def items() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield NamedItem(name=str(taken), item=file)

    answers = Classifier.opened(image_result, batch=4).stream(items())
    assert [next(answers).name for _ in range(9)] == [str(i) for i in range(1, 10)]
    assert taken <= 12


def test_an_item_that_the_model_cannot_take_does_not_stop_the_others(sound_result: Path) -> None:
    classifier = Classifier.opened(sound_result, model=tone_classifier())
    long, short = waves([1200, 10])
    items = [NamedItem(name=str(i), item=sent(wave)) for i, wave in enumerate((long, short, long))]
    answers = list(classifier.stream(items))
    assert [type(answer) for answer in answers] == [Classified, Refused, Classified]
    assert isinstance(answers[1], Refused)
    assert "cannot be run on it" in str(answers[1].error)
    with pytest.raises(InputError, match="cannot be run on it"):
        classifier.classify([sent(short)])


def test_sound_of_another_rate_is_resampled_with_a_note(sound_result: Path) -> None:
    classifier = Classifier.opened(sound_result, model=tone_classifier(), limits=ItemLimits(seconds=0.2))
    (wave,) = waves([6000])
    (answer,) = classifier.classify([sent(wave, 2 * RATE)])
    assert answer.notes == (f"resampled from {2 * RATE} to {RATE} Hz", "only its first 0.2 s are heard")
    assert classifier.decode(sent(wave, 2 * RATE)).batch.args[0].shape == (1, RATE // 5)
    assert classifier.classify([sent(wave[:1000])])[0].notes == ()


@pytest.mark.parametrize(
    ("which", "item", "problem"),
    [
        ("sound", NamedBytes("cat.png", b"\x89PNG"), "cat.png is an image, and the model takes sound"),
        ("sound", NamedBytes("upload", b"\x89PNG\r\n\x1a\n...."), "upload is an image, and the model takes sound"),
        ("image", NamedBytes("upload", b"RIFF....WAVE"), "upload is sound, and the model takes an image"),
        ("image", "a text", "is a text, and the model takes an image"),
        ("image", NamedBytes("x.png", b"junk"), "x.png is not a readable image"),
        ("text", "  \n", "the text is empty"),
        ("text", NamedBytes("upload", b"\xff\xfe\x00"), "upload is not UTF-8 text"),
    ],
)
def test_an_item_of_another_kind(which: str, item: Any, problem: str, request: pytest.FixtureRequest) -> None:
    place: dict[str, Any] = {"model": tone_classifier()} if which == "sound" else {}
    classifier = Classifier.opened(request.getfixturevalue(f"{which}_result"), **place)
    with pytest.raises(InputError, match=problem) as caught:
        classifier.decode(item)
    assert caught.value.field == "item"
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)


def test_limits_of_an_item(image_result: Path, text_result: Path, tmp_path: Path) -> None:
    file = image_items(tmp_path)[1]
    for limits, problem in ((ItemLimits(bytes=100), "more than 100"), (ItemLimits(pixels=100), "too many")):
        with pytest.raises(InputError, match=problem):
            Classifier.opened(image_result, limits=limits).decode(file)
    short = Classifier.opened(text_result, limits=ItemLimits(tokens=4))
    assert short.decode("a longer text").notes == ("only its first 4 tokens are read",)
    assert short.decode("text").notes == ()
    assert Classifier.opened(text_result).decode("long " * 40).notes == ("only its first 64 tokens are read",)
    with pytest.raises(InputError, match=r"limits\.seconds"):
        ItemLimits(seconds=float("nan"))


def test_what_the_model_is(image_result: Path) -> None:
    described = Classifier.opened(image_result).description
    manifest = json.loads((image_result / "manifest.json").read_text())
    assert described.run == manifest["run"]["id"]
    assert described.kind == "image"
    assert described.classes == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert described.digests["float model"] == manifest["model"]["digest"]
    assert "quantized/model.safetensors" in described.digests


def test_a_run_is_found_by_its_id(image_result: Path) -> None:
    run = json.loads((image_result / "manifest.json").read_text())["run"]["id"]
    storage = f"sqlite:///{image_result.parent / 'runs.db'}"
    assert Classifier.opened(run, storage=storage).description.folder == str(image_result)
    with pytest.raises(InputError, match="r-none"):
        Classifier.opened("r-none", storage=storage)


def test_a_run_that_is_not_finished(image_result: Path, tmp_path: Path) -> None:
    import sqlite3

    for name in ("runs.db", "runs.db-wal"):  # what is not in the database yet is in the log beside it
        if (image_result.parent / name).exists():
            shutil.copy(image_result.parent / name, tmp_path)
    ((run,),) = rows(tmp_path / "runs.db", "SELECT id FROM alphasmith_run")
    with sqlite3.connect(tmp_path / "runs.db") as connection:
        connection.execute("UPDATE alphasmith_run SET status = 'interrupted'")
    with pytest.raises(InputError, match=f"run {run} is interrupted, not finished; alphasmith resume {run}"):
        Classifier.opened(run, storage=f"sqlite:///{tmp_path / 'runs.db'}")


def test_digests_are_checked(image_result: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "preprocessor_config.json", "config.json"):
        folder = tmp_path / name
        shutil.copytree(image_result, folder)
        with (folder / "quantized" / name).open("ab") as stream:
            stream.write(b" ")
        with pytest.raises(InputError, match=rf"^RUN: .*{name}.* restore the folder, or run again$"):
            Classifier.opened(folder)


def test_models_that_give_no_classes(writer_result: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="writes texts and gives no classes; use alphasmith generate"):
        Classifier.opened(writer_result)
    with pytest.raises(
        InputError, match="does not say how to build the model: a script handed it over; name a function"
    ):
        Classifier.opened(
            launch(tmp_path, tone_classifier(), [torch.randn(24, 2000)], {"search": {"trials": 4}}).folder
        )


class Answering(nn.Module):
    """Answers with what a function makes of a linear layer."""

    def __init__(self, ending: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.ending = ending
        self.config = {"num_channels": 1, "image_size": (2, 4)}

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 1, 2, 4) -> what the ending makes of (B, 8)."""
        return torch.as_tensor(self.ending(self.first(pixels.flatten(1))))


def opened(tmp_path: Path, ending: nn.Module, **options: Any) -> Classifier:
    model = Answering(ending)
    folder = launch(tmp_path, model, vectors(24, 1, 2, 4), {"search": {"trials": 4}}).folder
    return Classifier.opened(folder, model=model, **options)


def test_probabilities_are_left_as_they_are(tmp_path: Path) -> None:
    files = sorted(spotted_pictures(tmp_path / "pictures", 4).iterdir())
    (tmp_path / "soft").mkdir()
    soft = opened(tmp_path / "soft", nn.Softmax(-1))
    batch = soft.decode(files[0]).batch
    model = load_quantized(soft.description.folder, Answering(nn.Softmax(-1)))
    with torch.no_grad():
        expected = model(*batch.args)[0].tolist()
    assert soft.classify(files[:1])[0].probabilities == pytest.approx(expected, abs=1e-6)
    told = Classifier.opened(soft.description.folder, model=Answering(nn.Softmax(-1)), output="logits")
    assert max(told.classify(files[:1])[0].probabilities) < max(expected)
    assert soft.classes == tuple("01234567")


def test_probabilities_that_are_none(tmp_path: Path) -> None:
    file = next(spotted_pictures(tmp_path / "pictures", 1).iterdir())
    classifier = opened(tmp_path, nn.Identity(), output="probabilities")
    with pytest.raises(InputError, match="no distribution"):
        classifier.classify([file])


class Shaped(nn.Module):
    """Another shape than (B, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 8) -> (B, 4, 2)."""
        return x.reshape(-1, 4, 2)


def test_an_answer_for_every_position_is_no_class(tmp_path: Path) -> None:
    file = next(spotted_pictures(tmp_path / "pictures", 1).iterdir())
    classifier = opened(tmp_path, Shaped())
    with pytest.raises(InputError, match="answers an item with 4x2") as caught:
        list(classifier.stream([NamedItem(name="x", item=file)]))
    assert caught.value.field == "RUN"


class Tied(nn.Module):
    """Every logit twice, the second one four places after the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 8) -> (B, 8)."""
        return x[:, :4].repeat(1, 2)


class Broken(nn.Module):
    """NaN where the first pixel is black."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 8) -> (B, 8)."""
        return torch.where(x[:, :1] > 1e9, x, x * float("nan")) if not self.training and x.shape[0] == 1 else x


def test_of_equal_probabilities_the_lowest_index_comes_first(tmp_path: Path) -> None:
    file = next(spotted_pictures(tmp_path / "pictures", 1).iterdir())
    (answer,) = opened(tmp_path, Tied()).classify([file], top="all")
    first = [c.index for c in answer.top[::2]]
    assert sorted(first) == [0, 1, 2, 3]
    assert [c.index for c in answer.top[1::2]] == [index + 4 for index in first]


def test_an_answer_that_is_not_finite_is_an_error_of_its_item(tmp_path: Path) -> None:
    file = next(spotted_pictures(tmp_path / "pictures", 1).iterdir())
    (answer,) = opened(tmp_path, Broken()).stream([NamedItem(name="x", item=file)])
    assert isinstance(answer, Refused)
    assert "NaN or infinity" in str(answer.error)


def test_threads_take_turns(text_result: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    classifier = Classifier.opened(text_result)
    texts = list(text_items(Path()))
    expected = classifier.classify(texts)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: classifier.classify([text])[0], texts * 3))
    assert [a.probabilities for a in found] == [a.probabilities for a in expected] * 3


def test_a_factory_is_run_only_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alphasmith.search import run
    from tests.support.run_cases import settings

    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "tone_models.py").write_text(
        "from tests.support.processed import sounds, tone_classifier\n"
        "def build():\n    model = tone_classifier()\n    return model, model.config\n"
        "def data():\n    return sounds()\n"
    )
    named = {"factory": "tone_models:build", "factory_path": "src"}
    values = {"model": named, "data": {"factory": "tone_models:data"}, "search": {"trials": 4}}
    folder = run(settings(tmp_path, values)).folder
    with pytest.raises(InputError, match="names code that would run here"):
        Classifier.opened(folder)
    allowed = Classifier.opened(folder, allow_code=["tone_models:build", "src"])
    given = Classifier.opened(folder, factory="tone_models:build", factory_path=tmp_path / "src")
    item = sent(waves([1500])[0])
    expected = Classifier.opened(folder, model=ToneClassifier()).classify([item])
    assert allowed.classify([item]) == given.classify([item]) == expected
    assert given.classes == ("low", "middle", "high", "noise")


def test_what_a_model_takes_is_what_its_run_was_given(tmp_path: Path) -> None:
    from alphasmith.search import finetune, run
    from tests.support.run_cases import seeded, settings

    clips = written_sounds(tmp_path / "clips", RATE)
    model = seeded(Hearing)
    few = {"path": clips, "sampling_rate": RATE, "samples": 12, "held_out": 6, "proof": 2}
    folder = run(settings(tmp_path, {"search": {"trials": 4}, "data": few}), model=model).folder
    assert Classifier.opened(folder, model=model).description.kind == "audio"
    pictures = spotted_pictures(tmp_path / "pictures", 4)
    shares = {"path": pictures, "fraction": 0.5, "held_out": 0.5}
    with pytest.raises(InputError, match=r"data.path: .* holds image, and the model takes audio; give audio files"):
        finetune(folder, {"storage": f"sqlite:///{tmp_path / 'runs.db'}", "data": shares}, model=model)
    clips.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="--kind: is missing"):
        Classifier.opened(folder, model=model)
    assert Classifier.opened(folder, model=model, kind="audio").classify([sent(waves([1600])[0])])
