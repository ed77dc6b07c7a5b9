"""What a gateway counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class _Gauges(Collector):
    """Counted when somebody scrapes: agents by state."""

    def __init__(self, read: Callable[[], dict[str, int]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        agents = GaugeMetricFamily("blockyard_gateway_agents", "agents by what they are", labels=["state"])
        for state, count in self._read().items():
            agents.add_metric([state], count)
        yield agents


class GatewayMetrics:
    """One registry per gateway."""

    def __init__(self, agents: Callable[[], dict[str, int]]) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        registry.register(_Gauges(agents))
        self.requests = Counter(
            "blockyard_gateway_requests", "requests answered", ["path", "code"], registry=registry
        )
        self.retries = Counter(
            "blockyard_gateway_retries",
            "attempts at an agent that came to nothing, by why",
            ["reason"],
            registry=registry,
        )
        self.replays = Counter(
            "blockyard_gateway_replays",
            "streams that lost their agent in the middle: begun again, gone on, or ended because the replay "
            "differed or was not possible",
            ["outcome"],
            registry=registry,
        )
        self.refusals = Counter(
            "blockyard_gateway_refusals", "requests beyond a tenant's limits", ["tenant", "reason"],
            registry=registry,
        )  # fmt: skip
        self.malformed = Counter(
            "blockyard_gateway_malformed_requests", "requests that are no HTTP", registry=registry
        )
        self.upstream = Histogram(
            "blockyard_gateway_upstream_seconds", "how long agents took for an attempt", ["outcome"],
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        self.first_token = Histogram(
            "blockyard_gateway_time_to_first_token_seconds", "from a streaming request to its first event",
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip

    def render(self) -> bytes:
        """The text format that every Prometheus reads."""
        return generate_latest(self._registry)
