"""Values as text: digits kept, nothing invented, never two lines."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.text import (
    counted,
    duration,
    error_line,
    listed,
    number,
    one_line,
    shortened,
    size_text,
    told_apart,
    with_times,
)


@settings(deadline=None)
@given(st.floats(min_value=1e-300, max_value=1e300), st.integers(3, 6))
def test_number_keeps_its_digits(value: float, digits: int) -> None:
    assert float(number(value)) == pytest.approx(value, rel=6e-3)
    assert float(number(value, digits)) == pytest.approx(value, rel=6 * 10.0**-digits)


def test_number_of_nothing() -> None:
    assert [number(value) for value in (None, math.nan, math.inf)] == ["n/a"] * 3
    assert number(0.0) == "0"


def test_sizes() -> None:
    sizes = (0, 1023, 1024, 1536, 5 * 2**30, 3 * 2**40, math.nan)
    told = ["0 B", "1023 B", "1 KiB", "1.5 KiB", "5 GiB", "3 TiB", "n/a"]
    assert [size_text(value) for value in sizes] == told


def test_durations() -> None:
    seconds = (0, -3, 0.25, 9.94, 9.96, 89.4, 89.6, 158, 3600, 5400, 7500, 200_000, math.nan)
    told = [
        *("0 s", "0 s", "0.25 s", "9.9 s", "10 s", "89 s", "1 min", "3 min"),
        *("60 min", "1 h 30 min", "2 h 5 min", "2 d 7 h", "n/a"),
    ]
    assert [duration(value) for value in seconds] == told


def test_counts_agree_with_their_noun() -> None:
    assert [counted(*given) for given in ((0, "site"), (1, "process"), (2, "process"), (3, "batch"))] == [
        *("0 sites", "1 process", "2 processes", "3 batches"),
    ]


def test_times_are_read_in_utc() -> None:
    told = "from 2026-03-01T14:05:00Z to 2026-03-01T15:05:00.123456+00:00, not 2026-03-01T14:05:00+02:00"
    assert with_times(told) == "from 2026-03-01 14:05:00 UTC to 2026-03-01 15:05:00 UTC, not 2026-03-01T14:05:00+02:00"


@settings(deadline=None)
@given(st.text(max_size=90), st.integers(8, 60))
def test_shortened_keeps_both_ends(name: str, width: int) -> None:
    short = shortened(name, width)
    assert len(short) <= width
    head, cut, tail = short.partition("...") if len(name) > width else (name, "", "")
    assert name.startswith(head)
    assert name.endswith(tail)
    assert bool(cut) == (len(name) > width)


#: Names as models have them: blocks of one shape, numbered, some in two halves of the model.
_MODULES = st.builds(
    "{}.{}.{}.{}".format,
    st.sampled_from(["model", "model.encoder", "model.decoder", "bert.encoder", "vision_model.transformer.resblocks"]),
    st.sampled_from(["layers", "layer", "h"]),
    st.integers(0, 130),
    st.sampled_from(
        ["self_attn.q_proj", "encoder_attn.out_proj", "attention.output.dense", "mlp.experts.7.down_proj", "fc2"]
    ),
)


@settings(deadline=None)
@given(st.lists(_MODULES | st.text(max_size=70), max_size=40), st.integers(8, 60))
def test_names_that_differ_are_told_apart(names: list[str], width: int) -> None:
    short = told_apart(names, width)
    assert all(len(name) <= width for name in short)
    assert len(set(zip(names, short, strict=True))) == len(set(names)) == len(set(short))
    assert [s for n, s in zip(names, short, strict=True) if len(n) <= width] == [n for n in names if len(n) <= width]


@pytest.mark.parametrize(
    ("names", "width", "short"),
    [
        (
            ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"],
            20,
            ["...0.mlp.up_proj", "...0.mlp.down_proj"],
        ),
        (["encoder.layers.0.fc1", "decoder.layers.0.fc1"], 16, ["e.layers.0.fc1", "d.layers.0.fc1"]),
        (["left.0.head.norm", "last.0.head.norm"], 12, ["left....norm", "last....norm"]),
        (["a" * 20 + "b" + "c" * 20, "a" * 20 + "d" + "c" * 20], 10, ["aaaaaaaa~1", "aaaaaaaa~2"]),
    ],
)
def test_how_names_are_told_apart(names: list[str], width: int, short: list[str]) -> None:
    assert told_apart(names, width) == short


def test_names_need_room_to_be_told_apart() -> None:
    with pytest.raises(InputError, match="width"):
        told_apart(["a", "b"], 7)


def test_listed_counts_what_it_leaves_out() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(list("abcde"), 3) == "a, b, c and 2 more"


@settings(deadline=None)
@given(st.text(max_size=60), st.integers(4, 60))
def test_a_line_is_one_line(text: str, most: int) -> None:
    assert len(one_line(text).splitlines()) <= 1
    assert len(one_line(text, most)) <= most


def test_a_line_keeps_the_spaces_of_a_path() -> None:
    assert one_line(" a\n\n   b/my  models/c \n") == "a b/my  models/c"


def test_errors_of_others_begin_with_their_type() -> None:
    assert error_line(ValueError("first\n  second")) == "ValueError: first second"
    assert error_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert error_line(InputError("a", "is\nodd", "mend it")) == "a: is odd; mend it"
    assert error_line(AlphasmithError()) == "AlphasmithError"
    assert error_line(ValueError("x" * 100), 20) == "ValueError: xxxxx..."
