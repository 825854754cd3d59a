"""Data of the real models: what a run is calibrated on, drawn by a seed, and what it is judged on, which no run ever sees."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.real_folders import SHARED, AbsentError

#: Tokens of a window of a language model, and of a text of an encoder at most.
WINDOW = 128
LONGEST = 96
#: Height and width of images [pixels].
SIDE = 112
_RATE = 16_000
#: Places of the shared AG news rows that are judged on; others calibrate.
_JUDGED_ROWS = 1000
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Arguments = dict[str, Tensor]
Wave = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """A title and the text that belongs to it."""

    title: str
    text: str


@dataclass(frozen=True)
class Labelled:
    """A sentence and its class."""

    text: str
    label: int


@dataclass(frozen=True, eq=False)
class Images:
    """(N, 3, SIDE, SIDE) float32 as the model takes them, and (N,) classes."""

    pixels: Tensor
    labels: Tensor


def shared_file(*parts: str) -> Path:
    """A file of the shared data.

    Raises:
        AbsentError: It is not there.
    """
    path = SHARED.joinpath("data", *parts)
    if not path.is_file():
        raise AbsentError(f"shared/data/{'/'.join(parts)} is not beside the checkout")
    return path


# ------------------------------------------------------------------------------------------------------------- language


def windows(tokenizer: Any, name: str, *, limit: int = 400_000) -> Tensor:
    """(N, WINDOW) token ids of a shared text, from its beginning.

    Args:
        tokenizer: Of the model.
        name: File in the texts.
        limit: Characters that are read.
    """
    text = shared_file("texts", name).read_text(encoding="utf-8")[:limit]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)


def drawn(rows: Tensor, count: int, seed: int) -> Tensor:
    """``count`` rows in an order of its own for each seed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:count]]


def evenly(rows: Tensor, count: int) -> Tensor:
    """``count`` rows spread over all of them."""
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


# ----------------------------------------------------------------------------------------------------------------- texts


@cache
def news() -> tuple[Pair, ...]:
    """AG news, titles and descriptions, in the order of the file."""
    with shared_file("texts", "ag_news_test.csv").open(encoding="utf-8", newline="") as file:
        return tuple(Pair(title, text) for _, title, text in csv.reader(file))


def judged_pairs(count: int) -> tuple[Pair, ...]:
    """Pairs that no run is calibrated on."""
    return news()[:_JUDGED_ROWS][:count]


def calibration_pairs(count: int, seed: int) -> tuple[Pair, ...]:
    """Other pairs, drawn by the seed."""
    generator = np.random.default_rng(seed)
    return tuple(news()[_JUDGED_ROWS:][i] for i in generator.permutation(len(news()) - _JUDGED_ROWS)[:count])


def calibration_texts(count: int, seed: int) -> list[str]:
    """Descriptions, and for every fourth pair the title, of pairs that nobody judges on."""
    pairs = calibration_pairs(count, seed)
    return [pair.title if number % 4 == 3 else pair.text for number, pair in enumerate(pairs)]


def sentiment(part: str, count: int) -> tuple[Labelled, ...]:
    """Sentences of SST-2, spread over the file, whose classes lie one behind the other."""
    lines = shared_file("texts", f"sst2_{part}.txt").read_text(encoding="utf-8").splitlines()
    chosen = [lines[int(i)] for i in np.linspace(0, len(lines) - 1, min(count, len(lines)))]
    return tuple(Labelled(line[2:], int(line[0])) for line in chosen)


def encoded(tokenizer: Any, texts: Sequence[str], size: int) -> list[Arguments]:
    """Batches of texts in their order, filled up to the longest of each."""
    parts = [list(texts[i : i + size]) for i in range(0, len(texts), size)]
    given = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
    return [dict(tokenizer(part, **given)) for part in parts]


def by_length(texts: Sequence[str]) -> list[int]:
    """Numbers of the texts from the shortest to the longest."""
    return sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))


# ---------------------------------------------------------------------------------------------------------------- images


def _images(name: str) -> Images:
    with np.load(shared_file("cifar10", name)) as stored:
        raw, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]).long()
    pixels = raw.permute(0, 3, 1, 2).float() / 255
    pixels = torch.nn.functional.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    mean, deviation = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
    return Images((pixels - mean) / deviation, labels)


@cache
def image_sets() -> tuple[Images, Images]:
    """A thousand images to calibrate and to learn classes on, and two hundred others to judge."""
    return _images("cifar10_jpeg1000.npz"), _images("cifar10_test200.npz")


# ---------------------------------------------------------------------------------------------------------------- speech

#: Clips that runs are calibrated on, in crops, and clips that judge.
_CALIBRATION_CLIPS = ("pesq_speech", "vctk_p287_001", "vctk_p287_002", "vctk_p287_003")
_JUDGED_CLIPS = ("vctk_p287_004", "vctk_p287_005", "vctk_p287_006")
_KINDS = ("clean", "noisy")


def _wave(name: str) -> Wave:
    import soundfile

    wave, rate = soundfile.read(shared_file("speech_pairs", f"{name}.wav"), dtype="float32")
    if rate != _RATE:
        raise AbsentError(f"{name}.wav has {rate} samples a second, {_RATE} are expected")
    return np.asarray(wave, dtype=np.float32)


def judged_waves(count: int) -> list[Wave]:
    """Whole clips, then halves of them."""
    whole = [_wave(f"{name}_{kind}") for name in _JUDGED_CLIPS for kind in _KINDS]
    halves = [half for wave in whole for half in (wave[: len(wave) // 2], wave[len(wave) // 2 :])]
    return [*whole, *halves][:count]


def calibration_waves(count: int, seed: int) -> list[Wave]:
    """Random crops of 1.5 to 4 seconds of the clips to calibrate on."""
    generator = np.random.default_rng(seed)
    clips = [_wave(f"{name}_{kind}") for name in _CALIBRATION_CLIPS for kind in _KINDS]
    crops = []
    for number in range(count):
        clip = clips[number % len(clips)]
        length = min(len(clip), int(generator.uniform(1.5, 4.0) * _RATE))
        start = int(generator.integers(0, len(clip) - length + 1))
        crops.append(clip[start : start + length])
    return crops


def write_crops(folder: Path, count: int, seed: int) -> None:
    """The crops of :func:`calibration_waves` as files: data as a user has them."""
    import soundfile

    folder.mkdir(parents=True)
    for number, crop in enumerate(calibration_waves(count, seed)):
        soundfile.write(folder / f"{number:03}.wav", crop, _RATE)
