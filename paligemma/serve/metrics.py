"""What `/metrics` shows, in Prometheus' format. Each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(name, about, labels, namespace="paligemma", registry=registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(name, about, namespace="paligemma", registry=registry, buckets=buckets)

        self.requests = counter("requests", "Requests by route and status.", "route", "code")
        self.cancelled = counter("cancelled", "Requests whose client left before the reply was complete.")
        self.tokens = counter("tokens", "Tokens of prompts (pictures included) and of answers.", "kind")
        self.errors = counter("engine_errors", "Rows that failed in the engine.")
        self.queue = histogram("queue_seconds", "The wait for the engine, without the encoding of pictures.")
        self.first_token = histogram("time_to_first_token_seconds", "From a request being ready to its first token.")
        self.per_token = histogram("time_per_token_seconds", "Of one answer, after its first token.")
        self.rows = histogram("batch_rows", "Rows in a step of the engine.", ROWS)

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A gauge that is asked when it is read."""
        Gauge(name, about, namespace="paligemma", registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)


CONTENT_TYPE = CONTENT_TYPE_LATEST
