"""The batcher alone, step by step: equal pictures in any company, joining, fairness, failures, cancellation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import models, serve_models
from varkit.decode.state import State
from varkit.errors import UserError
from varkit.hub.pipeline import Pipeline
from varkit.serve.batcher import Batcher, Busy, Drawn, Event, Failed, Job, Shown, Stopping, Watch

SIZE = 4
STEPS = len(models.SCHEDULE)


PIPELINES = {"scales": serve_models.classes(), "raster": serve_models.raster()}


@dataclass
class Client:
    """A job, and what was told about it."""

    batcher: Batcher
    pipeline: Pipeline
    seed: int = 0
    n: int = 1
    label: int = 1
    key: str = "any"
    shown: frozenset[int] = frozenset()
    start: Callable[[int], State] | None = None
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        start = self.start or (lambda i: self.pipeline.start([self.label], self.seed, [i]))
        self.job = Job(self.key, self.pipeline.model, start, self.n, self.events.append, self.shown)
        self.batcher.submit(self.job)

    @property
    def pictures(self) -> dict[int, bytes]:
        """Finished pictures by sample."""
        return {e.sample: e.image.tobytes() for e in self.events if isinstance(e, Drawn)}

    @property
    def errors(self) -> list[Exception]:
        """Why it failed: none or one."""
        return [e.error for e in self.events if isinstance(e, Failed)]


def finish(batcher: Batcher, limit: int = 400) -> int:
    """Tick to the end; the number of ticks."""
    for ticks in range(limit):
        if not batcher.tick():
            return ticks
    raise AssertionError("the batcher does not come to an end")


def alone(pipeline: Pipeline, seed: int, label: int, sample: int, size: int = SIZE) -> bytes:
    """A sample's picture drawn by a batcher that has nothing else to do."""
    client = Client(Batcher(size, 64), pipeline, seed, sample + 1, label)
    finish(client.batcher)
    return client.pictures[sample]


