"""A place for a result, reserved by one process while it works towards it, so that two that want the same learn it at the start."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from alphasmith.objectives.errors import InputError
from alphasmith.storage.files.durable import NO_SPACE
from alphasmith.storage.output._parents import ParentFolders
from alphasmith.storage.queue.leases import Heartbeat, Identity, is_gone, named
from alphasmith.storage.runs.compressions import is_compression_id
from alphasmith.storage.runs.trainings import is_training_id

if sys.platform != "win32":
    import fcntl

#: Seconds for which another process may look at a reservation; it takes milliseconds.
_PATIENCE = 10.0
#: Longest reservation that is read [bytes].
_LONGEST = 1 << 16
#: What file systems without locks answer; there, two processes that begin in the same millisecond are not told apart.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class ReservedError(InputError):
    """A process that lives has reserved the place."""


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """What a reservation says: whose it is, how long without a heartbeat it holds [s], and for which run in which database."""

    holder: str
    lease: float
    run: str = ""
    storage: str = ""


class Reservation:
    """The right to write ``out``, as a file beside it; used as a context, while which it is kept alive.

    It ends as leases do: with its process where that can be seen from here, else when no heartbeat was seen for a lease, by the
    clock of the file system. Processes of one run may follow each other; which of them drives it, the database says.

    Attributes:
        out: The place.

    Args:
        out: Absolute path of an output folder.
        storage: Address of the database that the holder's run is in, passwords masked.
        lease: Seconds after which a holder without a heartbeat counts as dead.
        identity: Of this process; None: found out.
    """

    def __init__(self, out: Path, *, storage: str, lease: float, identity: Identity | None = None) -> None:
        self.out = out
        self._file = reservation_file(out)
        self._storage = storage
        self._lease = lease
        self._identity = identity or Identity.here()
        self._heartbeat = Heartbeat(self)
        self._held = False
        self._run = ""
        self._parents = ParentFolders()

    @property
    def lease(self) -> float:
        """Seconds after which a holder without a heartbeat counts as dead."""
        return self._lease

    def take(self, run: str = "", *, driving: bool = False) -> None:
        """Reserve the place, or say for which run it is reserved.

        Args:
            run: The run; empty: not known yet.
            driving: Whether this process has the right to drive that run: then the reservation of another process of the same
                run passes to this one. Else it is left to it.

        Raises:
            ReservedError: Field ``out``: a process that lives has reserved it for another run.
            InputError: Field ``out``: the place is not writable.
        """
        with self._translated():
            self._parents.make(self.out.parent)
            with _locked(self._file) as descriptor:
                found = _read(descriptor)
                if found is not None and found.holder != self._identity.worker:
                    ours = bool(run) and found.run == run
                    if ours and not driving:
                        return  # even where that process seems dead: who drives the run, the database says
                    if not ours and self._lives(found):
                        raise ReservedError("out", self._whose(found), _remedy(found))
                claim = _Claim(holder=self._identity.worker, lease=self._lease, run=run, storage=self._storage)
                _write(descriptor, claim)
                self._held, self._run = True, run

    def hold(self, owner: str) -> None:
        """Reserve the place for what no two processes may work on: first against every other process, of the same owner too, then in its name.

        Args:
            owner: Id of a training or a compression.

        Raises:
            InputError: As :meth:`take`.
        """
        self.take()
        self.take(owner)

    def check(self) -> None:
        """Require, as the driver of the run, that the place is reserved for it; where nobody has it any more, it is taken again.

        Raises:
            InputError: Field ``out``: it passed to another run, since this process sent no heartbeat for longer than a lease.
        """
        self.take(self._run, driving=True)

    def renew(self, *, patience: float = 0.0) -> None:
        """Report that the holder lives. A reservation that another process took over is not taken back.

        Args:
            patience: Not used: nothing is waited for.
        """
        found = _claim_in(self._file) if self._held else None
        if found is not None and found.holder == self._identity.worker:
            with suppress(OSError):
                os.utime(self._file)

    def __enter__(self) -> Self:
        self._heartbeat.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heartbeat.__exit__(kind, error, trace)
        with suppress(OSError, InputError):
            if self._held:
                with _locked(self._file) as descriptor:
                    found = _read(descriptor)
                    if found is None or found.holder == self._identity.worker:
                        self._file.unlink()
        self._parents.remove()

    def _lives(self, claim: _Claim) -> bool:
        return _lives(claim, self._file, self._identity)

    def _whose(self, claim: _Claim) -> str:
        what = "training" if is_training_id(claim.run) else "compression" if is_compression_id(claim.run) else "run"
        of = f"{what} {claim.run}" if claim.run else "a run or training that is not on record yet"
        return f"{self.out} is reserved for {of}, driven by {named(claim.holder)}"

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._parents.remove()
            problem = "no space left beside it" if error.errno in NO_SPACE else f"is not writable ({error.strerror})"
            raise InputError("out", f"{self.out}: {problem}", "choose another folder") from error


def reservation_file(out: Path) -> Path:
    """The file that says who works towards ``out``."""
    return out.with_name(f".{out.name}.alphasmith-run")


def abandoned_reservation(out: Path, run_id: str) -> Path | None:
    """The reservation that a killed process of a run left; None where there is none of that run.

    Args:
        out: Where the result of the run goes.
        run_id: A run that nobody drives.
    """
    file = reservation_file(out)
    found = _claim_in(file)
    return file if found is not None and found.run == run_id else None


def holder(out: Path, owner: str) -> str | None:
    """The living process that works towards ``out``, as people call it; None: there is none. Changes nothing.

    Args:
        out: Absolute path of an output folder.
        owner: A run or training. A process that works towards ``out`` for another one does not count.
    """
    file = reservation_file(out)
    claim = _claim_in(file)
    if claim is None or claim.run not in ("", owner):
        return None
    try:
        return named(claim.holder) if _lives(claim, file, Identity.here()) else None
    except FileNotFoundError:
        return None  # it ended in this moment


def _lives(claim: _Claim, file: Path, here: Identity) -> bool:
    """Whether the process of a reservation is there, as far as is seen from here."""
    if is_gone(claim.holder, here):
        return False
    try:
        now = _present(file.parent)
    except PermissionError:  # where nothing can be written, this machine's clock has to do
        now = time.time()
    return now - file.stat().st_mtime <= claim.lease


def _remedy(claim: _Claim) -> str:
    wait = "wait until it has ended, or choose another folder"
    alone = claim.storage.startswith("sqlite") and not is_compression_id(claim.run)
    if not claim.run or is_training_id(claim.run) or alone:
        return wait
    return f"join it with: alphasmith worker {claim.run} --storage {claim.storage}, or {wait}"


def _present(folder: Path) -> float:
    """The time by the clock of the file system [s]."""
    with tempfile.TemporaryFile(dir=folder, prefix=".alphasmith-") as probe:
        return os.fstat(probe.fileno()).st_mtime


@contextmanager
def _locked(file: Path) -> Iterator[int]:
    """The file, made where it is not there, open and locked."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            locked = _lock(descriptor)
            if locked and _is_at(descriptor, file):
                yield descriptor
                return
        finally:
            os.close(descriptor)
        if time.monotonic() > deadline:
            raise InputError("out", f"another process holds {file}", "try again, or remove that file")
        if not locked:
            time.sleep(0.02)


def _lock(descriptor: int) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether the open file is still the one of that name: whoever held it before may have removed it."""
    try:
        there = file.lstat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _claim_in(file: Path) -> _Claim | None:
    """What a reservation says; None: there is none, or nothing that can be read."""
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> _Claim | None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        content = json.loads(os.read(descriptor, _LONGEST))
        return _Claim(
            holder=str(content["holder"]),
            lease=float(content["lease"]),
            run=str(content["run"]),
            storage=str(content["storage"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # killed between making the file and writing it


def _write(descriptor: int, claim: _Claim) -> None:
    content = json.dumps(
        {"holder": claim.holder, "lease": claim.lease, "run": claim.run, "storage": claim.storage}
    ).encode()
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, content)
    os.ftruncate(descriptor, len(content))
