"""Paths, files and JSON of strangers: refused in one line, never waited for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.reading import (
    MOST_LEVELS,
    is_regular,
    is_text,
    parse_json,
    path_problem,
    read_object,
    read_text,
    refusing,
    usable_path,
    value_problem,
)
from alphasmith.objectives.text import one_line, visible


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def parsed(text: str) -> Any:
    return parse_json(text, field="FIELD", what="it", remedy="repair it")


@pytest.mark.parametrize("levels", [MOST_LEVELS + 1, 500, 5_000, 200_000])
def test_json_has_a_depth(levels: int) -> None:
    assert parsed(nested(MOST_LEVELS))
    with pytest.raises(InputError, match=r"FIELD: it is nested too deep.*; repair it"):
        parsed(nested(levels))
    with pytest.raises(InputError, match="nested too deep"):
        parsed('{"a": ' * levels + "1" + "}" * levels)


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, "1" * 5000, '"\\ud800"', '{"\\udfff": 1}', "\x00", "nul"])
def test_what_is_no_json_is_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed(text)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(_VALUES)
def test_json_comes_back(value: Any) -> None:
    assert parsed(json.dumps(value)) == value
    assert value_problem(value) == ""


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path)


def bytes_only(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")


@pytest.mark.parametrize("make", [fifo, device, folder, loop, bytes_only, lambda path: None])
def test_only_plain_files_are_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "it"
    make(path)
    with pytest.raises(InputError, match=rf"FIELD: .*{re.escape(str(path))}"):
        read_text(path, field="FIELD", remedy="give a file")
    assert is_regular(path) == (make is bytes_only)


def test_a_file_has_a_size(tmp_path: Path) -> None:
    (tmp_path / "it").write_text("{}" + " " * 99)
    with pytest.raises(InputError, match="more than 50 bytes"):
        read_text(tmp_path / "it", field="FIELD", remedy="cut it", most=50)
    assert read_object(tmp_path / "it", field="FIELD") == {}
    (tmp_path / "it").write_text("[1]")
    with pytest.raises(InputError, match="holds no JSON object"):
        read_object(tmp_path / "it", field="FIELD")


@pytest.mark.parametrize(
    "path", ["~nobodyatall/x", "a\0b", "x" * 256, "/".join("y" * 200 for _ in range(30)), "loop", "loop/x", "\udc80"]
)
def test_a_path_that_nothing_can_have(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"^FIELD: "):
        usable_path("FIELD", path)


def test_a_path_that_is_not_there_is_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("new", "file/below", "deep/down/here"):
        assert usable_path("FIELD", tmp_path / name) == tmp_path / name


@given(st.text())
def test_every_text_is_a_path_or_has_a_problem(text: str) -> None:
    problem = path_problem(text)
    try:
        os.stat(os.path.expanduser(text))
    except (ValueError, UnicodeError):
        assert problem
    except OSError:
        pass


@given(st.text(alphabet=st.characters()) | st.text(alphabet=st.characters(categories=["Cs", "Cc", "Cf", "Zl"])))
def test_what_is_shown_steers_no_terminal(text: str) -> None:
    shown = visible(text)
    assert is_text(shown)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029]", shown)
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", one_line(text))


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), KeyError("x"), RecursionError(), MemoryError("big")])
def test_what_a_library_raises_is_one_line(error: Exception) -> None:
    with (
        pytest.raises(InputError, match=f"FIELD: it broke \\({type(error).__name__}"),
        refusing("FIELD", "it broke", "mend it"),
    ):
        raise error


def test_our_own_errors_and_interrupts_pass() -> None:
    for error in (IntegrityError("damaged"), KeyboardInterrupt()):
        with pytest.raises(type(error)), refusing("FIELD", "it broke", "mend it"):
            raise error
