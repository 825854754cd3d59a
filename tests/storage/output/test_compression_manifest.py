"""The manifest of a compression: round trips, refuses contradictions, and has the schema that is committed."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.packed.packing import PackedModel, PackedSettings, model_bytes, pack
from alphasmith.storage.files.durable import canonical_json
from alphasmith.storage.output import compression_manifest as room
from alphasmith.storage.output.compression_manifest import (
    compression_schema,
    parse_compression_manifest,
    read_compression_manifest,
)
from alphasmith.storage.output.manifest import parse_manifest
from tests.support.compressed_folders import made_manifest
from tests.support.packed_models import made, mixed


@pytest.fixture(scope="module")
def packed() -> PackedModel:
    return pack(made(mixed(), (True, True, 2, "channel")), PackedSettings())


def test_what_is_written_is_what_is_read(packed: PackedModel, tmp_path: Path) -> None:
    manifest = made_manifest(packed, 10_000)
    text = manifest.to_json()
    assert parse_compression_manifest(text) == manifest
    (tmp_path / "manifest.json").write_text(text)
    assert read_compression_manifest(tmp_path) == manifest
    jsonschema.validate(json.loads(text), compression_schema())


def test_the_manifest_tells_what_became_of_every_layer_and_tensor(packed: PackedModel) -> None:
    manifest = made_manifest(packed, model_bytes(mixed()))
    layers = {layer.name: layer for layer in manifest.layers}
    assert (layers["mix"].form, layers["mix"].rank, layers["mix"].kept) == ("linear", 2, 0.9)
    assert layers["rnn.layers.0.ih"].kind == "recurrent"
    assert layers["inner"].form == "dense"
    assert all(tensor.reason or tensor.entries for layer in manifest.layers for tensor in layer.tensors)
    assert manifest.bytes.stored == packed.stored_bytes < manifest.bytes.original
    assert (manifest.folded, manifest.taken_apart) == (("norm",), ("rnn",))


def test_committed_schema_is_current() -> None:
    committed = Path(room.__file__).with_name("compression_manifest.schema.json").read_text(encoding="utf-8")
    current = canonical_json(compression_schema())
    assert committed == current, "write compression_schema() to storage/output/compression_manifest.schema.json"


def test_schema_refuses_what_is_unknown(packed: PackedModel) -> None:
    validator = jsonschema.Draft202012Validator(compression_schema())
    validator.check_schema(compression_schema())
    written = json.loads(made_manifest(packed, 10).to_json())
    assert validator.is_valid(written)
    for wrong in (written | {"schema_version": 2}, written | {"more": 1}, {**written, "bytes": {}}):
        assert not validator.is_valid(wrong)


def test_contradictions_are_refused(packed: PackedModel) -> None:
    manifest = made_manifest(packed, 10)
    with pytest.raises(ValidationError, match="the parts do not make 1 stored bytes"):
        made_manifest(packed, 10, bytes=manifest.bytes.model_dump() | {"stored": 1})
    with pytest.raises(ValidationError, match="a tensor occurs twice"):
        made_manifest(packed, 10, layers=manifest.layers * 2)
    with pytest.raises(ValidationError, match="the tensors take"):
        made_manifest(packed, 10, layers=manifest.layers[1:])
    text = made_manifest(packed, 10, config={"a": 987123654}).to_json()
    with pytest.raises(InputError, match="config is not finite"):
        parse_compression_manifest(text.replace("987123654", "1e999"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is not JSON"),
        ("[]", "is no manifest of a joint compression"),
        ('{"schema_version": 3}', "is no manifest of a joint compression"),
        ('{"kind": "compression"}', "has schema_version None, not 1"),
        ('{"kind": "compression", "schema_version": 1}', "run: Field required"),
        ("[" * 200_000, "nested too deep"),
    ],
)
def test_what_is_no_manifest_is_refused_in_one_line(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as raised:
        parse_compression_manifest(text)
    assert "\n" not in str(raised.value)


def test_readers_of_runs_name_the_right_reader(packed: PackedModel) -> None:
    with pytest.raises(
        InputError, match="is the manifest of a joint compression; read its folder with load_compressed"
    ):
        parse_manifest(made_manifest(packed, 10).to_json())
