"""From what a client asks to a job for the batcher, and from its events back to pictures.

A batcher works in a thread of its own; its events come to the event loop through a queue for each request.
"""

import asyncio
import contextlib
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from PIL import Image

from varkit.decode.state import State
from varkit.edit.inpaint import paste, start_inpaint
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.text import TextFeaturesConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.serve.batcher import Batcher, Drawn, Event, Failed, Job, Shown, Stopping
from varkit.serve.errors import ApiError
from varkit.serve.metrics import Metrics
from varkit.serve.pictures import read_upload
from varkit.serve.schema import MOST_PICTURES, OWN_SIZE, Asked, Edit, ModelCard

DRAIN_POLL = 0.05
IDLE = 1.0
LOG = logging.getLogger("varkit.serve")


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    batch: rows of every evaluation. waiting: pictures in the queue. seconds: a request's time, waiting included. body:
    bytes. pixels: of a picture uploaded or asked for. grace: seconds that a stopping server finishes its work in.
    """

    batch: int = 4
    waiting: int = 64
    seconds: float = 120.0
    body: int = 16 << 20
    pixels: int = 16 << 20
    grace: float = 30.0

    def __post_init__(self) -> None:
        least = {"batch": 1, "waiting": MOST_PICTURES, "body": 1024, "pixels": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {value}")
        if not (self.seconds > 0 and self.grace >= 0):
            raise UserError(f"a time limit of {self.seconds} s, or a grace of {self.grace} s, leaves no time")


@dataclass(frozen=True)
class Order:
    """A checked request: `n` pictures of one prompt. finish(image) makes of what was drawn what is sent."""

    key: tuple[object, ...]
    pipeline: Pipeline
    start: Callable[[int], State]
    n: int
    seed: int
    size: str
    shown: frozenset[int]
    finish: Callable[[Image.Image], Image.Image]


class Service:
    """Models, and a thread in which a batcher draws with them."""

    def __init__(self, models: Mapping[str, Pipeline], limits: Limits, metrics: Metrics) -> None:
        self.models = {name: _with_steady_prompts(model) for name, model in models.items()}
        self.limits = limits
        self.batcher = Batcher(limits.batch, limits.waiting, metrics)
        metrics.follow(self.batcher)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="varkit-batcher", daemon=True)
        self._threads = torch.get_num_threads()

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def status(self) -> Literal["ok", "stopping", "broken"]:
        """Whether somebody draws, and takes more work."""
        if not self._thread.is_alive():
            return "broken"
        return "stopping" if self.batcher.closed else "ok"

    async def stop(self) -> None:
        """Take no more jobs, finish those that can be finished within the grace, and let the others fail."""
        self.batcher.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limits.grace):
                while self.batcher.open_jobs:
                    await asyncio.sleep(DRAIN_POLL)
        self._stopped.set()
        self.batcher.close()  # wakes the thread
        await asyncio.to_thread(self._thread.join, self.limits.grace)

    def _work(self) -> None:
        torch.set_num_threads(self._threads)  # which a new thread does not inherit on every platform
        while not self._stopped.is_set():
            try:
                if not self.batcher.tick():
                    self.batcher.wait(IDLE)
            except Exception as error:  # the batcher itself is at fault; it must not end with that
                LOG.exception("the batcher failed")
                self.batcher.fail_all(error)
        self.batcher.fail_all(Stopping())

    def cards(self, created: int) -> list[ModelCard]:
        """What is told about the models."""
        return [
            ModelCard(
                id=name,
                created=created,
                size=_named(model.size),
                prompts="classes" if isinstance(model.condition, ClassConfig) else "captions",
                edits=model.schedule is not None,
            )
            for name, model in self.models.items()
        ]

    def generation(self, asked: Asked, prompt: str) -> Order:
        """An order for new pictures. Raises `ApiError` or `UserError`."""
        name, pipeline = self._pipeline(asked.model, asked.size)
        settings = _settings(pipeline, asked)
        _check_prompts(pipeline, prompt, asked.negative_prompt)
        seed = _seed(asked)

        def start(sample: int) -> State:
            return pipeline.start([prompt], seed, [sample], settings, asked.negative_prompt)

        key = ("generation", name, pipeline.size, settings)
        return self._order(asked, key, pipeline, start, seed, pipeline.size, lambda image: image)

    def edit(self, asked: Edit, image: bytes, mask: bytes | None) -> Order:
        """An order for versions of a picture. Raises `ApiError` or `UserError`."""
        name, pipeline = self._pipeline(asked.model, None)
        if pipeline.schedule is None:
            able = [card.id for card in self.cards(0) if card.edits]
            raise ApiError(
                400, f"model {name!r} cannot edit; those that can: {', '.join(able) or 'none'}", "model"
            )
        picture, redraw = read_upload(image, mask, self.limits.pixels)
        own = (picture.height, picture.width)
        if asked.size not in (None, OWN_SIZE, _named(own)):
            raise ApiError(
                400, f"size {asked.size} differs from the picture's, {_named(own)}, which edits keep", "size"
            )
        settings = _settings(pipeline, asked)
        if asked.prompt is None and asked.negative_prompt is not None:
            raise ApiError(400, "a negative prompt needs a prompt; add one", "negative_prompt")
        if asked.prompt is not None:
            _check_prompts(pipeline, asked.prompt, asked.negative_prompt)
        seed, chosen = _seed(asked), {"guidance": settings.guidance, "ramp": settings.ramp}

        def start(sample: int) -> State:
            return start_inpaint(
                pipeline, picture, redraw, asked.prompt, 1, seed, sample, asked.negative_prompt, **chosen
            )

        key = ("edit", name, asked.prompt is None, settings)
        finish = partial(_pasted, original=picture, redraw=redraw)
        return self._order(asked, key, pipeline, start, seed, own, finish)

    def _order(
        self,
        asked: Asked,
        key: tuple[object, ...],
        pipeline: Pipeline,
        start: Callable[[int], State],
        seed: int,
        size: tuple[int, int],
        finish: Callable[[Image.Image], Image.Image],
    ) -> Order:
        steps = getattr(pipeline.model.plan, "evaluations", None)
        shown = shown_steps(steps, asked.partial_images or 0) if asked.stream else frozenset[int]()
        return Order(key, pipeline, start, asked.n or 1, seed, _named(size), shown, finish)

    def _pipeline(self, name: str | None, size: str | None) -> tuple[str, Pipeline]:
        name = next(iter(self.models)) if name is None else name
        if name not in self.models:
            raise ApiError(
                404,
                f"there is no model {name[:60]!r}; this server has {', '.join(self.models)}",
                "model",
                "model_not_found",
            )
        pipeline = self.models[name]
        if size in (None, OWN_SIZE):
            return name, pipeline
        width, height = map(int, str(size).split("x"))
        if width * height > self.limits.pixels:
            raise ApiError(400, f"size {size} is above this server's {self.limits.pixels} pixels", "size")
        try:
            return name, pipeline.sized((height, width))
        except UserError as error:
            raise ApiError(
                400, f"model {name!r} cannot make {size}; its own size is {_named(pipeline.size)}", "size"
            ) from error

    def submit(self, order: Order) -> "Ticket":
        """Let an order wait for its turn. Raises `Busy` or `Stopping`."""
        return Ticket(self.batcher, order, self.limits.seconds)


class Ticket:
    """An order that waits or is drawn; whoever holds it must `cancel` it in the end."""

    def __init__(self, batcher: Batcher, order: Order, seconds: float) -> None:
        self.batcher, self.order, self.seconds = batcher, order, seconds
        self.deadline = asyncio.get_running_loop().time() + seconds
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.job = Job(order.key, order.pipeline.model, order.start, order.n, self._hear, order.shown)
        batcher.submit(self.job)

    def cancel(self) -> None:
        """Nobody waits any more; without effect on what is finished."""
        self.batcher.cancel(self.job)

    async def events(self) -> AsyncIterator[Shown | Drawn]:
        """What is shown and drawn, until all pictures are there. Raises what made the job fail, or that it was late."""
        left = self.order.n
        while left:
            try:
                async with asyncio.timeout_at(self.deadline):
                    event = await self._events.get()
            except TimeoutError:
                raise ApiError(
                    504,
                    f"the pictures took longer than {self.seconds:g} s, this server's limit; ask for fewer",
                    code="time_limit",
                ) from None
            if isinstance(event, Failed):
                raise event.error
            left -= isinstance(event, Drawn)
            yield event

    def _hear(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


def shown_steps(steps: int | None, pictures: int) -> frozenset[int]:
    """After which of a run's steps its picture is shown: so many, evenly, or after each where there are not enough.

    The last step gives the finished picture, so it is not among them. Empty where steps are not known beforehand.
    """
    if steps is None or not pictures:
        return frozenset()
    pictures = min(pictures, steps - 1)
    return frozenset(round((i + 1) * steps / (pictures + 1)) for i in range(pictures))


def _with_steady_prompts(pipeline: Pipeline) -> Pipeline:
    """Features of words padded to the longest prompt there may be, so that states of any prompts have one shape."""
    condition = pipeline.condition
    if isinstance(condition, TextFeaturesConfig) and pipeline.how.text is not None:
        return pipeline.using(tokens=condition.length)
    return pipeline


def _settings(pipeline: Pipeline, asked: Asked) -> Settings:
    if asked.guidance_scale is None:
        return pipeline.settings
    return replace(pipeline.settings, guidance=asked.guidance_scale)


def _check_prompts(pipeline: Pipeline, prompt: str, negative: str | None) -> None:
    for name, text in (("prompt", prompt), ("negative_prompt", negative)):
        if text is not None:
            try:
                pipeline.reading([text])
            except UserError as error:
                raise ApiError(400, str(error), name, "invalid_value") from error


def _seed(asked: Asked) -> int:
    return secrets.randbelow(2**32) if asked.seed is None else asked.seed


def _named(size: tuple[int, int]) -> str:
    """(height, width) -> WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"


def _pasted(image: Image.Image, original: Image.Image, redraw: np.ndarray) -> Image.Image:
    return paste([image], original, redraw)[0]
