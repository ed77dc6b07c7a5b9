"""Prometheus metrics: the engine's numbers under vLLM's names, so that dashboards work, and our own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .protocol import AgentStatus

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKENS = tuple(float(2**k) for k in range(18))


class _StatusCollector(Collector):
    """The numbers of the status, read when somebody scrapes."""

    def __init__(self, status: Callable[[], AgentStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        labels = [status.model]
        tier = status.device_tier
        gauges = {
            "vllm:num_requests_running": ("requests being decoded", status.running),
            "vllm:num_requests_waiting": ("requests queued or preempted", status.waiting),
            "vllm:num_requests_swapped": ("preempted requests in the host tier", status.swapped),
            "vllm:kv_cache_usage_perc": (
                "share of KV blocks in use, 0 to 1",
                tier.active / max(1, tier.total),
            ),
            "blockyard_in_flight_requests": ("requests that clients hold open", status.in_flight),
            "blockyard_step_seconds": ("moving average of a step's duration", status.mean_step_ms / 1e3),
        }
        for name, (text, value) in gauges.items():
            metric = GaugeMetricFamily(name, text, labels=["model_name"])
            metric.add_metric(labels, value)
            yield metric
        blocks = GaugeMetricFamily(
            "blockyard_kv_blocks", "KV blocks by tier and state", labels=["tier", "state"]
        )
        for tier_name, usage in (("device", tier), ("host", status.host_tier)):
            for state in ("free", "cached", "active"):
                blocks.add_metric([tier_name, state], getattr(usage, state))
        yield blocks
        # Routers read block size and count from here to estimate prefix hits.
        cache = GaugeMetricFamily(
            "vllm:cache_config_info", "the KV cache", labels=["block_size", "num_gpu_blocks"]
        )
        cache.add_metric([str(status.block_tokens), str(tier.total)], 1)
        yield cache
        counters = {
            "vllm:prompt_tokens": ("prompt tokens served", status.prompt_tokens),
            "vllm:generation_tokens": ("tokens generated", status.generated_tokens),
            "vllm:prefix_cache_queries": (
                "prompt tokens looked up in the prefix cache",
                status.prefix_queries,
            ),
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
        for reason, count in status.finished.items():
            finished.add_metric([status.model, reason], count)
        yield finished


class Metrics:
    """One registry per agent; histograms are observed by the request handlers, in seconds."""

    def __init__(self, status: Callable[[], AgentStatus], model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_StatusCollector(status))

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=self._registry, buckets=buckets).labels(
                model
            )

        self.malformed = Counter(
            "blockyard_malformed_requests", "requests that are no HTTP", registry=self._registry
        )
        self.time_to_first_token = histogram(
            "vllm:time_to_first_token_seconds", "from request to first token"
        )
        self.inter_token_latency = histogram(
            "vllm:inter_token_latency_seconds", "between two tokens of a choice"
        )
        self.time_per_output_token = histogram("vllm:time_per_output_token_seconds", "its older name")
        self.mean_time_per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "a request's mean time per token after the first"
        )
        self.request_latency = histogram("vllm:e2e_request_latency_seconds", "from request to last token")
        self.prompt_tokens = histogram("vllm:request_prompt_tokens", "prompt tokens of a request", _TOKENS)
        self.generation_tokens = histogram(
            "vllm:request_generation_tokens", "tokens generated for it", _TOKENS
        )

    def render(self) -> bytes:
        """The text format that every Prometheus reads."""
        return generate_latest(self._registry)


class RequestTimer:
    """The times of one request, from its arrival."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begin = time.monotonic()
        self._last: dict[int, float] = {}  # when each choice got its last token
        self._first_token = 0.0

    def token(self, choice: int) -> None:
        """A choice got one token or more."""
        now = time.monotonic()
        if not self._last:
            self._first_token = now
            self._metrics.time_to_first_token.observe(now - self._begin)
        elif choice in self._last:
            self._metrics.inter_token_latency.observe(now - self._last[choice])
            self._metrics.time_per_output_token.observe(now - self._last[choice])
        self._last[choice] = now

    def finish(self, prompt_tokens: int, completion_tokens: int) -> None:
        """The whole answer is there."""
        now = time.monotonic()
        self._metrics.request_latency.observe(now - self._begin)
        self._metrics.prompt_tokens.observe(prompt_tokens)
        self._metrics.generation_tokens.observe(completion_tokens)
        each = completion_tokens / max(1, len(self._last))
        if each > 1:
            self._metrics.mean_time_per_token.observe((now - self._first_token) / (each - 1))
