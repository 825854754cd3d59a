"""Artifact stores, a folder and a bucket of a local S3 server: whole or not at all, checked at every read; kept by run."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.artifacts import download_artifact, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.storage.artifacts.folder import FolderBackend
from alphasmith.storage.artifacts.run_artifacts import ArtifactContent, RunArtifacts
from alphasmith.storage.artifacts.store import ArtifactStore, MissingArtifactError, default_address, is_ours
from alphasmith.storage.database.connection import Database, StorageError
from alphasmith.storage.runs.records import RunSpec
from alphasmith.storage.runs.run_store import RunStore
from tests.support.buckets import SECRET, Bucket, environment

TENSORS = {"x": torch.arange(12.0).reshape(3, 4), "n": torch.tensor([1, 2, 3])}
SPEC = RunSpec(
    name="kept",
    model_digest="",
    data_digest="",
    config={},
    scheme="w8a8",
    hardware={},
    scope="site",
    versions={},
    space_hash="",
)


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """An empty store of each kind."""
    if request.param == "folder":
        return ArtifactStore.open(str(tmp_path / "store"))
    bucket: Bucket = request.getfixturevalue("bucket")
    return ArtifactStore.open(f"s3://{bucket.name}/runs/")


def overwrite(store: ArtifactStore, artifact_id: str, change: Any) -> None:
    """Change an object behind the store's back."""
    if isinstance(store.backend, FolderBackend):
        path = store.backend.folder / artifact_id
        path.write_bytes(change(path.read_bytes()))
    else:
        bucket = Bucket(store.backend._client, store.backend._bucket)
        bucket.overwrite(artifact_id, change(bucket.data(artifact_id)))


def equal(found: dict[str, torch.Tensor] | None) -> bool:
    """Whether TENSORS came back."""
    return (
        found is not None
        and found.keys() == TENSORS.keys()
        and all(torch.equal(found[k], v) for k, v in TENSORS.items())
    )


# ----------------------------------------------------------------------------------------------------- both kinds


def test_what_is_put_comes_back_under_an_id_that_its_content_decides(store: ArtifactStore) -> None:
    digest = store.put(TENSORS, {"made": "here"})
    assert digest.path == f"{digest.sha256}.safetensors"
    assert is_ours(digest.path)
    assert store.put(dict(reversed(TENSORS.items())), {"made": "here"}) == digest
    assert store.put(TENSORS, {"made": "there"}).sha256 != digest.sha256
    found = store.read(digest.path, sha256=digest.sha256)
    assert equal(found.tensors)
    assert found.metadata == {"made": "here"}
    sizes = {item.id: item.bytes for item in store.listed()}
    assert sizes[digest.path] == digest.bytes
    assert len(sizes) == 2


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped"])
def test_a_damaged_object_is_refused_and_mended_by_putting_it_again(store: ArtifactStore, damage: str) -> None:
    digest = store.put(TENSORS)

    def change(data: bytes) -> bytes:
        return {"cut": data[:-1], "emptied": b"", "flipped": data[:-1] + bytes([data[-1] ^ 1])}[damage]

    overwrite(store, digest.path, change)
    with pytest.raises(IntegrityError, match="not what was recorded"):
        store.get(digest.path, sha256=digest.sha256)
    with pytest.raises(IntegrityError):
        store.check(digest.path, sha256=digest.sha256)
    assert store.put(TENSORS) == digest
    assert equal(store.get(digest.path, sha256=digest.sha256))


def test_a_digest_of_something_else_is_refused(store: ArtifactStore) -> None:
    digest = store.put(TENSORS)
    with pytest.raises(IntegrityError):
        store.get(digest.path, sha256="0" * 64)


