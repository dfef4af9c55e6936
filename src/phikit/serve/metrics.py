"""What the server counts, as Prometheus reads it; extra `serve` (prometheus-client).

Names and units follow Prometheus' conventions; the labels are bounded, since a stranger chooses
paths and model names.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from phikit.base.device import peak_memory_bytes
from phikit.base.errors import MissingExtraError
from phikit.serve.models import ModelShelf

if TYPE_CHECKING:
    pass

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """

    def __init__(self, shelf: ModelShelf) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Histogram
        except ImportError as error:
            raise MissingExtraError("prometheus-client", "serve") from error
        self._registry: CollectorRegistry = CollectorRegistry()
        self._requests = Counter(
            "phikit_http_requests",
            "Answers, by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "phikit_http_request_seconds",
            "From the request to the end of its answer.",
            ["path"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "phikit_first_token_seconds",
            "From the request to its first token, waiting and loading included.",
            ["model"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Workers(shelf))  # pyright: ignore[reportArgumentType]

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count one answer; `path` is one of the server's own."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """Count how long a first token took."""
        self._first_token.labels(model).observe(seconds)

    def text(self) -> bytes:
        """All of it in the exposition format, version 0.0.4."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)


class _Workers:
    """Reads the engines of the loaded models when it is asked."""

    def __init__(self, shelf: ModelShelf) -> None:
        self._shelf = shelf

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = {model.name: model.worker.stats() for model in self._shelf.loaded}
        gauges = {
            "running": "Samples in the batch.",
            "waiting": "Requests without a first token.",
            "blocks_held": "Blocks of the cache in use.",
            "blocks": "Blocks of the cache in all.",
        }
        counters = {
            "requests": "Requests taken by the engine.",
            "prompt_tokens": "Tokens of their prompts.",
            "sampled_tokens": "Tokens sampled.",
        }
        for kind, fields in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, text in fields.items():
                family = kind(f"phikit_engine_{name}", text, labels=["model"])
                for model, counts in stats.items():
                    family.add_metric([model], getattr(counts, name))
                yield family
        size = GaugeMetricFamily("phikit_model_bytes", "Weights and cache.", labels=["model"])
        for model in self._shelf.loaded:
            size.add_metric([model.name], model.size)
        yield size
        yield GaugeMetricFamily(
            "phikit_peak_memory_bytes", "Most memory held so far.", value=peak_memory_bytes()
        )
