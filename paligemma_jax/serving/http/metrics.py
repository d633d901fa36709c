"""What a server counts, as Prometheus reads it; the names are vLLM's under a prefix of our own."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from paligemma_jax.serving.events import Finished, Stats

_PREFIX = "paligemma"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# Of the engine's stats: the field, whether it only grows, the metric, its help.
_OF_ENGINE = (
    ("running", False, "num_requests_running", "Requests in a slot"),
    ("waiting", False, "num_requests_waiting", "Requests that wait for a slot"),
    ("free_slots", False, "free_slots", "Slots without a request"),
    ("compiles_while_serving", True, "compiles_while_serving", "Programs compiled after the server was ready"),
    ("prompt_tokens", True, "prompt_tokens", "Tokens of prompts, those of pictures included"),
    ("padded_tokens", True, "padded_tokens", "What these were padded to"),
    ("generation_tokens", True, "generation_tokens", "Tokens of answers"),
    ("images_embedded", True, "images_embedded", "Pictures that went through the encoder"),
    ("images_reused", True, "images_reused", "Pictures whose embeddings were there already"),
    ("cached_bytes", False, "image_cache_bytes", "Memory of the embeddings that are kept"),
)


class Metrics:
    """The counters of one server, in a registry of their own.

    stats: gives the engine's counts, whenever somebody asks.
    """

    def __init__(self, stats: Callable[[], Stats]):
        self.registry = CollectorRegistry()
        self._stats = stats
        self.registry.register(self)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"{_PREFIX}_{name}", text, buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

        self._queue = histogram("request_queue_time_seconds", "From a request to its slot")
        self._first = histogram("time_to_first_token_seconds", "From a request to its first token")
        self._whole = histogram("e2e_request_latency_seconds", "From a request to the end of its answer")
        self._between = histogram("inter_token_latency_seconds", "Between two tokens of an answer", _BETWEEN)
        self._http = counter("http_requests", "Requests over HTTP", "route", "status")
        self.pictures_refused = counter("pictures_refused", "Pictures that could not be read or may not be")

    def responded(self, route: str, status: int) -> None:
        self._http.labels(route, status).inc()

    def finished(self, event: Finished) -> None:
        count = len(event.output.tokens)
        self._queue.observe(event.queue_s)
        self._first.observe(event.first_token_s)
        self._whole.observe(event.total_s)
        if count > 1:
            self._between.observe((event.total_s - event.first_token_s) / (count - 1))

    def collect(self) -> Iterator[Metric]:
        """What the engine counts itself; called by the registry."""
        stats = self._stats()
        for field, grows, name, text in _OF_ENGINE:
            kind = CounterMetricFamily if grows else GaugeMetricFamily
            yield kind(f"{_PREFIX}_{name}", text, value=getattr(stats, field))
        ended = CounterMetricFamily(
            f"{_PREFIX}_request_success", "Answers by how they ended", labels=["finished_reason"]
        )
        for reason, count in stats.finished.items():
            ended.add_metric([reason], count)
        yield ended

    def describe(self) -> list[Metric]:
        return []

    def text(self) -> bytes:
        """In the text format, version 0.0.4."""
        return generate_latest(self.registry)
