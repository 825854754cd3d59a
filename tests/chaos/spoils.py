"""What a process does to itself, armed before its command runs: no hook in the product, a real process, a real signal.

A spoil wraps a function of the product by name, in this process only. It is how a process dies *between* two commits or in the
middle of the final rename, moments that no signal from outside can be aimed at.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import pkgutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tests.chaos.subject import FUNCTIONS, MARK

#: The target that stands for every COMMIT of this process, Optuna's included.
COMMIT = "commit"

Kind = Literal["signal", "pace", "candidates", "count"]
How = Literal["raise", "nan", "memory", "memory once"]


@dataclass(frozen=True, kw_only=True)
class Spoil:
    """One thing a process does to itself.

    Attributes:
        kind: ``signal``: it sends itself a signal at a call. ``pace``: searches are slowed down, so that processes meet.
            ``candidates``: a candidate of a site search is bad. ``count``: nothing; its commits are counted and
            appended to the file ``at`` when it ends.
        at: ``signal``: dotted name ``module:function`` or ``module:Class.method``, or ``commit``.
        call: The call at which it happens, from 1; ``candidates``: the batch whose last candidate is bad from then on.
        after: The signal is sent once the call has returned.
        number: The signal.
        seconds: ``pace``: what every batch of candidates takes longer.
        how: ``candidates``: it raises, its scales are NaN, or there is no memory for it (once, or whenever it is tried).
    """

    kind: Kind
    at: str = ""
    call: int = 1
    after: bool = False
    number: int = int(signal.SIGKILL)
    seconds: float = 0.0
    how: How = "raise"


_PERFORM = "tests.chaos.spoils:perform"
_SPOILS = "CHAOS_SPOILS"


def arm(spoils: Iterable[Spoil]) -> None:
    """Make this process do these things, and the worker processes it starts what concerns searches."""
    for spoil in spoils:
        match spoil.kind:
            case "signal":
                _arm_signal(spoil)
            case "count":
                _count(spoil.at)
            case "pace":
                _before_scoring(_Slow(spoil))
            case "candidates":
                _before_scoring(_Bad(spoil))
    searching = [spoil for spoil in spoils if spoil.kind in ("pace", "candidates")]
    if searching:
        _pass_on(searching)


def _pass_on(spoils: list[Spoil]) -> None:
    """Worker processes are started anew, so they are told by the environment, and perform through :func:`perform`."""
    from alphasmith.search.engines.local.processes import Processes

    os.environ[_SPOILS] = json.dumps([asdict(spoil) for spoil in spoils])
    defaults: Any = Processes.__init__
    defaults.__kwdefaults__["perform"] = _PERFORM


def perform(*arguments: Any, **keywords: Any) -> Any:
    """What a worker process calls: the spoils of its driver, then the product's own function."""
    from alphasmith.search.engines.perform import perform as real

    if told := os.environ.pop(_SPOILS, ""):
        for spoil in (Spoil(**values) for values in json.loads(told)):
            _before_scoring(_Bad(spoil) if spoil.kind == "candidates" else _Slow(spoil))
    return real(*arguments, **keywords)


