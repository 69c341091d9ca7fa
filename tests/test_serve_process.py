"""The real server in a process of its own, asked by OpenAI's own client; stopped, killed, and started again."""

import base64
import io
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.serving import Server, server
from varkit.cli import main as cli

KEY = "a-key-of-many-letters"
CLIENTS = 64


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with server("--model", "digits", "--port", "0", keys=KEY) as started:
        yield started


@pytest.fixture(scope="module")
def client(running: Server) -> openai.OpenAI:
    return client_of(running)


def client_of(running: Server, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=running.address, api_key=KEY, max_retries=retries, timeout=120)


def size_of(text: str | None) -> tuple[int, int]:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text))).size


def test_the_official_client_lists_and_draws(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["digits"]
    size = client.models.retrieve("digits").size  # type: ignore[attr-defined]
    told = client.images.generate(
        model="digits",
        prompt="3",
        n=2,
        size=size,
        response_format="b64_json",
        extra_body={"seed": 5, "guidance_scale": 3.0, "negative_prompt": "8"},
    )
    assert told.data is not None and told.usage is not None
    assert len(told.data) == 2 and told.size == size and told.usage.output_tokens > 0
    assert "x".join(map(str, size_of(told.data[0].b64_json))) == size


def test_the_official_client_streams(client: openai.OpenAI):
    with client.images.generate(prompt="3", stream=True, partial_images=3, extra_body={"seed": 1}) as stream:
        told = list(stream)
    kinds = [event.type for event in told]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in told[:3]] == [0, 1, 2]
    assert len({size_of(event.b64_json) for event in told}) == 1
    whole = client.images.generate(prompt="3", extra_body={"seed": 1}).data
    assert whole is not None and whole[0].b64_json == told[-1].b64_json


