"""Objects of a run in the artifact store and the rows that find them again: by name in the run, by key in any run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import delete, insert, select, update
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import Session
from torch import Tensor

from alphasmith.objectives.errors import IntegrityError
from alphasmith.storage.artifacts.store import ArtifactStore
from alphasmith.storage.database.connection import Database, DuplicateError
from alphasmith.storage.database.tables import DatabaseRow, StoredArtifactRow
from alphasmith.storage.queue.records import ArtifactKind, StoredArtifact


@dataclass(frozen=True, kw_only=True)
class ArtifactContent:
    """Tensors to be kept under a name.

    Attributes:
        name: Name within its kind.
        tensors: By name.
        key: What they were made from (a digest), by which other runs find them; empty: found by name only.
        metadata: Text kept with them.
    """

    name: str
    tensors: Mapping[str, Tensor]
    key: str = ""
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class ReadResult:
    """What was read, or why it could not be.

    Attributes:
        tensors: By name; None where the object is not recorded, gone or damaged.
        metadata: Text kept with them.
        reason: Why there are none; empty where there are.
    """

    tensors: dict[str, Tensor] | None
    metadata: Mapping[str, str]
    reason: str = ""


class RunArtifacts:
    """Keeps and finds the objects of one run. For use from many threads.

    An object is written first and its row after it, so a row never names an object that was not there. An object that vanished
    or was damaged later is no error: callers compute it again. A store that cannot be reached is an InputError.

    Args:
        database: Initialised.
        store: Where the objects are.
        run_id: The run.

    Attributes:
        store: As given.
    """

    def __init__(self, database: Database, store: ArtifactStore, run_id: str) -> None:
        self.store = store
        self._database = database
        self._run = run_id
        self._announced = False

    def put(
        self,
        kind: ArtifactKind,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        key: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> StoredArtifact:
        """Keep tensors; what this run kept under the same kind and name is replaced.

        Raises:
            InputError: Field ``artifacts``: no space left, or the store cannot be written.
            StorageError: The database lost the row, or there is no such run; the object is left to ``alphasmith db gc``.
        """
        return self.put_many(kind, [ArtifactContent(name=name, tensors=tensors, key=key, metadata=metadata)])[0]

    def put_many(self, kind: ArtifactKind, items: Iterable[ArtifactContent]) -> list[StoredArtifact]:
        """Keep several, with one transaction for their rows; ``items`` may be made one by one as they are asked for.

        Raises:
            InputError: Field ``artifacts``: no space left, or the store cannot be written.
            StorageError: The database lost the rows, or there is no such run.
        """
        if not self._announced:
            self.store.announce(place_of(self._database))
            self._announced = True
        kept = [self._object(kind, item) for item in items]
        created = datetime.now(UTC)

        def rows(session: Session) -> None:
            for artifact in kept:
                self._row(session, artifact, created)

        try:
            self._database.transact(rows)
        except DuplicateError:
            # Another process inserted the same name between our update and our insert; now the update finds it.
            self._database.transact(rows)
        return kept

    def get(self, kind: ArtifactKind, name: str) -> dict[str, Tensor] | None:
        """What this run kept under a kind and name; None where it is not there or damaged (``look`` tells why)."""
        return self.look(kind, name).tensors

    def look(self, kind: ArtifactKind, name: str) -> ReadResult:
        """As ``get``, with metadata and with the reason where there is nothing.

        Raises:
            InputError: Field ``artifacts``: the store cannot be reached.
            StorageError: The database was lost.
        """
        query = select(StoredArtifactRow).where(
            StoredArtifactRow.run_id == self._run, StoredArtifactRow.kind == kind, StoredArtifactRow.name == name
        )
        row = self._database.transact(lambda session: session.scalar(query))
        if row is None:
            return ReadResult(tensors=None, metadata={}, reason=f"run {self._run} kept no {kind} {name}")
        return self.read(_artifact(row))

    def find(self, kind: ArtifactKind, key: str) -> list[StoredArtifact]:
        """What any run in the database kept under a key, newest first; nothing for an empty key.

        Raises:
            StorageError: The database was lost.
        """
        if not key:
            return []
        newest = (StoredArtifactRow.created.desc(), StoredArtifactRow.id.desc())
        query = select(StoredArtifactRow).where(StoredArtifactRow.kind == kind, StoredArtifactRow.key == key)
        return self._database.transact(lambda s: [_artifact(row) for row in s.scalars(query.order_by(*newest))])

    def load(self, artifact: StoredArtifact) -> dict[str, Tensor] | None:
        """Tensors of an artifact that was found; None where they are gone or damaged (``read`` tells why)."""
        return self.read(artifact).tensors

    def read(self, artifact: StoredArtifact) -> ReadResult:
        """As ``load``, with metadata and with the reason where there is nothing.

        Raises:
            InputError: Field ``artifacts``: the store cannot be reached.
        """
        try:
            found = self.store.read(artifact.artifact_id, sha256=artifact.sha256)
        except IntegrityError as error:
            return ReadResult(tensors=None, metadata={}, reason=str(error))
        return ReadResult(tensors=found.tensors, metadata=found.metadata)

    def forget(self, kinds: Collection[ArtifactKind]) -> int:
        """Drop the rows of this run of some kinds; their objects go with ``alphasmith db gc``.

        Returns:
            How many there were.

        Raises:
            StorageError: The database was lost.
        """
        statement = delete(StoredArtifactRow).where(
            StoredArtifactRow.run_id == self._run, StoredArtifactRow.kind.in_(list(kinds))
        )
        return self._database.transact(lambda s: cast("CursorResult[Any]", s.execute(statement)).rowcount)

    def discard(self, kinds: Collection[ArtifactKind]) -> int:
        """As ``forget``, and remove the objects that no row of any run names any more, unless other databases use the store.

        Not for a store that other processes write to: one of them may be about to name an object that is there already.

        Returns:
            How many objects were removed.

        Raises:
            InputError: Field ``artifacts``: the store cannot be written.
            StorageError: The database was lost.
        """
        mine = select(StoredArtifactRow.artifact_id).where(
            StoredArtifactRow.run_id == self._run, StoredArtifactRow.kind.in_(list(kinds))
        )
        ids = set(self._database.transact(lambda session: session.scalars(mine).all()))
        self.forget(kinds)
        if self.store.others(place_of(self._database)):
            return 0
        named = select(StoredArtifactRow.artifact_id)
        strays = ids - set(self._database.transact(lambda session: session.scalars(named).all()))
        for artifact_id in strays:
            self.store.remove(artifact_id)
        return len(strays)

    def _object(self, kind: ArtifactKind, item: ArtifactContent) -> StoredArtifact:
        digest = self.store.put(item.tensors, item.metadata)
        return StoredArtifact(
            kind=kind, name=item.name, key=item.key, artifact_id=digest.path, sha256=digest.sha256, bytes=digest.bytes
        )

    def _row(self, session: Session, artifact: StoredArtifact, created: datetime) -> None:
        values = {
            "key": artifact.key,
            "artifact_id": artifact.artifact_id,
            "sha256": artifact.sha256,
            "bytes": artifact.bytes,
            "created": created,
        }
        identity = {"run_id": self._run, "kind": artifact.kind, "name": artifact.name}
        ours = [getattr(StoredArtifactRow, column) == value for column, value in identity.items()]
        changed = cast("CursorResult[Any]", session.execute(update(StoredArtifactRow).where(*ours).values(values)))
        if not changed.rowcount:
            session.execute(insert(StoredArtifactRow).values(**identity, **values))


def place_of(database: Database) -> str:
    """Which database this is, for all that reach it by the same address; without user, password and options.

    Its own id tells it from another one at the same address on another machine, its address from a copy of it.
    """
    url = database.engine.url
    own = database.transact(lambda session: session.scalars(select(DatabaseRow.id)).one())
    return f"{own} {database.backend}://{url.host or ''}:{url.port or ''}/{url.database}"


def _artifact(row: StoredArtifactRow) -> StoredArtifact:
    return StoredArtifact(
        kind=cast(ArtifactKind, row.kind),
        name=row.name,
        key=row.key,
        artifact_id=row.artifact_id,
        sha256=row.sha256,
        bytes=row.bytes,
    )