class _Counter:
    """Counts calls from any thread."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._count = 0

    def next(self) -> int:
        with self._mutex:
            self._count += 1
            return self._count


class _Slow:
    """Takes its time before every batch of candidates."""

    def __init__(self, spoil: Spoil) -> None:
        self._seconds = spoil.seconds

    def __call__(self, call: int, scorer: Any, candidates: Sequence[Any]) -> None:
        time.sleep(self._seconds)


class _Bad:
    """Spoils one candidate, whenever and with whomever it is scored."""

    def __init__(self, spoil: Spoil) -> None:
        self._spoil = spoil
        self._bad: Any = None

    def __call__(self, call: int, scorer: Any, candidates: Sequence[Any]) -> None:
        how = self._spoil.how
        if call == self._spoil.call:
            Path(f"{MARK}{os.getpid()}").touch()
            if how == "memory once":
                raise MemoryError("no memory, this once")
            self._bad = candidates[-1]
            if how == "nan":
                self._without_numbers(scorer)
        if how != "nan" and self._bad is not None and self._bad in candidates:
            raise ValueError("this candidate fails") if how == "raise" else MemoryError("this candidate is too large")

    def _without_numbers(self, scorer: Any) -> None:
        real, bad = scorer._smoothing, self._bad

        def smoothing(candidate: Any) -> Any:
            made = real(candidate)
            return replace(made, scales=made.scales * math.nan) if candidate == bad else made

        scorer._smoothing = smoothing


def _arm_signal(spoil: Spoil) -> None:
    counter = _Counter()

    def die() -> None:
        os.kill(os.getpid(), spoil.number)

    if spoil.at == COMMIT:
        _at_commits(spoil, counter, die)
        return
    module, _, name = spoil.at.partition(":")
    holder = pkgutil.resolve_name(f"{module}:{name.rpartition('.')[0]}" if "." in name else module)
    attribute = name.rpartition(".")[2]
    real: Callable[..., Any] = getattr(holder, attribute)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        mine = counter.next() == spoil.call
        if mine and not spoil.after:
            die()
        answer = real(*arguments, **keywords)
        if mine and spoil.after:
            die()
        return answer

    setattr(holder, attribute, wrapped)


def _at_commits(spoil: Spoil, counter: _Counter, die: Callable[[], None]) -> None:
    from sqlalchemy import Engine, event
    from sqlalchemy.engine.default import DefaultDialect

    if not spoil.after:

        def committing(_connection: Any) -> None:
            if counter.next() == spoil.call:
                die()

        event.listen(Engine, "commit", committing)
        return
    real: Any = DefaultDialect.do_commit

    def do_commit(self: DefaultDialect, dbapi_connection: Any) -> None:
        real(self, dbapi_connection)
        if counter.next() == spoil.call:
            die()

    DefaultDialect.do_commit = do_commit  # type: ignore[method-assign]


def _count(file: str) -> None:
    from sqlalchemy import Engine, event

    counter = _Counter()
    event.listen(Engine, "commit", lambda connection: counter.next())
    atexit.register(lambda: Path(file).write_text(str(counter.next() - 1)))


def _before_scoring(act: Callable[[int, Any, Sequence[Any]], None]) -> None:
    """Call ``act`` with the number of the batch, its scorer and its candidates before every batch is scored."""
    from alphasmith.search.site._scorer import SiteScorer

    counter = _Counter()
    real = SiteScorer._score

    def score(self: SiteScorer, candidates: Sequence[Any], *arguments: Any, **keywords: Any) -> Any:
        act(counter.next(), self, candidates)
        return real(self, candidates, *arguments, **keywords)

    SiteScorer._score = score  # type: ignore[method-assign]


def open_empty(url: str) -> None:
    """Make or open the tables of a database, as every command does that writes."""
    from alphasmith.storage.database.connection import initialise, open_database, optuna_storage

    database = open_database(url)
    initialise(database)
    optuna_storage(database)
    database.close()


def tell_time() -> None:
    """Print the wall clock of this process [s]."""
    print(time.time(), flush=True)


def product_view(url: str, folder: str) -> None:
    """What the product itself says of a finished run: its own check of the database, and the proof of its output.

    Raises:
        SystemExit: Something is wrong; it is printed.
    """
    from alphasmith.search.checkpoints import verification
    from alphasmith.storage.database.connection import open_existing
    from alphasmith.storage.upkeep.check import violations

    database = open_existing(url)
    found = [str(violation) for violation in violations(database, deep=True)]
    database.close()
    answer = verification.verify(Path(folder), allow_code=FUNCTIONS)
    if "error" not in answer:
        found.append(f"verify proves nothing: {answer}")
    if found:
        raise SystemExit("; ".join(found))
