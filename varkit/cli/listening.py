"""What the studio and the server have in common: the models that they offer, and a socket to listen on, opened before
they start, so that its address is known and a taken port is one line.
"""

import errno
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from varkit.cli.models import DEFAULT_MODEL, opened
from varkit.errors import UserError

if TYPE_CHECKING:
    from varkit.hub.pipeline import Pipeline

LOOPBACK = ("localhost", "127.0.0.1", "::1")

WAITING = 128
"""Connections that may wait to be accepted."""


def listen(host: str, ports: Sequence[int]) -> socket.socket:
    """Listen on the first of `ports` that is free. Raises `UserError` where none is, or for an unknown host."""
    try:
        family, kind, protocol, _, _ = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host!r} is no address ({error.strerror}); try 127.0.0.1") from error
    for port in ports:
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind((host, port))
            opened.listen(WAITING)
            return opened
        except OSError as error:
            opened.close()
            if error.errno != errno.EADDRINUSE:
                reason = (error.strerror or str(error)).lower()
                raise UserError(f"cannot listen on {host} port {port}: {reason}; choose another") from error
    taken = f"port {ports[0]} is" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]} are"
    raise UserError(f"{taken} taken on {host}; choose another --port")


def address(opened: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_port(port: int | None) -> None:
    """Raise `UserError` for what is no port."""
    if port is not None and not 0 <= port <= 65535:
        raise UserError(f"--port is {port}; it must be from 1 to 65535, or 0 for any free one")


def named_models(words: Sequence[str]) -> "dict[str, Pipeline]":
    """The models by the names that visitors see: of a folder the last part, if that tells all apart.

    Without words, all bundled ones. Raises `UserError` for a model that is not there, and for one that every request
    would fail with: nothing here reads words for it.
    """
    from varkit.generators.text import TextFeaturesConfig
    from varkit.hub.pipeline import bundled

    words = words or sorted(bundled(), key=lambda name: name != DEFAULT_MODEL)
    if not words:
        raise UserError("no model comes with this installation; give one with --model FOLDER")
    short = [Path(word).name for word in words]
    names = short if len(set(short)) == len(short) else words
    models = {name: opened(word) for name, word in zip(names, words, strict=True)}
    for name, pipeline in models.items():
        if isinstance(pipeline.condition, TextFeaturesConfig):
            raise UserError(
                f"model {name!r} takes features of words, which are not computed here; draw with varkit generate "
                "--text-encoder"
            )
    return models
