"""What tests of several rooms need."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.buckets import Bucket, environment


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Address of an S3 server that lives as long as the module."""
    pytest.importorskip("boto3", reason="boto3 is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, and the environment by which it is found."""
    import boto3

    environment(monkeypatch, s3)
    client = boto3.client("s3")
    name = f"bucket-{os.urandom(4).hex()}"
    client.create_bucket(Bucket=name)
    return Bucket(client, name)
