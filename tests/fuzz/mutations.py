"""Values and bytes that nobody expects, drawn by Hypothesis."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DataObject

_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.0, 0.5, 1e-308, 1e308,
    float("inf"), float("-inf"), float("nan"), "", " ", "x", "0", "-1", "big", "auto", "\x00", "a\nb", "\x1b[2J", "\u202e", "\ud800",
    "~nobodyatall/x", "../../etc/passwd", "/dev/zero", "/", "http://localhost/x", "module:function", "os:system", "x" * 300,
    [], [[]], {}, [None], [0], [1, 2], [1, 2, 3, 4, 5], ["x"], {"a": 1}, {"": None}, {"shortest_edge": 0}, {"height": -1, "width": 0},
]  # fmt: skip
_ODD.append(json.loads("[" * 60 + "]" * 60))
_ODD.append(json.loads("[" * 200 + "]" * 200))

#: A value that stands where another one is expected.
odd_values = st.sampled_from(_ODD) | st.integers(-5, 5) | st.integers() | st.floats() | st.text(max_size=8)


def spoilt_value(data: DataObject, value: Any, depth: int = 0) -> Any:
    """A copy of nested plain values with one of them replaced, doubled, renamed or gone."""
    inside = isinstance(value, (dict, list)) and len(value) > 0
    if not inside or (depth > 0 and data.draw(st.integers(0, 5)) == 0):
        return data.draw(odd_values)
    keys: list[Any] = sorted(value, key=str) if isinstance(value, dict) else list(range(len(value)))
    key = keys[data.draw(st.integers(0, len(keys) - 1))]
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    match data.draw(st.integers(0, 9)):
        case 0:
            del changed[key]
        case 1 if isinstance(changed, dict):
            changed[data.draw(st.text(max_size=5) | st.sampled_from([str(k) for k in keys]))] = data.draw(odd_values)
        case 2 if isinstance(changed, list):
            changed.insert(key, data.draw(odd_values))
        case _:
            changed[key] = spoilt_value(data, value[key], depth + 1)
    return changed


def spoilt_bytes(data: DataObject, content: bytes) -> bytes:
    """A copy with a few bytes changed, put in, doubled or gone, or only a part of it."""
    spoilt = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(spoilt) - 1, 0)))
        # Heads decide most: half of the changes are near the beginning.
        if data.draw(st.booleans()):
            at = min(at, data.draw(st.integers(0, 64)))
        match data.draw(st.integers(0, 5)):
            case 0 | 1:
                spoilt[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
            case 2:
                number = data.draw(st.sampled_from([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1]))
                spoilt[at : at + 4] = number.to_bytes(4, data.draw(st.sampled_from(["little", "big"])))
            case 3:
                spoilt[at:at] = data.draw(st.binary(max_size=8))
            case 4:
                del spoilt[at : at + data.draw(st.integers(1, 64))]
            case 5:
                del spoilt[at:]
    return bytes(spoilt)


def spoilt_json(data: DataObject, content: bytes) -> bytes:
    """JSON of which a value or, now and then, the text is spoilt."""
    if data.draw(st.integers(0, 4)) == 0:
        return spoilt_bytes(data, content)
    value = json.loads(content)
    for _ in range(data.draw(st.integers(1, 3))):
        value = spoilt_value(data, value)
    return json.dumps(value).encode()
