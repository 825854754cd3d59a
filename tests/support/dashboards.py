"""Dashboards that serve in a thread of the test."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from alphasmith.dashboards.server import DashboardServer


@contextmanager
def running(server: DashboardServer) -> Iterator[int]:
    """Its port, while it serves."""
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield int(re.findall(r":(\d+)/", server.url)[0])
    finally:
        server.close()
        thread.join(10)
        assert not thread.is_alive()
