"""Drawn samples: class by class, never in two parts, the same for a seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError
from alphasmith.search.training._draw import draw


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    fraction=st.floats(0.05, 0.5),
    held_out=st.floats(0.05, 0.5),
    seed=st.integers(0, 2**31),
)
def test_every_class_gets_its_share_of_both_parts(
    sizes: list[int], fraction: float, held_out: float, seed: int
) -> None:
    classes = [kind for kind, size in enumerate(sizes) for _ in range(size)]
    count = len(classes)
    try:
        drawn = draw(classes, count, fraction=fraction, held_out=held_out, seed=seed)
    except InputError:
        assert round(fraction * count) < 1 or min(round(held_out * count), count - round(fraction * count)) < 2
        return
    assert drawn == draw(classes, count, fraction=fraction, held_out=held_out, seed=seed)
    assert not set(drawn.trained) & set(drawn.held_out)
    assert len(drawn.trained) == round(fraction * count)
    assert list(drawn.trained) == sorted(drawn.trained)
    counts = Counter(classes[number] for number in (*drawn.trained, *drawn.held_out))
    share = (len(drawn.trained) + len(drawn.held_out)) / count
    # Largest remainder: a class is never more than one sample away from its exact share, nor from its share of the first part.
    for kind, size in enumerate(sizes):
        assert abs(counts[kind] - size * share) < 1
        own = sum(classes[number] == kind for number in drawn.trained)
        assert abs(own - counts[kind] * len(drawn.trained) / (len(drawn.trained) + len(drawn.held_out))) < 1
    first, second = drawn.halved(classes, seed)
    assert sorted((*first, *second)) == list(drawn.held_out)
    assert len(second) - len(first) in (0, 1)


def test_other_seeds_draw_other_samples() -> None:
    draws = {draw(None, 100, fraction=0.1, held_out=0.1, seed=seed).trained for seed in range(20)}
    # Two of 20 draws of 10 out of 100 are equal with a probability below 1e-10.
    assert len(draws) == 20


@pytest.mark.parametrize(
    ("count", "fraction", "held_out", "field"),
    [(10, 0.01, 0.5, "data.fraction"), (10, 0.5, 0.1, "data.held_out"), (0, 0.5, 0.5, "data.fraction")],
)
def test_too_few_samples_are_refused(count: int, fraction: float, held_out: float, field: str) -> None:
    with pytest.raises(InputError) as caught:
        draw(None, count, fraction=fraction, held_out=held_out, seed=0)
    assert caught.value.field == field
