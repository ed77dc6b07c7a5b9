"""The operator's own numbers, as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_READS = ("get", "list")


class _Now(Collector):
    """Gauges whose values are read at each scrape."""

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        for name, (text, value) in self._gauges.items():
            yield GaugeMetricFamily(f"blockyard_operator_{name}", text, value=value())


class Metrics:
    """One registry per operator, so that two in one process (tests) do not share numbers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Histogram(
            "blockyard_operator_reconcile_seconds",
            "duration of one round over one service, by result (ok, error)",
            ["result"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.waits = Histogram(
            "blockyard_operator_queue_seconds",
            "how long a service was due before its round began",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._calls = Counter(
            "blockyard_operator_api_calls",
            "calls to the API server; code 0 is no answer",
            ["verb", "kind", "code"],
            registry=self.registry,
        )
        self._writes = Counter(
            "blockyard_operator_api_writes",
            "calls that change something, whatever came of them",
            ["kind"],
            registry=self.registry,
        )
        self.lease_held = Gauge(
            "blockyard_operator_lease_held", "1 while this operator acts", registry=self.registry
        )

    def count_call(self, verb: str, kind: str, code: int) -> None:
        self._calls.labels(verb, kind, str(code)).inc()
        if verb not in _READS:
            self._writes.labels(kind).inc()

    def watch(self, gauges: dict[str, tuple[str, Callable[[], float]]]) -> None:
        """Register gauges: by name, the help text and the function that reads the value."""
        self.registry.register(_Now(gauges))

    def render(self) -> bytes:
        return generate_latest(self.registry)