def test_the_official_client_edits(client: openai.OpenAI):
    drawn = client.images.generate(prompt="3", extra_body={"seed": 1}).data
    assert drawn is not None and drawn[0].b64_json is not None
    picture = base64.b64decode(drawn[0].b64_json)
    width, height = size_of(drawn[0].b64_json)
    mask = Image.new("RGBA", (width, height), "white")
    mask.paste((0, 0, 0, 0), (0, 0, width, height // 2))
    stream = io.BytesIO()
    mask.save(stream, "png")
    told = client.images.edit(image=picture, mask=stream.getvalue(), prompt="8", n=2, extra_body={"seed": 2})
    assert told.data is not None and len(told.data) == 2
    before, after = (
        np.asarray(Image.open(io.BytesIO(data)))
        for data in (picture, base64.b64decode(told.data[0].b64_json or ""))
    )
    assert np.array_equal(before[height // 2 :], after[height // 2 :]) and not np.array_equal(before, after)
    events = client.images.edit(
        image=[picture], mask=stream.getvalue(), prompt="8", stream=True, partial_images=1
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_the_official_client_raises_what_the_server_says(running: Server, client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="unknown parameter 'quality'") as wrong:
        client.images.generate(prompt="3", quality="high")
    assert wrong.value.param == "quality"
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="3", model="none")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=running.address, api_key="wrong", max_retries=0).models.list()


def test_bodies_that_are_not_http_leave_it_well(running: Server, client: openai.OpenAI):
    host, port = "127.0.0.1", int(running.port)
    authorised = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
    for text in (
        "nonsense\r\n\r\n",
        authorised + "Content-Length: many\r\n\r\n",
        authorised + f"Content-Length: {1 << 40}\r\n\r\n",
        authorised + "Transfer-Encoding: chunked\r\n\r\nffffffff\r\n{",
        authorised + "Content-Length: 100\r\n\r\n{",
    ):
        with socket.create_connection((host, port), timeout=10) as raw:
            raw.sendall(text.encode())
            raw.shutdown(socket.SHUT_WR)
            answer = raw.recv(65536).decode("latin-1")
        assert answer == "" or answer.startswith("HTTP/1.1 4"), answer
        assert "Traceback" not in answer
    assert client.models.list().data


def active(running: Server) -> int:
    told = httpx.get(running.address.removesuffix("/v1") + "/healthz").json()
    return told["waiting"] + told["active"]


def test_who_leaves_makes_room(running: Server, client: openai.OpenAI):
    """Ten pictures take several batches; their clients are gone before that."""
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.02).images.generate(prompt="3", n=10)
    wait_until_idle(running)
    with client.images.generate(prompt="3", n=10, stream=True):
        assert active(running)
    wait_until_idle(running)
    text = httpx.get(
        running.address.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {KEY}"}
    ).text
    (line,) = (
        line for line in text.splitlines() if line.startswith('varkit_pictures_total{outcome="cancelled"}')
    )
    assert float(line.split()[1]) >= 2


def wait_until_idle(running: Server) -> None:
    end = time.monotonic() + 30
    while active(running):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_stopped_server_finishes_its_answers_and_says_nothing():
    with server("--model", "digits", "--port", "0", "--batch", "1") as running:
        results: list[int] = []

        def ask() -> None:
            client = client_of(running)
            results.append(len(client.images.generate(prompt="3", n=10).data or []))

        thread = threading.Thread(target=ask)
        thread.start()
        while not active(running):
            time.sleep(0.005)
        code, said = running.end(signal.SIGTERM)
        thread.join()
    assert results == [10] and code in (0, -signal.SIGTERM) and said == ""


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--host", "0.0.0.0"], ["0.0.0.0", "--keys", "VARKIT_API_KEYS"]),
        (["--port", "70000"], ["70000", "65535"]),
        (["--batch", "0"], ["batch", "at least 1"]),
        (["--waiting", "3"], ["waiting", "at least 10"]),
        (["--model", "scenez"], ["unknown model 'scenez'", "'scenes'"]),
        (["--keys", "no-such-file"], ["no-such-file"]),
    ],
)
def test_wrong_options_are_one_line(args, says, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VARKIT_API_KEYS", raising=False)
    assert cli.main(["serve", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(part in err for part in says), err


@pytest.mark.parametrize(
    "text", ["", "short", "a key with spaces in it", "\N{GREEK SMALL LETTER ALPHA}" * 20]
)
def test_keys_that_are_easily_guessed_are_refused_and_not_shown(text, tmp_path: Path, capsys):
    (tmp_path / "keys").write_text(text)
    assert cli.main(["serve", "--host", "0.0.0.0", "--keys", str(tmp_path / "keys")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and (not text or text not in said)


@pytest.mark.slow
def test_many_clients_at_once_get_what_each_gets_alone(running: Server):
    client = client_of(running, retries=10)

    def ask(seed: int) -> str | None:
        data = client.images.generate(prompt=str(seed % 10), extra_body={"seed": seed}).data
        return data[0].b64_json if data else None

    with ThreadPoolExecutor(CLIENTS) as pool:
        together = list(pool.map(ask, range(CLIENTS)))
    assert None not in together and together == [ask(seed) for seed in range(CLIENTS)]


@pytest.mark.slow
def test_killed_and_started_again_it_draws_the_same():
    with server("--model", "digits", "--port", "0", "--batch", "1") as first:
        client = client_of(first)
        want = client.images.generate(prompt="3", n=3, extra_body={"seed": 9}).data
        failed: list[Exception] = []

        def ask() -> None:
            try:
                client.images.generate(prompt="3", n=10)
            except openai.APIConnectionError as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while not active(first):
            time.sleep(0.005)
        code, _ = first.end(signal.SIGKILL)
        thread.join()
        assert code == -signal.SIGKILL and len(failed) == 1
    with server(
        "--model", "digits", "--port", first.port, "--batch", "1"
    ) as second:  # the same port, at once
        client = client_of(second)
        assert client.images.generate(prompt="3", n=3, extra_body={"seed": 9}).data == want
