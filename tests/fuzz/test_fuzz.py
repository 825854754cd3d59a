"""A few examples of every target; ``python -m tests.fuzz --minutes 60`` tries as many as it has time for."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, seed
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from tests.fuzz.hunt import hunt, settled
from tests.fuzz.mutations import spoilt_bytes, spoilt_value
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_our_errors_escapes(name: str) -> None:
    tried = []

    @seed(0)
    @settled(12)
    @given(st.data())
    def case(data: DataObject) -> None:
        tried.append(name)
        TARGETS[name](data)

    case()
    assert len(tried) >= 12


@given(st.data())
def test_what_is_spoilt_differs_or_is_as_it_was_and_the_original_stays(data: DataObject) -> None:
    value = {"a": [1, {"b": 2}], "c": "d"}
    spoilt_value(data, value)
    assert value == {"a": [1, {"b": 2}], "c": "d"}
    content = json.dumps(value).encode()
    assert isinstance(spoilt_bytes(data, content), bytes)


def test_a_hunt_says_what_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)

    def target(data: DataObject) -> None:
        if data.draw(st.integers(0, 3)) == 3:
            raise ZeroDivisionError("found")

    assert hunt("target", target, seconds=0.1, seed=1) == 1
    out, err = capsys.readouterr()
    assert "escapes" in out
    assert "ZeroDivisionError: found" in err
    assert hunt("target", lambda data: None, seconds=0.1, seed=1) == 0
