"""A socket to listen on, opened before the server starts: so its address is known, and a taken port is one line."""

import errno
import socket
from collections.abc import Sequence

from varkit.errors import UserError

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
