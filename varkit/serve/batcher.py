"""Pictures of many clients drawn together: merged into batches between two steps, and equal to those drawn alone.

The trick: every evaluation of the network has the same number of rows, and all rows stand at the same step; rows that
nobody asked for repeat one that somebody did. So sums round alike whoever shares the batch. Everything else is done for
each sample by itself, at batch 1: its condition when it starts, its pictures when it shows them.

One batch runs, and one may catch up with it: new rows take the steps that the running batch has behind it, then join.
Legend: B rows of a batch, of which some are padding.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from PIL import Image

from varkit.decode.loop import Model, advance
from varkit.decode.state import State
from varkit.errors import UserError
from varkit.pictures import to_pil

LATEST_JOIN = 0.5
"""A batch waits for new rows to catch up while at most this part of its pictures is known."""

LONGEST_RETRY = 60
LOG = logging.getLogger("varkit.serve")


@dataclass(frozen=True)
class Shown:
    """A sample's picture so far, after a step that was to be shown."""

    sample: int
    image: Image.Image


@dataclass(frozen=True)
class Drawn:
    """A sample's finished picture, and the positions that were committed for it."""

    sample: int
    image: Image.Image
    tokens: int


@dataclass(frozen=True)
class Failed:
    """Nothing more comes of this job. A `UserError` is the client's own fault."""

    error: Exception


Event = Shown | Drawn | Failed


class Busy(Exception):
    """The queue is full; there should be room after `seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class Stopping(Exception):
    """The server takes no more work."""


@dataclass(eq=False)
class Job:
    """`n` pictures that one client waits for.

    key: jobs with equal ones may share a batch, so it holds the model, its size and the settings. start(i) is a state
    (batch 1) of sample i at its first step. shown: numbers of steps after which the picture so far is told. tell: hears
    the events, in the batcher's thread; it must be quick.
    """

    key: Hashable
    model: Model
    start: Callable[[int], State]
    n: int
    tell: Callable[[Event], None]
    shown: frozenset[int] = frozenset()
    drawn: int = 0
    ended: bool = False


@dataclass(eq=False)
class Row:
    """One sample of a job; it may be drawn twice, when a batch that it was in has failed, but shows each step once."""

    job: Job
    sample: int
    told: int = 0


class Watch:
    """Hears how the work goes; metrics override it."""

    def stepped(self, rows: int, size: int, seconds: float) -> None:
        """A step with `rows` of `size` in use has taken so long."""

    def ended(self, outcome: str, samples: int) -> None:
        """So many samples are "drawn", "failed" or "cancelled"."""


class Batch:
    """Rows of one key, all at the same step, in a state of a fixed size; None is padding.

    A job may be cancelled at any time, by another thread: whoever reads `live` twice may see less the second time.
    """

    def __init__(self, rows: Sequence[Row], states: Sequence[State], size: int, alone: bool = False) -> None:
        self.model, self.key = rows[0].job.model, rows[0].job.key
        self.size, self.steps, self.alone = size, 0, alone
        self._fill(rows, states)

    def _fill(self, rows: Sequence[Row], states: Sequence[State]) -> None:
        """Take the states' rows, one after the other, and pad."""
        assert 0 < len(rows) <= self.size
        joined = State.concat(states) if len(states) > 1 else states[0]
        self.rows: list[Row | None] = [*rows, *[None] * (self.size - len(rows))]
        self.state = joined.select([i if i < len(rows) else 0 for i in range(self.size)])

    @property
    def live(self) -> list[tuple[int, Row]]:
        """Rows that somebody waits for, with their places."""
        return [(i, row) for i, row in enumerate(self.rows) if row is not None and not row.job.ended]

    @property
    def early(self) -> bool:
        """Whether new rows may still catch up."""
        return not self.alone and float(self.state.canvas.known[0].float().mean()) <= LATEST_JOIN

    def join(self, other: "Batch") -> None:
        """Take over the rows of another batch that stands at the same step."""
        assert self.steps == other.steps and self.key == other.key
        self._merge([(batch.state, batch.live) for batch in (self, other)])

    def drop(self, places: Iterable[int]) -> None:
        """Finished rows give way to padding, so that those that go on have a full batch."""
        gone = set(places)
        self._merge([(self.state, [(i, row) for i, row in self.live if i not in gone])])

    def _merge(self, parts: Sequence[tuple[State, list[tuple[int, Row]]]]) -> None:
        parts = [(state, live) for state, live in parts if live]
        if not parts:
            self.rows = [None] * self.size
            return
        rows = [row for _, live in parts for _, row in live]
        self._fill(rows, [state.select([i for i, _ in live]) for state, live in parts])


