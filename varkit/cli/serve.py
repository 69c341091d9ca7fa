"""`varkit serve`: pictures over HTTP."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from varkit.cli.listening import LOOPBACK, check_port
from varkit.errors import UserError

if TYPE_CHECKING:
    from varkit.serve.service import Limits

KEYS = "VARKIT_API_KEYS"
SHORTEST_KEY = 16
SECONDS_TO_ANSWER = 2
"""What connections get beyond the grace, to be told that it is over."""

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Serve:
    """Serve pictures over HTTP, by OpenAI's images convention."""

    model: tuple[str, ...] = ()
    """Bundled models, saved folders, or trainings' output folders; all bundled models by default. Clients that name
    none get the first."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs API keys."""
    port: int = 8000
    """Port to listen on; 0 takes any free one."""
    keys: Path | None = None
    """A file with one API key a line; by default they come from the environment variable VARKIT_API_KEYS, separated by
    commas."""
    batch: int = 4
    """Pictures that are drawn together. Each is the same in any company, which costs one alone the time of so many;
    1 is quickest for one client."""
    waiting: int = 64
    """Pictures that may wait; a client beyond that is asked to come back later."""
    seconds: float = 120.0
    """Time that a request may take, waiting included."""
    body_megabytes: int = 16
    """Largest body of a request."""
    megapixels: int = 16
    """Largest picture that may be uploaded, or asked for."""
    grace: float = 30.0
    """Seconds in which a stopping server finishes what it has begun."""
    ray: str | None = None
    """Serve by Ray's workers: "local" starts some here, "auto" or an address joins a cluster."""
    replicas: int = 1
    """With --ray: how many processes have the models and share the requests."""

    def __post_init__(self) -> None:
        check_port(self.port)
        if self.host not in LOOPBACK and not self._keys():
            raise UserError(
                f"--host {self.host} lets other machines in; give API keys by --keys FILE or {KEYS}, "
                "or leave --host out"
            )
        if self.replicas < 1:
            raise UserError(f"--replicas is {self.replicas}; it must be at least 1")
        if self.replicas > 1 and self.ray is None:
            raise UserError(f"--replicas {self.replicas} needs Ray; add --ray local, or leave it out")

    def run(self) -> None:
        """Serve until interrupted."""
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        if self.ray is None:
            self._serve_here()
        else:
            self._serve_on_ray(self.ray)

    def _serve_here(self) -> None:
        import uvicorn

        from varkit.cli.listening import address, listen, named_models
        from varkit.serve.app import create_app

        limits, models = self.limits(), named_models(self.model)
        with listen(self.host, [self.port]) as socket:
            config = uvicorn.Config(
                create_app(models, limits, self._keys()),
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(self.grace) + SECONDS_TO_ANSWER,
            )
            _announce(address(socket))
            uvicorn.Server(config).run(sockets=[socket])

    def _serve_on_ray(self, cluster_address: str) -> None:
        import torch

        from varkit.cli.listening import address, listen, named_models
        from varkit.cli.ray_data import cluster
        from varkit.serve.ray import PROXY_SETTING, application, start, stop, threads_each

        limits, models = self.limits(), tuple(map(movable, self.model))
        named_models(models)  # a model that is not there shows here, not on a worker
        with listen(self.host, [self.port]) as socket:  # likewise a port that is taken
            here, port = address(socket), socket.getsockname()[1]
        os.environ.update(PROXY_SETTING)
        with cluster(cluster_address) as machines, terminated() as wait:
            threads = threads_each(machines, self.replicas, torch.get_num_threads())
            app = application(partial(named_models, models), limits, self._keys(), self.replicas, threads)
            try:
                start(app, self.host, port)
                _announce(here)
                wait()
            finally:
                stop()

    def limits(self) -> "Limits":
        """What the server takes on."""
        from varkit.serve.service import Limits

        return Limits(
            self.batch,
            self.waiting,
            self.seconds,
            self.body_megabytes * MEGABYTE,
            self.megapixels * MEGABYTE,
            self.grace,
        )

    def _keys(self) -> list[str]:
        if self.keys is None:
            return read_keys(os.environ.get(KEYS, "").replace(",", "\n"), KEYS)
        found = read_keys(self.keys.read_text(encoding="utf-8"), repr(str(self.keys)))
        if not found:
            raise UserError(f"{str(self.keys)!r} has no API key; write one a line")
        return found


def read_keys(text: str, place: str) -> list[str]:
    """One key a line, blank lines aside. Raises `UserError`, without the key, for one that is easily guessed."""
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST_KEY or not key.isascii() or any(c.isspace() for c in key):
            raise UserError(
                f"API key {number} in {place} is not {SHORTEST_KEY} or more ASCII characters without spaces; make one "
                'with python -c "import secrets; print(secrets.token_urlsafe())"'
            )
    return keys


def _announce(where: str) -> None:
    print(f"varkit serve is at {where}/v1 (Ctrl-C ends it)", flush=True)


def movable(model: str) -> str:
    """A model's name, or its folder wherever a worker starts."""
    return str(Path(model).resolve()) if Path(model).exists() else model


@contextmanager
def terminated() -> Iterator[Callable[[], object]]:
    """What waits until the process is told to end, by SIGTERM or Ctrl-C."""
    told = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield told.wait
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
