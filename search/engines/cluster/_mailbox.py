"""The mailbox between the searches on a Ray cluster and the process that records them.

It is an actor on the node of that process, so messages of a search outlive the search's own node. Its class travels to
Ray by value and knows bytes only: the process that runs it imports neither torch nor this package.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

#: (number, kind, key of the work, content); kind is ``told``, ``ended``, ``lost`` or ``woken``.
Event = tuple[int, str, str, bytes]


class Mailbox:
    """Hands out site work, and keeps what searches tell until the recording process has taken it.

    Every attempt at a piece of work has a number; what an earlier attempt still sends, e.g. from a node that was only cut
    off for a while, is refused.
    """

    def __init__(self) -> None:
        self._works: dict[str, list[Any]] = {}
        self._told: dict[str, list[bytes]] = {}
        self._attempts: dict[str, int] = {}
        self._events: deque[Event] = deque()
        self._number = 0
        self._stopping = False
        self._news = asyncio.Event()

    async def post(self, key: str, work: list[Any]) -> None:
        """Keep one piece of work: a list of one object reference, which Ray so does not resolve."""
        self._works[key], self._told[key], self._attempts[key] = work, [], 0

    async def begin(self, key: str) -> tuple[int, list[Any], list[bytes], bool]:
        """An attempt begins.

        Returns:
            Its number from 1, the work (empty: it has ended meanwhile), what earlier attempts told, and whether to stop.
        """
        if key not in self._works:
            return 0, [], [], True
        self._attempts[key] += 1
        return self._attempts[key], self._works[key], self._told[key], self._stopping

    async def tell(self, key: str, attempt: int, message: bytes) -> bool:
        """Keep one message of an attempt; whether the search shall leave."""
        if self._attempts.get(key) != attempt:
            return True
        self._told[key].append(message)
        self._add("told", key, message)
        return self._stopping

    async def leave(self, key: str, attempt: int) -> bool:
        """Whether the search shall leave: everything stops, or a later attempt has taken over."""
        return self._stopping or self._attempts.get(key) != attempt

    async def end(self, key: str, attempt: int, ended: bytes) -> None:
        """The search ended; later attempts find no work."""
        if self._attempts.get(key) == attempt:
            self._forget(key)
            self._add("ended", key, ended)

    async def give_up(self, key: str, reason: str) -> None:
        """No further attempt will be made."""
        if key in self._works:
            self._forget(key)
            self._add("lost", key, reason.encode())

    async def begun(self, key: str) -> int:
        """Attempts that reached a worker so far; 0 as well where the work has ended."""
        return self._attempts.get(key, 0)

    async def stop(self) -> None:
        """Let every search leave, and wake who waits."""
        self._stopping = True
        self._add("woken", "", b"")

    async def drain(self, heard: int, timeout: float) -> list[Event]:
        """Events after number ``heard``, at once where there are some, else the first within ``timeout`` seconds.

        Events are dropped only when a later call says they were heard: an answer may get lost.
        """
        while self._events and self._events[0][0] <= heard:
            self._events.popleft()
        if not self._events:
            self._news.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), timeout)
        return list(self._events)

    def _forget(self, key: str) -> None:
        del self._works[key], self._told[key], self._attempts[key]

    def _add(self, kind: str, key: str, content: bytes) -> None:
        self._number += 1
        self._events.append((self._number, kind, key, content))
        self._news.set()
