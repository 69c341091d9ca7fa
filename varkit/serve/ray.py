"""The server as a deployment of Ray Serve (extra `ray`): the same application in several processes or machines.

Each replica has models, a batcher and a queue of its own. Ray's proxy chooses the replica; where one dies, `Proxy`
makes of its silence an answer that clients understand.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from varkit.errors import UserError
from varkit.hub.pipeline import Pipeline
from varkit.serve.answers import sse_error
from varkit.serve.app import create_app
from varkit.serve.errors import ApiError
from varkit.serve.service import Limits

NAME = "varkit"
MOST_REQUESTS = 4096
"""Requests that a replica holds: more than its own queue, which is what says no."""

RETRY = 1
PROXY_SETTING = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "varkit.serve.ray:middlewares"}
"""What Ray reads in the environment of its proxies: that of the process that starts Ray, or of `ray start`."""


class Replica:
    """One process with the models. `load` makes them, in this process."""

    def __init__(
        self, load: Callable[[], Mapping[str, Pipeline]], limits: Limits, keys: Sequence[str], threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self.server = create_app(load(), limits, keys)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve runs, its life's beginning and end included."""
        return self.server

    def check_health(self) -> None:
        """Ray Serve starts another replica in place of one that raises here."""
        if self.server.state.service.status == "broken":
            raise RuntimeError("the batcher has died")


class Proxy:
    """ASGI middleware in Ray's proxy: a request whose replica died gets an error that says so and can be sent again."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = streamed = ended = False

        async def noted(message: Message) -> None:
            nonlocal started, streamed, ended
            if message["type"] == "http.response.start":
                started = True
                kind = Headers(raw=message["headers"]).get("content-type", "")
                streamed = kind.startswith("text/event-stream")
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception:
            if started and not streamed:
                raise  # half an answer cannot be taken back: the connection breaks off
        lost = ApiError(
            503, "the replica at work on this has died; try again", code="replica_died", retry=RETRY
        )
        if not started:
            await lost.response()(scope, receive, send)
        elif streamed and not ended:
            await send({"type": "http.response.body", "body": sse_error(lost).encode(), "more_body": False})


def application(
    load: Callable[[], Mapping[str, Pipeline]],
    limits: Limits,
    keys: Sequence[str] = (),
    replicas: int = 1,
    threads: int = 1,
) -> serve.Application:
    """The server for Ray Serve: `replicas` processes of `threads` processors each."""
    made = serve.deployment(
        name=NAME,
        num_replicas=replicas,
        max_ongoing_requests=MOST_REQUESTS,
        graceful_shutdown_timeout_s=limits.grace,
        ray_actor_options={"num_cpus": threads},
    )(serve.ingress()(Replica))
    return made.bind(load, limits, list(keys), threads)


def start(app: serve.Application, host: str, port: int) -> None:
    """Run an application on the cluster that was joined, and return when it answers at host:port."""
    options: dict[str, Any] = {"host": host, "port": port}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    serve.start(http_options=options, logging_config=quiet)
    serve.run(app, name=NAME, route_prefix="/", logging_config=quiet)


def middlewares() -> list[Middleware]:
    """What Ray's proxies put around the application, where their environment has `PROXY_SETTING`."""
    return [Middleware(Proxy)]


def stop() -> None:
    """End what `start` began, after its replicas' grace."""
    serve.shutdown()


def threads_each(machines: Sequence[int], replicas: int, most: int) -> int:
    """Processors for each replica, when these machines' are shared. Raises `UserError` where there are too few."""
    for threads in range(min(most, max(machines)), 0, -1):
        if sum(machine // threads for machine in machines) >= replicas:
            return threads
    raise UserError(
        f"--replicas is {replicas}, and Ray has {sum(machines)} processors; ask for no more than that"
    )
