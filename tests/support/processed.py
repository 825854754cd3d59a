"""Small classifiers of every kind of media, and items for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor, nn

from tests.support.run_cases import VOCABULARY, saved_llama, seeded

#: Classes of :func:`saved_reader`.
MOODS = ("good", "bad", "neither")
#: Rate of :func:`tone_classifier` [Hz].
RATE = 8000


class ToneClassifier(nn.Module):
    """Convolutions over a waveform of any length, a recurrent layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 8, 16, stride=8)
        self.second = nn.Conv1d(8, 16, 8, stride=4, padding=2)
        self.recurrent = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 4)
        self.config = {"sampling_rate": RATE, "labels": ["low", "middle", "high", "noise"]}

    def forward(self, wave: Tensor) -> Tensor:
        """(B, samples) -> (B, 4)."""
        x = torch.relu(self.second(torch.relu(self.first(wave[:, None] * 3))))
        return torch.as_tensor(self.head(self.recurrent(x.mT)[0].mean(1)))


def tone_classifier() -> nn.Module:
    """Always the same one."""
    return seeded(ToneClassifier)


def sounds(samples: int = 32) -> list[Tensor]:
    """Batches of eight waveforms (8, 2000)."""
    generator = torch.Generator().manual_seed(2)
    return list((0.2 * torch.randn(samples, 2000, generator=generator)).split(8))


def waves(lengths: list[int]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Noise of these lengths."""
    generator = np.random.default_rng(3)
    return [(0.2 * generator.standard_normal(length)).clip(-1, 1).astype(np.float32) for length in lengths]


def spotted_pictures(folder: Path, count: int, sizes: tuple[int, ...] = (8,)) -> Path:
    """Pictures of noise in one folder, by turns of these sizes."""
    folder.mkdir()
    generator = np.random.default_rng(4)
    for i in range(count):
        edge = sizes[i % len(sizes)]
        pixels = generator.integers(0, 256, (edge, edge, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


class Hearing(nn.Module):
    """Answers 1600 numbers of a waveform with two logits, and says nothing of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, wave: Tensor) -> Tensor:
        """(B, samples) -> (B, 2)."""
        return torch.as_tensor(self.head(torch.relu(self.inner(wave[:, :1600].unflatten(1, (100, 16)))).mean(1)))


def written_sounds(folder: Path, rate: int, length: int = 1600) -> Path:
    """24 noises of so many numbers at a rate [Hz], in a folder for each of two classes, ``0`` and ``1``."""
    for number, wave in enumerate(waves([length] * 24)):
        (folder / str(number % 2)).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / str(number % 2) / f"{number:02}.wav", wave, rate)
    return folder


#: Classes of :func:`saved_watcher`: which way a bar goes.
WAYS = ("left", "right")
_FRAMES, _EDGE = 4, 16


def written_videos(folder: Path, count: int = 24) -> Path:
    """Clips of a bar that goes left or right under noise, in a folder for each way, lossless."""
    av = pytest.importorskip("av")
    generator = np.random.default_rng(5)
    for number in range(count):
        way = number % 2
        target = folder / WAYS[way]
        target.mkdir(parents=True, exist_ok=True)
        with av.open(str(target / f"{number:02}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=10)
            stream.width = stream.height = _EDGE
            stream.pix_fmt = "bgr0"
            for time in range(_FRAMES):
                pixels = generator.integers(0, 60, (_EDGE, _EDGE, 3)).astype(np.uint8)
                at = 4 * (time if way else _FRAMES - 1 - time)
                pixels[:, at : at + 4] += 150
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="bgr0")))
            container.mux(stream.encode())
    return folder


def saved_watcher(folder: Path) -> Path:
    """A VideoMAE of one layer that classifies clips of :func:`written_videos`."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=_EDGE,
        patch_size=8,
        num_frames=_FRAMES,
        tubelet_size=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(WAYS)),
        label2id={name: number for number, name in enumerate(WAYS)},
    )
    model: Any = seeded(lambda: VideoMAEForVideoClassification(config))
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "VideoMAEImageProcessor",
        "size": {"shortest_edge": _EDGE},
        "crop_size": {"height": _EDGE, "width": _EDGE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def saved_reader(folder: Path) -> Path:
    """A BERT of three named classes with a tokenizer of one token for each letter."""
    from transformers import BertConfig, BertForSequenceClassification

    saved_llama(folder)  # for its tokenizer
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        id2label=dict(enumerate(MOODS)),
        label2id={name: i for i, name in enumerate(MOODS)},
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 64}))
    return folder
