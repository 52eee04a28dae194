"""Metrics for Prometheus, by vLLM's names with the prefix `layerskip:`."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from layerskip.serve.engine import EngineStats, Finished

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "layerskip:"
_TTFT = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0, 2.5)
_LATENCY = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counters and histograms of a server.

    Args:
        model_name: label of every metric.
        stats: returns the engine's figures; None while there is no engine.
    """

    def __init__(self, model_name: str, stats: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, stats))
        self._model_name = model_name
        self._ttft = self._histogram("time_to_first_token_seconds", "To the first token.", _TTFT)
        self._inter_token = self._histogram(
            "inter_token_latency_seconds",
            "Between tokens; those of one round share its time equally.",
            _INTER_TOKEN,
        )
        self._latency = self._histogram(
            "e2e_request_latency_seconds", "From submission to the end of an answer.", _LATENCY
        )
        self._finished = Counter(
            f"{_PREFIX}request_success",
            "Answers by the reason of their end.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._failed = Counter(
            f"{_PREFIX}request_failure",
            "Answers that ended in an internal error.",
            ("model_name",),
            registry=self._registry,
        ).labels(model_name)

    def clock(self) -> "AnswerClock":
        """Start the clock of an answer."""
        return AnswerClock(self)

    def failed(self) -> None:
        """Count an answer that ended in an internal error."""
        self._failed.inc()

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        labelled = Histogram(
            _PREFIX + name, text, ("model_name",), registry=self._registry, buckets=buckets
        )
        return labelled.labels(self._model_name)


class AnswerClock:
    """Observes the latencies of one answer."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._submitted = time.perf_counter()
        self._last: float | None = None

    def tokens(self, arrived: float, n: int) -> None:
        """Observe a round of n tokens."""
        if not n:
            return
        if self._last is None:
            self._metrics._ttft.observe(arrived - self._submitted)
        else:
            for _ in range(n):
                self._metrics._inter_token.observe((arrived - self._last) / n)
        self._last = arrived

    def finished(self, arrived: float, event: Finished) -> None:
        """Observe the end."""
        self._metrics._latency.observe(arrived - self._submitted)
        self._metrics._finished.labels(self._metrics._model_name, event.finish_reason).inc()


class _EngineCollector(Collector):
    """The engine's own figures, read when Prometheus asks."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats | None]) -> None:
        self._model_name, self._stats = model_name, stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        gauges = {
            "num_requests_running": ("Answers being computed.", stats.num_requests_running),
            "num_requests_waiting": ("Requests in the queue.", stats.num_requests_waiting),
            "kv_cache_usage_perc": (
                "Share of the KV cache in use by running answers; 1 is all of it.",
                stats.kv_cache_tokens_active / stats.kv_cache_tokens_total,
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=("model_name",))
            gauge.add_metric((self._model_name,), value)
            yield gauge
        counters = {
            "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "generation_tokens": ("Tokens of answers.", stats.generation_tokens),
            "prefix_cache_queries": ("Prompt tokens looked up.", stats.prefix_cache_queries),
            "prefix_cache_hits": ("Prompt tokens reused.", stats.prefix_cache_hits),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(_PREFIX + name, text, labels=("model_name",))
            counter.add_metric((self._model_name,), value)
            yield counter
        by_source = {
            "num_drafts": ("Rounds with drafts.", stats.num_drafts),
            "num_draft_tokens": ("Drafted tokens.", stats.num_draft_tokens),
            "num_accepted_tokens": ("Accepted tokens.", stats.num_accepted_tokens),
        }
        for name, (text, counts) in by_source.items():
            counter = CounterMetricFamily(
                f"{_PREFIX}spec_decode_{name}", text, labels=("model_name", "source")
            )
            for source, count in counts.items():
                counter.add_metric((self._model_name, source), count)
            yield counter
        counter = CounterMetricFamily(
            f"{_PREFIX}spec_decode_num_accepted_tokens_per_pos",
            "Accepted tokens by their position in the draft.",
            labels=("model_name", "source", "position"),
        )
        for source, positions in stats.num_accepted_tokens_per_pos.items():
            for position, count in enumerate(positions):
                counter.add_metric((self._model_name, source, str(position)), count)
        yield counter
