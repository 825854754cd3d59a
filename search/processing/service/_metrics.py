"""What the service tells Prometheus. Every service has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.process_collector import ProcessCollector

from alphasmith.search.processing.description import ModelDescription
from alphasmith.search.processing.service._batching import Forward

#: Upper bounds of histograms of times [s]: from a cached page to the limit of an answer.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Content type of :meth:`Metrics.text`.
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters, gauges and histograms of one service. May be used from several threads.

    Args:
        description: What is served.
    """

    def __init__(self, description: ModelDescription) -> None:
        self._registry = CollectorRegistry()
        own = self._registry
        ProcessCollector(registry=own)
        model = Info("alphasmith_model", "What is served.", registry=own)
        model.info({"run": description.run, "name": description.name, "scheme": description.scheme})
        self._requests = Counter("alphasmith_requests", "Answered requests.", ("route", "status"), registry=own)
        self._seconds = Histogram(
            "alphasmith_request_seconds", "From head to answer.", ("route",), buckets=_SECONDS, registry=own
        )
        self._items = Counter("alphasmith_items", "Items by what became of them.", ("outcome",), registry=own)
        self._together = Histogram(
            "alphasmith_forward_items", "Items that shared a forward call.", buckets=_ITEMS, registry=own
        )
        self._forward = Histogram(
            "alphasmith_forward_seconds", "Duration of forward calls.", buckets=_SECONDS, registry=own
        )
        self._waited = Histogram(
            "alphasmith_waited_seconds", "Wait of the first item of a call.", buckets=_SECONDS, registry=own
        )

    def gauge(self, name: str, told: str, value: Callable[[], float]) -> None:
        """Show a number that is looked up when it is asked for.

        Args:
            name: Without the common beginning.
            told: What it is.
            value: The number; called from any thread.
        """
        Gauge(f"alphasmith_{name}", told, registry=self._registry).set_function(value)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request.

        Args:
            route: Path of its route; ``other`` for every path without one.
            status: HTTP status.
            seconds: From its head to the end of its answer [s].
        """
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def item(self, outcome: Literal["classified", "refused", "failed"], count: int) -> None:
        """Count items.

        Args:
            outcome: ``failed`` is a defect, ``refused`` an item that cannot be used.
            count: How many.
        """
        if count:
            self._items.labels(outcome).inc(count)

    def forward(self, call: Forward) -> None:
        """Count a forward call.

        Args:
            call: The call.
        """
        self._together.observe(call.items)
        self._forward.observe(call.seconds)
        self._waited.observe(call.waited)

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self._registry)