class Batcher:
    """Jobs of many clients to batches of `size` rows. At most `limit` samples wait.

    `submit`, `cancel` and `close` may be called from any thread; `tick` and `fail_all` belong to one.
    """

    def __init__(self, size: int, limit: int, watch: Watch | None = None) -> None:
        self.size, self.limit, self.watch = size, limit, watch or Watch()
        self.waiting: deque[Row] = deque()
        self.suspects: deque[list[Row]] = deque()
        self.running: Batch | None = None
        self.joining: Batch | None = None
        self.closed = False
        self._jobs: set[Job] = set()
        self._changed = threading.Condition(threading.RLock())
        self._seconds_since_drawn, self._seconds_each = 0.0, 0.0

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn. Raises `Busy` or `Stopping`."""
        with self._changed:
            if self.closed:
                raise Stopping
            if len(self.waiting) + job.n > self.limit:
                wait = math.ceil(self._seconds_each * (len(self.waiting) + self.active))
                raise Busy(min(max(wait, 1), LONGEST_RETRY))
            self._jobs.add(job)
            self.waiting.extend(Row(job, i) for i in range(job.n))
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more: its rows are free before the next step."""
        self._end(job, "cancelled")

    def close(self) -> None:
        """Take no more jobs."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def fail_all(self, error: Exception) -> None:
        """End every job with an error."""
        with self._changed:
            jobs = list(self._jobs)
        for job in jobs:
            self._fail(job, error)

    def wait(self, seconds: float) -> None:
        """Sleep until there may be something to do."""
        with self._changed:
            if not self.waiting:
                self._changed.wait(seconds)

    @property
    def active(self) -> int:
        """Samples that are being drawn."""
        return sum(len(b.live) for b in (self.running, self.joining) if b is not None)

    @property
    def open_jobs(self) -> int:
        """Jobs that somebody waits for."""
        return len(self._jobs)

    def tick(self) -> bool:
        """Take one step with one batch; False where nothing is to be done."""
        self._arrange()
        batch = self.joining or self.running
        if batch is None:
            return False
        started, rows = perf_counter(), len(batch.live)
        try:
            advance(batch.model, batch.state)
            batch.steps += 1
        except Exception as error:
            self._suspect(batch, error)
            return True
        drawn = self._tell(batch)
        seconds = perf_counter() - started
        self.watch.stepped(rows, self.size, seconds)
        self._pace(seconds, drawn)
        return True

    def _pace(self, seconds: float, drawn: int) -> None:
        """Keep a running mean of the time a picture takes, for telling clients when to come back."""
        self._seconds_since_drawn += seconds
        if drawn:
            each = self._seconds_since_drawn / drawn
            self._seconds_each = (self._seconds_each + each) / 2 if self._seconds_each else each
            self._seconds_since_drawn = 0.0

    def _arrange(self) -> None:
        """Decide which rows are in which batch, now that a step is done."""
        if self.running is not None and not self.running.live:
            self.running = None
        if self.joining is not None and not self.joining.live:
            self.joining = None
        if self.running is None:
            self.running, self.joining = self.joining, None
        if self.running is None:
            self.running = self._next()
        running, joining = self.running, self.joining
        if running is not None and joining is None and running.early:
            free = self.size - len(running.live)
            joining = self.joining = self._started(self._take(free, running.key)) if free else None
        if running is not None and joining is not None and joining.steps == running.steps:
            running.join(joining)
            self.joining = None

    def _next(self) -> Batch | None:
        """A new batch: of one job whose earlier batch has failed, or of those that waited longest."""
        while self.suspects:
            if batch := self._started(self.suspects.popleft(), alone=True):
                return batch
        while rows := self._take(self.size):
            if batch := self._started(rows):
                return batch
        return None

    def _take(self, most: int, key: Hashable | None = None) -> list[Row]:
        """The first waiting rows of a key, by default of the one that waited longest."""
        with self._changed:
            if key is None and self.waiting:
                key = self.waiting[0].job.key
            taken = [row for row in self.waiting if row.job.key == key][:most]
            chosen = set(map(id, taken))
            self.waiting = deque(row for row in self.waiting if id(row) not in chosen)
            return taken

    def _started(self, rows: Sequence[Row], alone: bool = False) -> Batch | None:
        """A batch of rows at their first step; jobs that cannot start fail, and the others go on without them."""
        states: dict[Row, State] = {}
        for row in rows:
            try:
                if not row.job.ended:
                    states[row] = row.job.start(row.sample)
            except Exception as error:
                self._fail(row.job, error)
        able = [row for row in states if not row.job.ended]
        if not able:
            return None
        return Batch(able, [states[row] for row in able], self.size, alone)

    def _suspect(self, batch: Batch, error: Exception) -> None:
        """A step has failed. Draws have no memory, so every job of the batch starts again, by itself; the job that
        fails then is the one to blame.
        """
        if batch is self.running:
            self.running = None
        else:
            self.joining = None
        jobs: dict[Job, list[Row]] = {}
        for _, row in batch.live:
            jobs.setdefault(row.job, []).append(row)
        if len(jobs) == 1:
            self._fail(next(iter(jobs)), error)
        else:
            LOG.warning("a step of %d jobs failed (%s); each goes on alone", len(jobs), type(error).__name__)
            self.suspects.extend(jobs.values())

    @torch.no_grad()
    def _tell(self, batch: Batch) -> int:
        """Hand out what the step has finished, and what is to be shown of it; returns how many are finished."""
        state, done = batch.state, []
        for i, row in batch.live:
            job, finished = row.job, bool(state.finished[i])
            show = batch.steps in job.shown and batch.steps > row.told
            if not (finished or show):
                continue
            try:
                image = to_pil(state.canvas.select([i]).preview())[0]
            except Exception as error:
                self._fail(job, error)
                continue
            row.told = batch.steps
            if finished:
                done.append(i)
                self.watch.ended("drawn", 1)
                job.drawn += 1
                if job.drawn == job.n:
                    self._end(job, "drawn")
                job.tell(Drawn(row.sample, image, int(state.tokens[i])))
            else:
                job.tell(Shown(row.sample, image))
        if done:
            batch.drop(done)
        return len(done)

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, UserError | Stopping):
            LOG.error("a job failed", exc_info=error)
        if self._end(job, "failed"):
            job.tell(Failed(error))

    def _end(self, job: Job, outcome: str) -> bool:
        """Forget a job: its rows in a batch become padding. False where it had ended already."""
        with self._changed:
            if job.ended:
                return False
            job.ended = True
            self._jobs.discard(job)
            self.waiting = deque(row for row in self.waiting if row.job is not job)
            if job.drawn < job.n:
                self.watch.ended(outcome, job.n - job.drawn)
            return True
