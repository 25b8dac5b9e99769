"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gptoss_compile.runtime.engine import Engine

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 131072)
_GAUGES = {
    "requests_running": "Requests that are generating or reading their prompt.",
    "requests_waiting": "Requests that wait for room.",
    "kv_pages_held": "KV cache pages held by live requests.",
    "kv_pages_cached": "KV cache pages held by the prefix cache alone.",
    "kv_pages_free": "KV cache pages that are free.",
}
_COUNTERS = {
    "preemptions": "Requests that gave up their pages to others and started again.",
    "prompt_tokens": "Prompt tokens read, those found in the prefix cache included.",
    "cached_tokens": "Prompt tokens found in the prefix cache.",
    "generation_tokens": "Tokens generated.",
    "steps": "Steps the executor ran.",
}


class Metrics:
    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"gptoss_{name}", text, buckets=buckets, registry=self.registry)

        self.harmony_repairs = Counter(
            "gptoss_harmony_repairs",
            "Malformed places in the model's harmony output that were repaired.",
            registry=self.registry,
        )
        self.first_token = histogram("time_to_first_token_seconds", "From submission to the first token.", _SECONDS)
        self.inter_token = histogram("inter_token_seconds", "Between two tokens of an answer.", _SECONDS)
        self.whole_answer = histogram("request_seconds", "From submission to the last token of an answer.", _SECONDS)
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of an answer.", _TOKENS)
        self.answer_length = histogram("request_generation_tokens", "Generated tokens of an answer.", _TOKENS)


class _EngineCollector:
    """Reads the engine's snapshot when Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"gptoss_{name}", text, getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"gptoss_{name}", text, getattr(stats, name))


class Timer:
    """Latencies and lengths of one answer, observed as its tokens come."""

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._start = self._last = time.monotonic()
        self._count = 0
        metrics.prompt_length.observe(prompt_tokens)

    def tokens(self, count: int) -> None:
        """`count` tokens arrived together."""
        if not count:
            return
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        if not self._count:
            self._metrics.first_token.observe(elapsed)
        else:
            for _ in range(count):
                self._metrics.inter_token.observe(elapsed / count)
        self._count += count

    def done(self) -> None:
        self._metrics.answer_length.observe(self._count)
        self._metrics.whole_answer.observe(time.monotonic() - self._start)
