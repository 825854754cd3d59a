"""One target, hunted for a while: bounded in memory, and every example in time."""

from __future__ import annotations

import resource
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from tests.fuzz.targets import Target

#: Address space of a child, above what its libraries take [bytes]: a file of a few bytes must not need more.
_MEMORY = 24 * 2**30
#: Longest time of one example [s].
_LONGEST = 60


class HangError(BaseException):
    """An example took too long. No ``Exception``, so that nothing on the way turns it into a refusal."""


def settled(examples: int) -> settings:
    """Settings of Hypothesis for so many examples that may be slow."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
        print_blob=False,
    )


def hunt(name: str, target: Target, *, seconds: float, seed: int) -> int:
    """Try examples until the time is over; the exit code: 1 where one escaped."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    end, tried, escaped = time.monotonic() + seconds, 0, 0

    def case(data: DataObject) -> None:
        nonlocal tried
        tried += 1
        with _limited():
            target(data)

    while time.monotonic() < end:
        try:
            seeded(seed)(settled(50)(given(st.data())(case)))()
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            escaped += 1
            traceback.print_exc()
        seed += 1_000_003
    print(f"{name}: {tried} examples, {escaped} escapes", flush=True)
    return int(escaped > 0)


@contextmanager
def _limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise HangError(f"more than {_LONGEST} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
