"""A bucket on an S3 server of this machine, and the environment in which a user reaches it."""

from __future__ import annotations

import os
from typing import Any

import pytest

SECRET = "hunter2-very-secret"


class Bucket:
    """A bucket on an S3 server of this machine."""

    def __init__(self, client: Any, name: str) -> None:
        self.client = client
        self.name = name

    def overwrite(self, artifact_id: str, data: bytes) -> None:
        """Put other bytes under a key."""
        self.client.put_object(Bucket=self.name, Key=f"runs/{artifact_id}", Body=data)

    def data(self, artifact_id: str) -> bytes:
        """Bytes under a key."""
        return bytes(self.client.get_object(Bucket=self.name, Key=f"runs/{artifact_id}")["Body"].read())


def environment(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """What a user sets to reach a service."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
