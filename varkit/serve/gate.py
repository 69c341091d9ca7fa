"""The gate before the application: API keys, and the body as a whole, no larger and no slower than allowed."""

import asyncio
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from varkit.serve.errors import ApiError

OPEN_TO_ALL = ("/healthz",)
SECONDS_FOR_BODY = 30.0


class Gate:
    """ASGI middleware. `keys`: who may enter; without any, requests must be addressed to this machine by its own name,
    so that no web page can reach the server through somebody's browser.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], most_bytes: int) -> None:
        self.app, self.most_bytes = app, most_bytes
        self.keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if scope["path"] not in OPEN_TO_ALL:
                self._check_caller(headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self.app(scope, _replayed(body, receive), send)

    def _check_caller(self, headers: Headers) -> None:
        if not self.keys:
            origin = headers.get("origin")
            hosts = [f"//{headers.get('host', '')}", *([] if origin is None else [origin])]
            if not all(map(_is_here, hosts)):
                raise ApiError(403, "this server has no API keys, so it answers only requests to localhost")
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))
        # All are compared, and digests of one length, so that time tells nothing about them.
        matches = [hmac.compare_digest(given, known) for known in self.keys]
        if scheme.lower() != "bearer" or not any(matches):
            said = "wrong" if key else "missing"
            raise ApiError(
                401,
                f"the API key is {said}; send one as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None where the client left before its end."""
        declared = headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > self.most_bytes:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(SECONDS_FOR_BODY):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.most_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {SECONDS_FOR_BODY:g} s", retry=1) from None

    def _too_large(self) -> ApiError:
        # What is left of the body is not read, so the connection is of no more use.
        return ApiError(
            413,
            f"the body is larger than {self.most_bytes} bytes; send a smaller picture",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_here(address: str) -> bool:
    """Whether an address, //HOST:PORT, names this machine itself."""
    try:
        host = urlsplit(address).hostname
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` for an application that comes after the body was read."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay
