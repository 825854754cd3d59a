from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from alphasmith.objectives.errors import InputError
from alphasmith.search.processing.service._batching import Batcher, BatchSettings, Forward, QueueFull, Stopping

#: Long enough that a test which waits for it fails by its own time limit.
NEVER = 3600.0


class Gate:
    """A forward call that ends when it is let: what it was called with, and a call at a time."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self._open = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        self.calls.append(list(items))
        self._entered.release()
        assert self._open.acquire(timeout=60)
        if "bad" in items:
            raise ValueError("a bad item")
        return [f"answer to {item}" for item in items]

    def entered(self) -> None:
        """Wait until a call has begun."""
        assert self._entered.acquire(timeout=60)

    def let(self, calls: int = 1) -> None:
        self._open.release(calls)


@contextmanager
def batching(forward: Any, **settings: Any) -> Iterator[Batcher[Any, Any]]:
    batcher: Batcher[Any, Any] = Batcher(forward, BatchSettings(**{"wait": 0.0, **settings}))
    try:
        yield batcher
    finally:
        if isinstance(forward, Gate):
            forward.let(1000)
        batcher.close(60)


def put(batcher: Batcher[Any, Any], items: Sequence[Any], stack: ExitStack) -> list[Future[Any]]:
    place = stack.enter_context(batcher.places(len(items)))
    return [place(item) for item in items]


def test_what_waits_while_a_call_runs_shares_the_next_one() -> None:
    gate = Gate()
    with batching(gate) as batcher, ExitStack() as stack:
        futures = put(batcher, ["first"], stack)
        gate.entered()
        for item in "abcde":  # five requests
            futures += put(batcher, [item], stack)
        assert batcher.waiting == 5
        gate.let(2)
        assert [future.result(60) for future in futures] == [f"answer to {item}" for item in ["first", *"abcde"]]
    assert gate.calls == [["first"], list("abcde")]


def test_a_first_item_waits_for_others_until_the_call_is_full() -> None:
    gate = Gate()
    gate.let(9)
    with batching(gate, wait=NEVER, most=3) as batcher, ExitStack() as stack:
        futures = [put(batcher, [item], stack)[0] for item in "abc"]
        assert [future.result(60) for future in futures] == ["answer to a", "answer to b", "answer to c"]
    assert gate.calls == [["a", "b", "c"]]


def test_a_first_item_does_not_wait_longer_than_it_was_told() -> None:
    now = iter(
        [0.0, 1.0, 5.0, 5.0, 6.5]
    )  # put; looked at within the time; looked at after it; start and end of the call
    calls: list[Forward] = []
    batcher: Batcher[str, str] = Batcher(
        lambda items: items, BatchSettings(wait=1.001), seen=calls.append, clock=lambda: next(now)
    )
    with batcher.places(1) as place:
        assert place("alone").result(60) == "alone"
    batcher.close(60)
    assert calls == [Forward(items=1, seconds=1.5, waited=5.0)]


def test_a_call_takes_no_more_than_its_most() -> None:
    gate = Gate()
    with batching(gate, most=4) as batcher, ExitStack() as stack:
        futures = put(batcher, ["first"], stack)
        gate.entered()
        futures += put(batcher, list("abcdefghij"), stack)
        gate.let(9)
        assert [future.result(60)[-1] for future in futures] == [*"tabcdefghij"]
    assert [len(call) for call in gate.calls] == [1, 4, 4, 2]


def test_one_bad_item_fails_alone() -> None:
    gate = Gate()
    with batching(gate) as batcher, ExitStack() as stack:
        futures = put(batcher, ["first"], stack)
        gate.entered()
        futures += put(batcher, ["a", "b", "bad", "c", "d"], stack)
        gate.let(99)
        assert [future.result(60) for future in futures if future is not futures[3]] == [
            f"answer to {item}" for item in ["first", "a", "b", "c", "d"]
        ]
        with pytest.raises(ValueError, match="a bad item"):
            futures[3].result(60)


def test_a_wrong_number_of_answers_is_no_answer() -> None:
    with batching(lambda items: ["one too many", *items]) as batcher, ExitStack() as stack:
        (future,) = put(batcher, ["a"], stack)
        with pytest.raises(RuntimeError, match="2 answers for 1 items"):
            future.result(60)


def test_a_full_queue_says_when_to_come_again() -> None:
    gate = Gate()
    with batching(gate, places=3) as batcher:
        with ExitStack() as stack:
            put(batcher, ["first"], stack)
            gate.entered()
            put(batcher, ["second"], stack)
            with pytest.raises(QueueFull) as refused:
                put(batcher, ["a", "b"], stack)
            assert refused.value.retry_after == 1
            put(batcher, ["third"], stack)  # one is still free
            with pytest.raises(QueueFull):
                put(batcher, ["fourth"], stack)
            assert batcher.taken == 3
        assert batcher.taken == 0, "places are free when their requests are answered"


def test_the_time_to_come_again_follows_the_calls() -> None:
    now = [0.0]
    gate = Gate()

    def forward(items: Sequence[str]) -> list[str]:
        now[0] += 10.0
        return gate(items)

    batcher: Batcher[str, str] = Batcher(forward, BatchSettings(wait=0, most=2, places=5), clock=lambda: now[0])
    with ExitStack() as stack:
        put(batcher, "a", stack)
        gate.entered()
        gate.let()
        put(batcher, "b", stack)
        gate.entered()  # so the first call is over, and how long it took is known
        put(batcher, "cde", stack)
        with pytest.raises(QueueFull) as refused:
            put(batcher, "f", stack)
        assert refused.value.retry_after == 30, "five places, three calls of ten seconds"
        gate.let(9)
        batcher.close(60)


def test_who_goes_away_costs_no_call() -> None:
    gate = Gate()
    with batching(gate) as batcher, ExitStack() as stack:
        first = put(batcher, ["first"], stack)[0]
        gate.entered()
        gone, stays = put(batcher, ["gone", "stays"], stack)
        assert gone.cancel()
        assert not first.cancel(), "a call has taken it"
        gate.let(9)
        assert stays.result(60) == "answer to stays"
    assert gate.calls == [["first"], ["stays"]]


def test_stopping_answers_what_was_accepted_and_refuses_the_rest() -> None:
    gate = Gate()
    batcher: Batcher[str, str] = Batcher(gate, BatchSettings(wait=NEVER, most=2))
    with ExitStack() as stack:
        futures = put(batcher, ["a", "b", "c"], stack)
        gate.entered()
        closer = threading.Thread(target=batcher.close)
        closer.start()
        while batcher.accepts:  # the closer says so before it waits
            threading.Event().wait(0.001)
        with pytest.raises(Stopping):
            put(batcher, ["late"], stack)
        gate.let(9)
        assert [future.result(60) for future in futures] == ["answer to a", "answer to b", "answer to c"]
        closer.join(60)
    assert gate.calls == [["a", "b"], ["c"]]


@pytest.mark.parametrize("settings", [{"most": 0}, {"places": 0}, {"wait": -1.0}, {"wait": float("nan")}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(settings))}:"):
        BatchSettings(**settings)
