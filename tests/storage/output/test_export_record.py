"""``export.json``: its schema is committed, and what is not one is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

import alphasmith.storage.output.export_record as room
from alphasmith.objectives.errors import InputError
from alphasmith.storage.files.durable import canonical_json
from alphasmith.storage.output.export_record import (
    EXPORT_FILE,
    ExportedOperator,
    ExportRecord,
    export_schema,
    read_export_record,
)

RECORD = ExportRecord(
    format="compressed-tensors",
    run="r-20260131-1f9c3a",
    manifest="0" * 64,
    scheme="w8a8-channel-static",
    versions={"torch": "2.13.0"},
    operators=(ExportedOperator(name="a.b", scheme="w8a8-channel-static", digest="1" * 64),),
)


def test_committed_schema_is_current_and_holds() -> None:
    committed = Path(room.__file__).with_name("export_record.schema.json").read_text(encoding="utf-8")
    assert committed == canonical_json(export_schema()), (
        "write export_schema() to storage/output/export_record.schema.json"
    )
    jsonschema.validate(json.loads(RECORD.to_json()), export_schema())


def test_a_record_comes_back(tmp_path: Path) -> None:
    (tmp_path / EXPORT_FILE).write_text(RECORD.to_json())
    assert read_export_record(tmp_path) == RECORD


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "nothing", RECORD.to_json().replace("compressed-tensors", "other"), "{" * 5000]
)
def test_what_is_no_record_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / EXPORT_FILE).write_text(text)
    with pytest.raises(InputError) as caught:
        read_export_record(tmp_path)
    assert "\n" not in str(caught.value)
    assert "export the run again" in str(caught.value)


def test_a_folder_without_one_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no export"):
        read_export_record(tmp_path)
