"""An S3 bucket, or part of one, behind Optuna's artifact interface; errors are one line and hold no credentials.

Address and credentials of the service come from where boto3 looks: ``AWS_*`` variables (``AWS_ENDPOINT_URL_S3`` for services
other than Amazon's), its configuration files, or the machine's role. botocore repeats what may pass (mode ``standard``).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from optuna.artifacts import Boto3ArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.extras import require_extra
from alphasmith.storage.artifacts.folder import StoredObject, check_id

if TYPE_CHECKING:
    from types import ModuleType

_MISSING = {"404", "NoSuchKey", "NotFound"}
_USER = re.compile(r"//[^/@\s]*@")
_SEEN = re.compile(r"(?P<key>.+)\?uploadId=(?P<upload>.+)", re.DOTALL)


class BucketBackend:
    """Objects under a prefix of a bucket. Implements ``optuna.artifacts``' interface. For use from many threads.

    Args:
        bucket: Name of the bucket.
        prefix: First part of the keys, without slashes at its ends; may be empty.

    Raises:
        InputError: boto3 is not installed, no credentials are found, or the bucket is missing, refused or unreachable.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self._address = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        boto3, config = _installed("boto3"), _installed("botocore.config")
        self._secrets: tuple[str, ...] = ()
        with self._told():
            session = boto3.session.Session()
            credentials = session.get_credentials()
            if credentials is not None:
                kept = credentials.get_frozen_credentials()
                self._secrets = tuple(filter(None, (kept.secret_key, kept.token, kept.access_key)))
            settings = config.Config(retries={"mode": "standard"}, connect_timeout=10, read_timeout=60)
            self._client = session.client("s3", config=settings)
            self._client.head_bucket(Bucket=bucket)
        # Without the copy in memory: what is written here may be closed by boto3.
        self._objects = Boto3ArtifactStore(bucket, client=self._client, avoid_buf_copy=True)

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Open an object for reading. Errors while it is read are botocore's; see ``download``.

        Raises:
            ArtifactNotFound: There is none of that id.
            InputError: The service refused or was not reached.
        """
        with self._told():
            return self._objects.open_reader(self._key(artifact_id))

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write an object, or put another in its place; it appears whole.

        Raises:
            InputError: The service refused or was not reached.
        """
        with self._told():
            self._objects.write(self._key(artifact_id), content_body)

    def remove(self, artifact_id: str) -> None:
        """Remove an object, if it is there.

        Raises:
            InputError: The service refused or was not reached.
        """
        with self._told():
            self._objects.remove(self._key(artifact_id))

    def download(self, artifact_id: str, into: BinaryIO) -> None:
        """Copy an object into an open file.

        Raises:
            ArtifactNotFound: There is none of that id.
            InputError: The service refused, was not reached or broke off.
        """
        with self._told():
            try:
                self._client.download_fileobj(self._bucket, self._key(artifact_id), into)
            except _errors("ClientError") as error:
                if _code(error) in _MISSING:
                    raise ArtifactNotFound(f"no artifact {artifact_id}") from error
                raise

    def size(self, artifact_id: str) -> int | None:
        """Size of an object [bytes]; None where there is none."""
        told = self._head(artifact_id)
        return None if told is None else told.bytes

    def modified(self, artifact_id: str) -> datetime | None:
        """When an object was written or asked for again; None where there is none."""
        told = self._head(artifact_id)
        return None if told is None else told.modified

    def touch(self, artifact_id: str) -> bool:
        """Mark an object as asked for just now. False where there is none, or where it is too large for that (5 GB)."""
        place = {"Bucket": self._bucket, "Key": self._key(artifact_id)}
        with self._told():
            try:
                self._client.copy_object(**place, CopySource=place, MetadataDirective="REPLACE")
            except _errors("ClientError") as error:
                if _code(error) in _MISSING or _code(error) == "InvalidRequest":
                    return False
                raise
            return True

    def listed(self) -> Iterator[StoredObject]:
        """Every object under the prefix."""
        with self._told():
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                for told in page.get("Contents", ()):
                    name = told["Key"].removeprefix(self._prefix)
                    if "/" not in name:
                        yield StoredObject(id=name, bytes=int(told["Size"]), modified=told["LastModified"])

    def unfinished(self) -> Iterator[StoredObject]:
        """Uploads in parts that were begun and not ended; the service does not tell their sizes."""
        with self._told():
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                for told in page.get("Uploads", ()):
                    name = f"{told['Key'].removeprefix(self._prefix)}?uploadId={told['UploadId']}"
                    yield StoredObject(id=name, bytes=0, modified=told["Initiated"])

    def discard(self, unfinished: StoredObject) -> None:
        """End such an upload."""
        found = _SEEN.fullmatch(unfinished.id)
        if found is None:
            raise InputError("artifacts", f"{unfinished.id!r} is not unfinished", "remove it by its id")
        key = self._prefix + found["key"]
        with self._told():
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=found["upload"])

    def _head(self, artifact_id: str) -> StoredObject | None:
        with self._told():
            try:
                told = self._client.head_object(Bucket=self._bucket, Key=self._key(artifact_id))
            except _errors("ClientError") as error:
                if _code(error) in _MISSING:
                    return None
                raise
            return StoredObject(id=artifact_id, bytes=int(told["ContentLength"]), modified=told["LastModified"])

    def _key(self, artifact_id: str) -> str:
        return self._prefix + check_id(artifact_id)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except _errors("BotoCoreError", "ClientError") + _upload_errors() as error:
            raise self._as_input_error(error) from error

    def _as_input_error(self, error: Exception) -> InputError:
        name, code = type(error).__name__, _code(error)
        if name in {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}:
            problem, remedy = "no credentials found", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role"
        elif code == "NoSuchBucket" or code in _MISSING:
            problem, remedy = "there is no such bucket", "make the bucket, or name another one"
        elif code in {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}:
            problem, remedy = f"access is refused ({code})", "check the credentials and what they may do in the bucket"
        else:
            problem, remedy = self._line(error), "check AWS_ENDPOINT_URL_S3, the network and the service"
        return InputError("artifacts", f"{self._address}: {problem}", remedy)

    def _line(self, error: Exception) -> str:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        for secret in self._secrets:
            line = line.replace(secret, "***")
        return _USER.sub("//***@", line)


def _installed(module: str) -> ModuleType:
    require_extra("artifacts", "s3")
    return importlib.import_module(module)


def _errors(*names: str) -> tuple[type[Exception], ...]:
    module = _installed("botocore.exceptions")
    return tuple(cast("type[Exception]", getattr(module, name)) for name in names)


def _upload_errors() -> tuple[type[Exception], ...]:
    return (cast("type[Exception]", _installed("boto3.exceptions").Boto3Error),)


def _code(error: Any) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
