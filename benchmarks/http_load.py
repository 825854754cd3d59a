"""Clients of ``alphasmith serve``, in a process of their own: each sends its next request when it has the answer to the one before.

    python -m benchmarks.http_load URL FILE --clients 64 --seconds 10

Prints JSON: ``requests``, ``errors`` (what went wrong -> how often), ``seconds``, and latencies as ``p50`` and ``p99`` [s].
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp


@dataclass(kw_only=True)
class Load:
    """What clients saw.

    Attributes:
        latencies: Of every request that was answered with 200 [s].
        errors: What went wrong -> how often.
        seconds: From the first request to the last answer [s].
    """

    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def quantile(self, share: float) -> float:
        """Latency that this share of the requests keeps within [s]; NaN of none."""
        if not self.latencies:
            return float("nan")
        ranked = sorted(self.latencies)
        return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


async def load(url: str, name: str, content: bytes, *, clients: int, seconds: float) -> Load:
    """Let clients ask for a while.

    Args:
        url: Where to send.
        name: Name of the file that is sent.
        content: Its content.
        clients: How many ask at once.
        seconds: How long they begin new requests [s].
    """
    seen = Load()
    start = time.perf_counter()

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() - start < seconds:
            began = time.perf_counter()
            form = aiohttp.FormData()
            form.add_field("file", content, filename=name)
            try:
                async with session.post(url, data=form) as answer:
                    body = await answer.read()
            except aiohttp.ClientError as error:
                seen.errors[type(error).__name__] += 1
                continue
            if answer.status == 200 and b'"top"' in body:
                seen.latencies.append(time.perf_counter() - began)
            else:
                seen.errors[f"status {answer.status}"] += 1

    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    seen.seconds = time.perf_counter() - start
    return seen


def main() -> None:
    """Print what the clients saw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    seen = asyncio.run(
        load(given.url, given.file.name, given.file.read_bytes(), clients=given.clients, seconds=given.seconds)
    )
    facts = asdict(seen) | {"requests": len(seen.latencies), "p50": seen.quantile(0.5), "p99": seen.quantile(0.99)}
    del facts["latencies"]
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
