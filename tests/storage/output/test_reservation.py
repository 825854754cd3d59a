"""A place for a result is one process's at a time, and nobody's again when that process is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from alphasmith.objectives.errors import InputError
from alphasmith.storage.output.reservation import Reservation, abandoned_reservation, reservation_file
from alphasmith.storage.queue.leases import Identity
from tests.support.boards import LONG, elsewhere

_SERVER = "postgresql://user:***@host/db"


def reservation(out: Path, *, lease: float = LONG, storage: str = _SERVER, of: Identity | None = None) -> Reservation:
    return Reservation(out, storage=storage, lease=lease, identity=of)


def _silent(out: Path, seconds: float) -> None:
    """As if the holder had sent no heartbeat for so long."""
    then = reservation_file(out).stat().st_mtime - seconds
    os.utime(reservation_file(out), (then, then))


def test_it_is_one_processs_and_gone_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with reservation(out) as mine:
        mine.take()
        mine.take("r-1")  # now it is known for which run
        mine.check()
        with reservation(out) as other:
            with pytest.raises(InputError, match=r"reserved for run r-1, driven by process \d+ on ") as caught:
                other.take("r-2")
            assert (caught.value.field, "alphasmith worker r-1 --storage" in caught.value.remedy) == ("out", True)
        mine.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("run", "storage"), [("", _SERVER), ("r-1", "sqlite:///runs.db")], ids=["no run yet", "one process only"]
)
def test_nobody_is_told_to_join_where_nobody_can(tmp_path: Path, run: str, storage: str) -> None:
    with reservation(tmp_path / "out", storage=storage) as mine, reservation(tmp_path / "out") as other:
        mine.take(run)
        with pytest.raises(InputError, match="is reserved for") as caught:
            other.take()
        assert "worker" not in caught.value.remedy


def test_a_process_of_the_same_run_takes_it_over_once_it_drives(tmp_path: Path) -> None:
    file = reservation_file(tmp_path / "out")
    with reservation(tmp_path / "out", lease=100.0) as frozen:
        with reservation(tmp_path / "out") as next_:
            frozen.take("r-1")
            whole = file.read_bytes()
            next_.take("r-1")  # does not drive it yet: the database decides
            _silent(tmp_path / "out", 200.0)
            next_.take("r-1")
            assert file.read_bytes() == whole
            next_.take("r-1", driving=True)
            taken = file.read_bytes()
            assert taken != whole
            frozen.renew()
            assert file.read_bytes() == taken
        assert not file.exists()
        frozen.check()  # it drives after all, and nobody has the place
        assert file.read_bytes() == whole
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_is_frozen_or_elsewhere_loses_it_after_a_lease_and_does_not_come_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ExitStack() as stack:
        frozen = stack.enter_context(reservation(out, lease=100.0, of=elsewhere("frozen")))
        frozen.take("r-1")
        next_ = stack.enter_context(reservation(out))
        _silent(out, 90.0)
        with pytest.raises(InputError, match="driven by process 1 on elsewhere"):
            next_.take("r-2")
        frozen.renew()
        _silent(out, 90.0)
        with pytest.raises(InputError, match="driven by"):
            next_.take("r-2")
        _silent(out, 90.0)
        next_.take("r-2")
        before = reservation_file(out).read_bytes()
        frozen.renew()
        with pytest.raises(InputError, match="run r-2"):
            frozen.check()
        assert reservation_file(out).read_bytes() == before
        stack.pop_all().close()
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_holds_by_now_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with reservation(out) as next_:
        with reservation(out, lease=100.0, of=elsewhere("frozen")) as frozen:
            frozen.take("r-1")
            _silent(out, 200.0)
            next_.take("r-2")
        assert abandoned_reservation(out, "r-1") is None
        assert abandoned_reservation(out, "r-2") == reservation_file(out)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 10_000, b'{"holder": 1}', b"\xff"])
def test_a_file_that_says_nothing_reserves_nothing(tmp_path: Path, content: bytes) -> None:
    reservation_file(tmp_path / "out").write_bytes(content)
    with reservation(tmp_path / "out") as mine:
        mine.take("r-1")
        assert b"r-1" in reservation_file(tmp_path / "out").read_bytes()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from alphasmith.storage.output.reservation import Reservation\n"
        "with Reservation(Path(sys.argv[1]), storage='', lease=3600.0) as mine:\n"
        "    mine.take('r-1')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, str(out)], timeout=120, check=False)
    assert (done.returncode, reservation_file(out).exists()) == (-9, True)
    with reservation(out) as mine:
        mine.take("r-2")
    assert list(tmp_path.iterdir()) == []


def test_of_many_at_once_one_has_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    out.parent.mkdir()
    told: list[str] = []
    start = threading.Barrier(8)
    with ExitStack() as stack:
        all_ = [stack.enter_context(reservation(out)) for _ in range(8)]

        def work(one: Reservation) -> None:
            start.wait()
            try:
                one.take()
            except InputError as error:
                told.append(error.field)

        threads = [threading.Thread(target=work, args=(one,)) for one in all_]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert told == ["out"] * 7
    assert list(out.parent.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with reservation(tmp_path / "file" / "out") as mine, pytest.raises(InputError, match="not writable"):
        mine.take()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("x")
    reservation_file(tmp_path / "out").symlink_to(tmp_path / "theirs")
    with reservation(tmp_path / "out") as mine, pytest.raises(InputError, match="not writable"):
        mine.take()
    assert (tmp_path / "theirs").read_text() == "x"
