"""Answers: all pictures at once, or as server-sent events; either ends when the client goes away."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Literal, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from PIL import Image
from starlette.types import Receive, Scope, Send

from varkit.serve.batcher import Drawn
from varkit.serve.errors import CLIENT_LEFT, ApiError, as_api_error
from varkit.serve.pictures import encoded
from varkit.serve.schema import Asked, Format, Picture, PictureEvent, Pictures, Usage
from varkit.serve.service import Order, Ticket

Kind = Literal["image_generation", "image_edit"]
T = TypeVar("T")


@dataclass(frozen=True)
class Wrapping:
    """How pictures are sent. compression: quality of the file, None for the usual one."""

    form: Format
    compression: int | None
    as_url: bool

    @classmethod
    def of(cls, asked: Asked) -> "Wrapping":
        """What was asked for."""
        return cls(asked.output_format or "png", asked.output_compression, asked.response_format == "url")

    async def text(self, order: Order, image: Image.Image) -> str:
        """The picture's file in base64, made beside the event loop."""

        def make() -> str:
            return encoded(order.finish(image), self.form, self.compression)

        return await asyncio.to_thread(make)

    def picture(self, text: str) -> Picture:
        """As an item of an answer."""
        return Picture(url=f"data:image/{self.form};base64,{text}") if self.as_url else Picture(b64_json=text)


async def all_at_once(ticket: Ticket, wrapping: Wrapping, request: Request) -> Response | Pictures:
    """The pictures of an order, in order. The order is cancelled when the client leaves."""
    try:
        return await _unless_gone(_collected(ticket, wrapping), request.receive)
    except ClientLeft:
        return Response(status_code=CLIENT_LEFT)
    finally:
        ticket.cancel()


async def _collected(ticket: Ticket, wrapping: Wrapping) -> Pictures:
    texts, tokens, order = {}, 0, ticket.order
    async for event in ticket.events():
        if isinstance(event, Drawn):
            texts[event.sample] = await wrapping.text(order, event.image)
            tokens += event.tokens
    return Pictures(
        created=int(time.time()),
        data=[wrapping.picture(text) for _, text in sorted(texts.items())],
        output_format=wrapping.form,
        size=order.size,
        seed=order.seed,
        usage=Usage.of(tokens),
    )


class EventStream(StreamingResponse):
    """The pictures of an order as they come."""

    def __init__(self, ticket: Ticket, wrapping: Wrapping, kind: Kind) -> None:
        super().__init__(_events(ticket, wrapping, kind), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-store"
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until all is sent or the client leaves."""
        try:
            with contextlib.suppress(ClientLeft, OSError):
                await _unless_gone(self.stream_response(send), receive)
        finally:
            self.ticket.cancel()


async def _events(ticket: Ticket, wrapping: Wrapping, kind: Kind) -> AsyncIterator[str]:
    """Server-sent events. What fails after the first byte cannot have a status any more, so it is an event."""
    order, shown = ticket.order, dict.fromkeys(range(ticket.order.n), 0)
    try:
        async for event in ticket.events():
            finished = isinstance(event, Drawn)
            told = PictureEvent(
                type=f"{kind}.{'completed' if finished else 'partial_image'}",
                b64_json=await wrapping.text(order, event.image),
                created_at=int(time.time()),
                size=order.size,
                output_format=wrapping.form,
                seed=order.seed,
                index=event.sample,
                partial_image_index=None if finished else shown[event.sample],
                usage=Usage.of(event.tokens) if isinstance(event, Drawn) else None,
            )
            shown[event.sample] += 1
            yield _sse(told.type, told.model_dump_json(exclude_none=True))
    except Exception as error:
        yield sse_error(as_api_error(error))


def sse_error(error: ApiError) -> str:
    """An error as an event, which OpenAI's client raises."""
    return _sse("error", json.dumps(error.body.model_dump()))


def _sse(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


class ClientLeft(Exception):
    """Nobody would get the answer."""


async def _unless_gone(work: Awaitable[T], receive: Receive) -> T:
    """The result of `work`, which is given up when the client leaves. Raises `ClientLeft`."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
