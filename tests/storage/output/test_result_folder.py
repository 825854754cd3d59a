"""JSON of a result is read within bounds: what is too deep, too large or no object is a damaged result, in one line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from alphasmith.objectives.errors import IntegrityError
from alphasmith.storage.files.durable import ArtifactDigest
from alphasmith.storage.output import _named_files
from alphasmith.storage.output.result_folder import ResultFolder
from tests.storage.output.test_manifest import make


def holding(folder: Path, content: str) -> ResultFolder:
    """A result whose one file has this content, with its digest."""
    (folder / "a.json").write_text(content)
    digest = hashlib.sha256(content.encode()).hexdigest()
    manifest = make().with_artifacts([ArtifactDigest(path="a.json", sha256=digest, bytes=len(content))])
    (folder / "manifest.json").write_text(manifest.to_json())
    return ResultFolder(folder)


def test_an_object_is_read(tmp_path: Path) -> None:
    assert holding(tmp_path, '{"a": [1]}').read_json("a.json") == {"a": [1]}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested"),
        ('{"a": ' + "[" * 200_000, "nested|not JSON"),
        ('{"a": ', "not JSON"),
        ("[1]", "holds no JSON object"),
        ('{"a": "\\ud800"}', "readable JSON"),
        ('{"a": "' + "x" * 4000 + '"}', "has more than 1000 bytes"),
    ],
)
def test_damage_is_told_in_one_line(
    content: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = holding(tmp_path, content)
    if "more than" in problem:
        monkeypatch.setattr(_named_files, "MOST_BYTES", 1000)
    with pytest.raises(IntegrityError, match=problem) as raised:
        folder.read_json("a.json")
    assert "\n" not in str(raised.value)
