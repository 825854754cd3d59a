"""Samples of a training: what a batch of some of them holds, whatever their lengths are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.media import MediaBatches
from alphasmith.objectives.media.batch import Batch
from alphasmith.search.inputs.labelled_samples import LabelledSamples
from alphasmith.search.training._kept import KeptSamples


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


class Reading:
    """Reads samples of several lengths, and counts how often each is read alone."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.alone: list[int] = []

    def __call__(self, numbers: tuple[int, ...]) -> Batch:
        """Filled up to the longest of them, with a mask where that is needed."""
        if len(numbers) == 1:
            self.alone += numbers
        most = max(self.lengths[number] for number in numbers)
        rows = torch.zeros(len(numbers), most)
        for place, number in enumerate(numbers):
            rows[place, : self.lengths[number]] = number + 1
        mask = None if bool((rows != 0).all()) else rows != 0
        return Batch(args=(rows,), kwargs={"scale": torch.tensor(2.0), "ids": rows.long()}, mask=mask)


@given(
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    asked=st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=5), min_size=1, max_size=6),
    room=st.sampled_from([0, 40, 10**6]),
)
def test_kept_samples_are_those_that_were_read(lengths: list[int], asked: list[list[int]], room: int) -> None:
    reading = Reading(lengths)
    kept = KeptSamples(Reading(lengths), room)
    for numbers in asked:
        chosen = tuple(number % len(lengths) for number in numbers)
        found, expected = kept(chosen), reading(chosen)
        assert torch.equal(found.args[0], expected.args[0])
        assert torch.equal(found.kwargs["ids"], expected.kwargs["ids"])
        assert float(found.kwargs["scale"]) == 2.0
        assert (found.mask is None) == (expected.mask is None)
        assert found.mask is None or expected.mask is None or torch.equal(found.mask, expected.mask)


@pytest.mark.parametrize(("room", "again"), [(0, [0, 1, 2, 0, 1, 2]), (36, [0, 1, 2, 1, 2]), (10**6, [0, 1, 2])])
def test_samples_are_read_once_while_there_is_room(room: int, again: list[int]) -> None:
    reading = Reading([2, 2, 2])
    kept = KeptSamples(reading, room)
    for _ in range(2):
        kept((0, 1, 2))
    # A sample has 2 x 4 + 2 x 8 + 4 = 28 bytes.
    assert reading.alone == again