arrivals = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(1, 5), st.integers(0, 2)), max_size=7
)
"""Clients: ticks since the one before, seed, n, label."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=arrivals)
@pytest.mark.parametrize("kind", list(PIPELINES))
def test_a_picture_does_not_depend_on_its_company(kind: str, arrivals):
    pipeline, batcher, clients = PIPELINES[kind], Batcher(SIZE, 64), []
    for ticks, seed, n, label in arrivals:
        for _ in range(ticks):
            batcher.tick()
        clients.append(Client(batcher, pipeline, seed, n, label))
    finish(batcher)
    for client in clients:
        assert sorted(client.pictures) == list(range(client.n))
        for sample, picture in client.pictures.items():
            assert picture == _alone(kind, client.seed, client.label, sample)
    assert batcher.open_jobs == batcher.active == 0 and not batcher.waiting


KNOWN: dict[tuple, bytes] = {}


def _alone(kind: str, *what: int) -> bytes:
    if (kind, *what) not in KNOWN:
        KNOWN[kind, *what] = alone(PIPELINES[kind], *what)
    return KNOWN[kind, *what]


@pytest.mark.parametrize("kind", list(PIPELINES))
def test_with_one_row_it_draws_what_generate_draws(kind: str):
    pipeline = PIPELINES[kind]
    made = [alone(pipeline, 5, 2, sample, size=1) for sample in range(3)]
    assert made == [image.tobytes() for image in pipeline.generate([2], n=3, seed=5, batch_size=1)]


def test_later_clients_join_early_batches_and_share_the_late_steps():
    batcher = Batcher(SIZE, 64)
    first = Client(batcher, PIPELINES["scales"])
    batcher.tick()  # one position of fourteen is known
    second = Client(batcher, PIPELINES["scales"], seed=1, n=2)
    assert finish(batcher) == 1 + 2  # the step that was missed, then two together
    assert len(first.pictures) == 1 and len(second.pictures) == 2


def test_batches_that_are_almost_done_are_not_held_up():
    batcher, pipeline = Batcher(SIZE, 64), PIPELINES["raster"]
    first = Client(batcher, pipeline)
    for _ in range(9):
        batcher.tick()
    Client(batcher, pipeline, seed=1)
    for _ in range(7):
        assert not first.pictures
        batcher.tick()
    assert first.pictures


def test_other_settings_wait_for_a_batch_of_their_own_in_order_of_arrival():
    batcher, order = Batcher(SIZE, 64), []
    for name in ("a", "b", "a", "c"):
        client = Client(batcher, PIPELINES["scales"], key=name)
        client.job.tell = lambda event, name=name: order.append(name)
    assert finish(batcher) == 3 * STEPS
    assert order == ["a", "a", "b", "c"]


def test_shown_steps_come_once_and_before_the_finished_picture():
    client = Client(Batcher(SIZE, 64), PIPELINES["scales"], n=2, shown=frozenset({1, 2}))
    finish(client.batcher)
    kinds = [[type(e) for e in client.events if e.sample == i] for i in range(2)]  # type: ignore[union-attr]
    assert kinds == [[Shown, Shown, Drawn]] * 2


def test_a_job_that_cannot_start_fails_alone():
    batcher = Batcher(SIZE, 64)

    def start(sample: int) -> State:
        raise UserError("no such word")

    wrong = Client(batcher, PIPELINES["scales"], n=3, start=start)
    right = Client(batcher, PIPELINES["scales"])
    assert finish(batcher) == STEPS
    assert [str(e) for e in wrong.errors] == ["no such word"] and len(wrong.events) == 1
    assert right.pictures == {0: _alone("scales", 0, 1, 0)}


def test_a_step_that_fails_fails_only_the_job_to_blame():
    def poison(step, values, state):
        if any(stream.seed == 666 for stream in state.draws.streams):
            raise RuntimeError("poison")
        return values

    plain = PIPELINES["scales"]
    poisoned, batcher = plain.using(override=poison), Batcher(SIZE, 64)
    clients = [Client(batcher, poisoned, seed, shown=frozenset({1})) for seed in (1, 666, 2)]
    finish(batcher)
    assert [len(client.errors) for client in clients] == [0, 1, 0]
    for client in (clients[0], clients[2]):
        assert client.pictures == {0: _alone("scales", client.seed, 1, 0)}
        assert [type(e) for e in client.events] == [Shown, Drawn]


def test_cancelling_frees_the_rows_before_the_next_step():
    rows: list[int] = []
    watch = Watch()
    watch.stepped = lambda used, size, seconds: rows.append(used)  # type: ignore[method-assign]
    batcher = Batcher(SIZE, 64, watch)
    stays, leaves = Client(batcher, PIPELINES["scales"]), Client(batcher, PIPELINES["scales"], n=5)
    batcher.tick()
    batcher.cancel(leaves.job)
    assert not batcher.waiting and batcher.active == 1
    joins = Client(batcher, PIPELINES["scales"], seed=3, n=3)
    finish(batcher)
    assert rows == [4, 3, 4, 4]
    assert stays.pictures == {0: _alone("scales", 0, 1, 0)} and len(joins.pictures) == 3 and not leaves.events


def test_all_may_leave_at_any_time():
    batcher = Batcher(SIZE, 64)
    for ticks in range(STEPS + 1):
        client = Client(batcher, PIPELINES["scales"], n=6)
        for _ in range(ticks):
            batcher.tick()
        batcher.cancel(client.job)
        assert finish(batcher) == 0 and batcher.open_jobs == 0


def test_a_full_queue_says_when_to_come_back():
    batcher = Batcher(SIZE, 6)
    Client(batcher, PIPELINES["scales"], n=6)
    with pytest.raises(Busy) as full:
        Client(batcher, PIPELINES["scales"])
    assert 1 <= full.value.seconds <= 60
    batcher.tick()  # four of them have begun
    Client(batcher, PIPELINES["scales"], n=4)
    batcher.close()
    with pytest.raises(Stopping):
        Client(batcher, PIPELINES["scales"])
    finish(batcher)


def test_everybody_is_told_when_the_batcher_gives_up():
    batcher = Batcher(SIZE, 64)
    clients = [Client(batcher, PIPELINES["scales"], n=3) for _ in range(3)]
    batcher.tick()
    batcher.fail_all(Stopping())
    assert [[type(e) for e in client.errors] for client in clients] == [[Stopping]] * 3
    assert finish(batcher) == 0
