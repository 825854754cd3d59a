"""Samples of a training: what a batch of some of them holds, whatever their lengths are."""

from __future__ import annotations

import torch

from alphasmith.objectives.media import MediaBatches
from alphasmith.objectives.media.batch import Batch
from alphasmith.search.training._samples import LabelledSamples


def test_batches_follow_the_numbers_asked_for() -> None:
    def load(numbers: tuple[int, ...]) -> Batch:
        return Batch(args=(torch.tensor(numbers)[:, None].float(),))

    samples = LabelledSamples(media=MediaBatches.of(10, 4, load), numbers=(7, 2, 5), classes=tuple(range(10, 20)))
    batch = samples.batch([2, 0, 0])
    assert batch.args[0][:, 0].tolist() == [5.0, 7.0, 7.0]
    assert torch.equal(torch.as_tensor(batch.labels), torch.tensor([15, 17, 17]))
    assert len(samples) == 3


def test_samples_of_several_lengths_are_filled_up() -> None:
    lengths = (3, 5, 3)

    def load(numbers: tuple[int, ...]) -> Batch:
        rows = [torch.full((lengths[number],), number + 1) for number in numbers]
        return Batch(args=(torch.stack(rows),), labels=torch.stack(rows))

    media = MediaBatches.of(3, 1, load, alike=lengths)
    batch = LabelledSamples(media=media, numbers=(0, 1, 2), classes=None).batch([0, 1])
    assert batch.args[0].tolist() == [[1, 1, 1, 0, 0], [2, 2, 2, 2, 2]]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[1, 1, 1, -100, -100], [2, 2, 2, 2, 2]]
    alike = LabelledSamples(media=media, numbers=(0, 1, 2), classes=None).batch([0, 2])
    assert alike.args[0].shape == (2, 3)
    assert alike.mask is None


def test_sounds_of_several_lengths_end_in_silence() -> None:
    def load(numbers: tuple[int, ...]) -> Batch:
        return Batch(kwargs={"input_values": torch.ones(len(numbers), 2 + 2 * numbers[0])})

    media = MediaBatches.of(2, 1, load, alike=(2, 4))
    batch = LabelledSamples(media=media, numbers=(0, 1), classes=(0, 1)).batch([0, 1])
    assert batch.kwargs["input_values"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.mask is None
