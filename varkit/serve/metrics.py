"""What Prometheus reads at /metrics: requests, pictures, the queue, and how full and how quick the batches are."""

from functools import partial
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from varkit.serve.batcher import Batcher, Watch

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PREFIX, UNKNOWN = "varkit", "other"


class Metrics(Watch):
    """The numbers of one application; those of another do not mix with them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry, namespace=PREFIX)
        gauge = partial(Gauge, registry=self.registry, namespace=PREFIX)
        histogram = partial(Histogram, registry=self.registry, namespace=PREFIX, buckets=SECONDS)
        self.requests = counter("requests", "Answers, by route and status.", ["route", "status"])
        self.seconds = histogram("request_seconds", "From a request to the end of its answer.", ["route"])
        self.pictures = counter("pictures", "Pictures asked for, by what became of them.", ["outcome"])
        self.steps = histogram("step_seconds", "A step of a batch.")
        self.rows = counter("rows", "Rows of batches, by whether somebody waits for them.", ["kind"])
        self.waiting = gauge("waiting_pictures", "Pictures that wait for their turn.")
        self.active = gauge("active_pictures", "Pictures that are being drawn.")

    def follow(self, batcher: Batcher) -> None:
        """Read the lengths of this batcher's queues."""
        self.waiting.set_function(lambda: len(batcher.waiting))
        self.active.set_function(lambda: batcher.active)

    def stepped(self, rows: int, size: int, seconds: float) -> None:
        self.steps.observe(seconds)
        self.rows.labels("used").inc(rows)
        self.rows.labels("padding").inc(size - rows)

    def ended(self, outcome: str, samples: int) -> None:
        self.pictures.labels(outcome).inc(samples)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


class Counted:
    """Counts the answers of an application (ASGI middleware)."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = 500, perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = getattr(
                scope.get("route"), "path", UNKNOWN
            )  # never what the client wrote: that has no end
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(perf_counter() - started)
