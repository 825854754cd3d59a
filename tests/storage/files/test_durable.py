"""Canonical JSON and digests."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError, IntegrityError, NonFiniteError
from alphasmith.storage.files.durable import CHUNK, canonical_json, digest_file, is_no_space, verify_file

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON, indent=st.sampled_from([None, 2]))
def test_json_round_trip(value: Any, indent: int | None) -> None:
    text = canonical_json(value, indent=indent)
    assert json.loads(text) == value
    assert text.endswith("\n")
    assert canonical_json(json.loads(text), indent=indent) == text


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_order_of_keys_does_not_matter(value: dict[str, int]) -> None:
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, {"a": [-math.inf]}])
def test_non_finite_is_refused(bad: Any) -> None:
    with pytest.raises(NonFiniteError):
        canonical_json(bad)


@pytest.mark.parametrize("bad", [{1: 2}, [{"a": {None: 1}}], {"a": object()}, {1, 2}, b"x"])
def test_what_json_cannot_hold_is_refused(bad: Any) -> None:
    with pytest.raises(InputError):
        canonical_json(bad)


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1])
def test_digest(tmp_path: Path, size: int) -> None:
    content = b"\x07" * size
    path = tmp_path / "f"
    path.write_bytes(content)
    digest = digest_file(path, name="rel/f")
    assert (digest.path, digest.bytes, digest.sha256) == ("rel/f", size, hashlib.sha256(content).hexdigest())
    assert verify_file(path, digest.sha256.upper()).bytes == size
    path.write_bytes(content + b"x")
    with pytest.raises(IntegrityError, match="changed or damaged"):
        verify_file(path, digest.sha256)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        digest_file(tmp_path / "none")


def test_full_device_is_recognised_through_causes_and_foreign_messages() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = full
    assert is_no_space(full)
    assert is_no_space(wrapped)
    assert is_no_space(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not is_no_space(OSError(errno.EACCES, "Permission denied"))
    assert not is_no_space(RuntimeError("os error 2"))
    assert not is_no_space(RuntimeError("I/O error (os error 280)"))


def test_records_and_manifest_need_no_torch() -> None:
    code = (
        "import sys, alphasmith.storage.database.connection, alphasmith.storage.runs.run_store, alphasmith.storage.runs.data_frames, "
        "alphasmith.storage.output.manifest; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