def test_a_removed_object_is_missing_and_removed_again_in_peace(store: ArtifactStore) -> None:
    digest = store.put(TENSORS)
    store.check(digest.path)
    store.remove(digest.path)
    store.remove(digest.path)
    assert list(store.listed()) == []
    for read in (lambda: store.get(digest.path, sha256=digest.sha256), lambda: store.check(digest.path)):
        with pytest.raises(MissingArtifactError, match="is gone"):
            read()
    with pytest.raises(ArtifactNotFound):
        store.backend.open_reader(digest.path)


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/b", "", ".hidden", "a\nb", "..", "x" * 300])
def test_ids_that_leave_the_store_are_refused(store: ArtifactStore, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").write_text("mine")
    for use in (
        lambda: store.get(name, sha256="0" * 64),
        lambda: store.check(name),
        lambda: store.remove(name),
        lambda: store.backend.open_reader(name),
    ):
        with pytest.raises(InputError, match="not the id of an artifact"):
            use()
    assert (tmp_path / "out").read_text() == "mine"


def test_optuna_keeps_its_own_artifacts_in_the_same_store(store: ArtifactStore, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("hello")
    study = optuna.create_study()
    artifact_id = upload_artifact(artifact_store=store.backend, file_path=str(note), study_or_trial=study)
    download_artifact(artifact_store=store.backend, artifact_id=artifact_id, file_path=str(tmp_path / "again.txt"))
    assert (tmp_path / "again.txt").read_text() == "hello"
    assert not is_ours(artifact_id)


def test_putting_again_makes_an_object_young(store: ArtifactStore) -> None:
    digest = store.put(TENSORS)
    if isinstance(store.backend, FolderBackend):
        os.utime(store.backend.folder / digest.path, (1, 1))
    before = store.backend.modified(digest.path)
    assert before is not None
    deadline = time.monotonic() + 30
    while datetime.now(UTC) - before < timedelta(seconds=1.1):  # a bucket knows whole seconds
        assert time.monotonic() < deadline
        time.sleep(0.1)
    store.put(TENSORS)
    after = store.backend.modified(digest.path)
    assert after is not None
    assert after > before


# --------------------------------------------------------------------------------------------------------- folder


def test_a_full_device_leaves_nothing(tmp_path: Path) -> None:
    """Files may not grow for a moment: the system's answer is a real one."""
    store = ArtifactStore.open(str(tmp_path / "s"))
    small = store.put(TENSORS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match="no space left") as caught:
            store.put({"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.field == "artifacts"
    assert [path.name for path in (tmp_path / "s").iterdir()] == [small.path]


def test_a_killed_writer_leaves_a_temporary_that_no_reader_sees(tmp_path: Path) -> None:
    store = ArtifactStore.open(str(tmp_path))
    assert isinstance(store.backend, FolderBackend)
    with store.backend.drafted() as draft:
        shutil.copy(__file__, draft)
        os.link(draft, tmp_path / ".0123.partial")  # what a process that was killed here would leave
    assert [item.id for item in store.unfinished()] == [".0123.partial"]
    assert list(store.listed()) == []
    for item in store.unfinished():
        store.backend.discard(item)
    assert list(tmp_path.iterdir()) == []


def test_many_writers_of_the_same_content_and_readers_meet_whole_objects(tmp_path: Path) -> None:
    digest = ArtifactStore.open(str(tmp_path)).put(TENSORS)

    def work(_: int) -> bool:
        store = ArtifactStore.open(str(tmp_path))
        return store.put(TENSORS) == digest and equal(store.get(digest.path, sha256=digest.sha256))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(80)))
    assert [path.name for path in tmp_path.iterdir()] == [digest.path]


def test_tensors_live_on_when_their_object_is_cut_or_removed(tmp_path: Path) -> None:
    store = ArtifactStore.open(str(tmp_path))
    digest = store.put(TENSORS)
    found = store.get(digest.path, sha256=digest.sha256)
    overwrite(store, digest.path, lambda data: b"")
    store.remove(digest.path)
    assert equal(found)


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ArtifactStore.open("here").address == str(tmp_path / "here")
    assert ArtifactStore.open(f"file://{tmp_path}/a%20b").address == f"{tmp_path}/a b"
    assert default_address("sqlite:///x/runs.db") == f"{tmp_path}/x/runs.db.artifacts"
    assert default_address(f"postgresql://me:{SECRET}@host/runs") == str(tmp_path / "alphasmith-artifacts")
    (tmp_path / "file").touch()
    for wrong in ("file", "", "gs://bucket", "s3://", "file://host/x", f"s3://key:{SECRET}@bucket/x", "s3://b/x?y=z"):
        with pytest.raises(InputError) as caught:
            ArtifactStore.open(wrong)
        assert caught.value.field == "artifacts"
        assert SECRET not in str(caught.value)
    assert not (tmp_path / "here").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"artifacts: .*file/below cannot be"):
        ArtifactStore.open(str(tmp_path / "file" / "below")).put(TENSORS)


# --------------------------------------------------------------------------------------------------------- bucket


def closed_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_what_a_bucket_refuses_is_one_line_without_credentials(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no such bucket"):
        ArtifactStore.open("s3://bucket-that-is-not/x")
    store = ArtifactStore.open(f"s3://{bucket.name}")
    digest = store.put(TENSORS)
    assert bucket.client.head_object(Bucket=bucket.name, Key=digest.path)["ContentLength"] == digest.bytes
    bucket.client.delete_object(Bucket=bucket.name, Key=digest.path)
    bucket.client.delete_bucket(Bucket=bucket.name)
    with pytest.raises(InputError, match=r"^artifacts: s3://bucket-[0-9a-f]+: there is no such bucket"):
        store.put(TENSORS)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    environment(monkeypatch, f"http://user:{SECRET}@127.0.0.1:{closed_port()}")
    with pytest.raises(InputError) as caught:
        ArtifactStore.open(f"s3://{bucket.name}")
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "connect" in str(caught.value).lower()


def test_without_credentials_the_remedy_is_told(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(InputError, match="no credentials found; set AWS_ACCESS_KEY_ID"):
        ArtifactStore.open(f"s3://{bucket.name}/x")


def test_without_boto3_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(InputError, match=re.escape("boto3 is not installed; pip install 'alphasmith[s3]'")):
        ArtifactStore.open("s3://bucket/prefix")
    assert ArtifactStore.open(str(tmp_path)).put(TENSORS).bytes


def test_an_upload_in_parts_that_was_never_ended_is_found(bucket: Bucket) -> None:
    store = ArtifactStore.open(f"s3://{bucket.name}/runs")
    bucket.client.create_multipart_upload(Bucket=bucket.name, Key=f"runs/{'0' * 64}.safetensors")
    (found,) = store.unfinished()
    store.backend.discard(found)
    assert list(store.unfinished()) == []


# ----------------------------------------------------------------------------------------------------------- kept


def kept_by(database: Database, folder: Path, name: str = "") -> tuple[RunArtifacts, str]:
    """What a new run keeps."""
    run = RunStore(database).create(replace(SPEC, name=name, artifacts=str(folder))).id
    return RunArtifacts(database, ArtifactStore.open(str(folder)), run), run


def test_kept_is_found_by_name_and_replaced(database: Database, tmp_path: Path) -> None:
    kept, run = kept_by(database, tmp_path)
    assert kept.get("calibration", "fc1") is None
    assert "kept no calibration fc1" in kept.look("calibration", "fc1").reason
    kept.put("calibration", "fc1", {"x": torch.zeros(3)})
    kept.put("calibration", "Fc1", {"x": torch.ones(3)})
    kept.put("calibration", "fc1", TENSORS, metadata={"rows": "3"})
    assert equal(kept.get("calibration", "fc1"))
    assert kept.look("calibration", "fc1").metadata == {"rows": "3"}
    assert kept.get("weights", "fc1") is None
    many = kept.put_many(
        "weights", [ArtifactContent(name=f"w{i}", tensors={"x": torch.full((2,), i)}) for i in range(3)]
    )
    assert [item.name for item in many] == ["w0", "w1", "w2"]
    assert kept.forget(["calibration"]) == 2
    assert kept.get("calibration", "fc1") is None
    assert kept.get("weights", "w2") is not None
    assert kept.forget(["weights", "calibration"]) == 3
    RunStore(database).delete(run)


def test_another_run_finds_by_key_the_newest_first(database: Database, tmp_path: Path) -> None:
    key = os.urandom(8).hex()
    first, _ = kept_by(database, tmp_path)
    second, _ = kept_by(database, tmp_path)
    first.put("calibration", "a", {"x": torch.zeros(3)}, key=key)
    second.put("calibration", "b", TENSORS, key=key)
    second.put("weights", "b", TENSORS, key=key)
    second.put("calibration", "c", TENSORS)
    third, _ = kept_by(database, tmp_path)
    assert [item.name for item in third.find("calibration", key)] == ["b", "a"]
    assert equal(third.load(third.find("calibration", key)[0]))
    assert third.find("calibration", "") == []


def test_a_vanished_or_damaged_object_is_nothing_with_a_reason(database: Database, tmp_path: Path) -> None:
    kept, _ = kept_by(database, tmp_path)
    artifact = kept.put("result", "fc1", TENSORS)
    overwrite(kept.store, artifact.artifact_id, lambda data: data[:40])
    assert kept.load(artifact) is None
    assert "not what was recorded" in kept.read(artifact).reason
    kept.store.remove(artifact.artifact_id)
    assert kept.get("result", "fc1") is None
    assert "is gone" in kept.look("result", "fc1").reason


def test_a_row_without_its_run_is_refused(database: Database, tmp_path: Path) -> None:
    kept = RunArtifacts(database, ArtifactStore.open(str(tmp_path)), "r-20260101-000000")
    with pytest.raises(StorageError):
        kept.put("result", "fc1", TENSORS)


def test_processes_that_keep_the_same_name_at_once_leave_one_row(database: Database, tmp_path: Path) -> None:
    kept, run = kept_by(database, tmp_path)

    def work(value: int) -> None:
        other = RunArtifacts(database, ArtifactStore.open(str(tmp_path)), run)
        other.put("result", "x", {"v": torch.full((2,), value)})

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(12)))
    assert kept.get("result", "x") is not None
    assert kept.forget(["result"]) == 1
