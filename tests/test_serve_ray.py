"""The server on a local Ray: replicas that share the work, and one that is killed at it."""

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.serving import Server, server
from varkit.errors import UserError

pytest.importorskip("ray")

from varkit.serve.ray import Proxy, threads_each  # noqa: E402

CLIENTS, REQUESTS = 8, 48


@pytest.mark.parametrize(
    ("machines", "replicas", "most", "want"),
    [([2], 2, 2, 1), ([2], 1, 2, 2), ([8, 8], 3, 4, 4), ([4, 2], 3, 8, 2)],
)
def test_replicas_share_the_processors(machines, replicas, most, want):
    assert threads_each(machines, replicas, most) == want


def test_more_replicas_than_processors_are_refused():
    with pytest.raises(UserError, match="--replicas is 3"):
        threads_each([2], 3, 2)


def answered(*messages: dict, fails: bool = False) -> list[dict]:
    """What a client hears through the proxy from an application that sends these messages and ends."""

    async def app(scope, receive, send):
        for message in messages:
            await send(message)
        if fails:
            raise RuntimeError("the actor died")

    heard: list[dict] = []

    async def send(message):
        heard.append(dict(message))

    asyncio.run(Proxy(app)({"type": "http", "headers": []}, None, send))  # type: ignore[arg-type]
    return heard


def start(kind: str) -> dict:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]}


@pytest.mark.parametrize("fails", [False, True])
def test_the_silence_of_a_dead_replica_becomes_an_error_that_may_be_sent_again(fails: bool):
    first, body = answered(fails=fails)
    assert first["status"] == 503 and (b"retry-after", b"1") in first["headers"]
    assert b"replica_died" in body["body"]
    part = {"type": "http.response.body", "body": b"event", "more_body": True}
    *_, last = answered(start("text/event-stream; charset=utf-8"), part, fails=fails)
    assert last["body"].startswith(b"event: error\n") and not last["more_body"]
    whole = [start("application/json"), part | {"more_body": False}]
    assert answered(*whole) == whole


def replicas_of(running: Server) -> list[int]:
    """Process ids of a server's replicas, found among its descendants."""
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and "ServeReplica" in _words(entry) and _descends(entry, running.process.pid)
    ]


def _words(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _descends(entry: Path, ancestor: int) -> bool:
    while entry.name not in ("0", "1"):
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            return False
        if int(parent) == ancestor:
            return True
        entry = entry.with_name(parent)
    return False


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_loses_no_request_without_saying_so():
    with server(
        "--model", "digits", "--port", "0", "--ray", "local", "--replicas", "2", "--waiting", "200"
    ) as running:
        client = openai.OpenAI(base_url=running.address, api_key="none", max_retries=0, timeout=120)

        def ask(seed: int) -> str | None:
            """The picture; None for an error that says that it may be sent again."""
            try:
                data = client.images.generate(prompt=str(seed % 10), n=10, extra_body={"seed": seed}).data
            except openai.InternalServerError as error:
                assert error.code == "replica_died" and error.response.headers["retry-after"], error
                return None
            assert data is not None
            return data[0].b64_json

        want = [ask(seed) for seed in range(10)]
        replicas = replicas_of(running)
        assert len(replicas) == 2
        with ThreadPoolExecutor(CLIENTS) as pool:
            asked = [pool.submit(ask, i % 10) for i in range(REQUESTS)]
            while sum(future.done() for future in asked) < CLIENTS:
                time.sleep(0.01)
            os.kill(replicas[0], signal.SIGKILL)
            got = [future.result() for future in asked]
        lost = sum(picture is None for picture in got)
        assert 0 < lost < REQUESTS / 2
        assert all(picture in (None, want[i % 10]) for i, picture in enumerate(got))
        again = client.with_options(max_retries=8)
        assert again.images.generate(prompt="3", n=10, extra_body={"seed": 3}).data is not None
        end = time.monotonic() + 120
        while len(replicas_of(running)) < 2 and time.monotonic() < end:
            time.sleep(0.5)
        assert len(replicas_of(running)) == 2  # Ray has started another
        code, _ = running.end(signal.SIGTERM)
        assert code == 0
