"""Prometheus metrics: the engine's counters under vLLM's names, so that existing dashboards work, and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .protocol import AgentStatus

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class _StatusCollector(Collector):
    """The numbers of the status, read when somebody scrapes."""

    def __init__(self, status: Callable[[], AgentStatus], finished: Callable[[], dict[str, int]]) -> None:
        self._status = status
        self._finished = finished

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        labels = [status.model]
        tier = status.device_tier
        gauges = {
            "vllm:num_requests_running": ("requests being decoded", status.running),
            "vllm:num_requests_waiting": ("requests queued or preempted", status.waiting),
            "vllm:num_requests_swapped": ("preempted requests in the host tier", status.swapped),
            "vllm:kv_cache_usage_perc": ("share of KV blocks in use, 0 to 1", tier.active / max(1, tier.total)),
            "blockyard_in_flight_requests": ("requests that clients hold open", status.in_flight),
            "blockyard_step_seconds": ("moving average of a step's duration", status.mean_step_ms / 1e3),
        }
        for name, (text, value) in gauges.items():
            metric = GaugeMetricFamily(name, text, labels=["model_name"])
            metric.add_metric(labels, value)
            yield metric
        blocks = GaugeMetricFamily("blockyard_kv_blocks", "KV blocks by tier and state", labels=["tier", "state"])
        for tier_name, usage in (("device", tier), ("host", status.host_tier)):
            for state in ("free", "cached", "active"):
                blocks.add_metric([tier_name, state], getattr(usage, state))
        yield blocks
        counters = {
            "vllm:prompt_tokens": ("prompt tokens served", status.prompt_tokens),
            "vllm:generation_tokens": ("tokens generated", status.generated_tokens),
            "vllm:prefix_cache_queries": ("prompt tokens looked up in the prefix cache", status.prefix_queries),
            "vllm:prefix_cache_hits": ("prompt tokens found there", status.prefix_hits),
            "vllm:num_preemptions": (
                "requests preempted",
                status.preemptions_recompute + status.preemptions_swap,
            ),
            "blockyard_steps": ("engine steps", status.steps),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric(labels, value)
            yield counter
        finished = CounterMetricFamily(
            "vllm:request_success", "requests finished", labels=["model_name", "finished_reason"]
        )
        for reason, count in self._finished().items():
            finished.add_metric([status.model, reason], count)
        yield finished


class Metrics:
    """One registry per agent; histograms are observed by the request handlers, in seconds."""

    def __init__(self, status: Callable[[], AgentStatus], finished: Callable[[], dict[str, int]], model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_StatusCollector(status, finished))

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=self._registry, buckets=_SECONDS).labels(model)

        self.time_to_first_token = histogram("vllm:time_to_first_token_seconds", "from request to first token")
        self.time_per_output_token = histogram("vllm:time_per_output_token_seconds", "between output tokens, mean")
        self.request_latency = histogram("vllm:e2e_request_latency_seconds", "from request to last token")

    def render(self) -> bytes:
        return generate_latest(self._registry)
