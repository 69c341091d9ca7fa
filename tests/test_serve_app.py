"""The server as an application: what it answers, refuses, and never tells. The models are tiny, the routes real."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests import serve_models
from varkit.edit.inpaint import inpaint, paste
from varkit.errors import UserError
from varkit.serve.app import create_app
from varkit.serve.service import Limits, shown_steps

HERE = "http://127.0.0.1:8000"
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
KEYS = ("first-key", "second-key")
LIMITS = Limits(batch=2, waiting=10, seconds=20, body=200_000, pixels=10_000, grace=2)


MODELS = {"classes": serve_models.classes(), "words": serve_models.words()}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(MODELS, LIMITS), base_url=HERE) as client:
        yield client


def ask(client: Any, **body: Any) -> httpx.Response:
    return client.post(GENERATIONS, json={"prompt": "cat"} | body)


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def pixels(answer: httpx.Response) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    return [np.asarray(opened(item["b64_json"])) for item in answer.json()["data"]]


def png(size: tuple[int, int] = (6, 6), hole: bool = False, mode: str = "RGBA") -> bytes:
    """A picture's file, its upper half transparent with `hole`."""
    image = Image.new(mode, size, "teal")
    if hole:
        image.paste((0, 0, 0, 0), (0, 0, size[0], size[1] // 2))
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def events(text: str) -> list[tuple[str, dict]]:
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error in an answer, after looking at what no answer may tell."""
    for secret in ("Traceback", "/work", "site-packages", ".py", "varkit/"):
        assert secret not in answer.text, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_seed_numbers_pictures_as_generate_does(client):
    together = pixels(ask(client, n=3, seed=7))
    assert all(np.array_equal(a, b) for a, b in zip(together, pixels(ask(client, n=3, seed=7)), strict=True))
    assert np.array_equal(together[0], pixels(ask(client, seed=7))[0])
    with TestClient(create_app(MODELS, replace(LIMITS, batch=1)), base_url=HERE) as single:
        made = MODELS["classes"].generate(["cat"], n=3, seed=7, batch_size=1)
        assert all(
            np.array_equal(a, np.asarray(b))
            for a, b in zip(pixels(ask(single, n=3, seed=7)), made, strict=True)
        )


def test_without_a_seed_pictures_differ_and_the_answer_says_how_to_draw_them_again(client):
    first, second = (ask(client, prompt="a red circle", model="words") for _ in range(2))
    assert first.json()["seed"] != second.json()["seed"]
    again = ask(client, prompt="a red circle", model="words", seed=first.json()["seed"])
    assert again.json()["data"] == first.json()["data"]


def test_what_an_answer_says(client):
    told = ask(client, n=2, seed=0, output_format="jpeg", size="6x6", user="ann").json()
    assert told["output_format"] == "jpeg" and told["size"] == "6x6" and told["seed"] == 0
    assert told["usage"]["output_tokens"] == told["usage"]["total_tokens"] == 2 * 14
    assert opened(told["data"][0]["b64_json"]).format == "JPEG" and set(told["data"][0]) == {"b64_json"}
    address = ask(client, response_format="url", output_format="webp").json()["data"][0]["url"]
    start, _, text = address.partition(",")
    assert start == "data:image/webp;base64" and opened(text).size == (6, 6)


def test_guidance_and_negative_prompts_matter_and_are_those_of_generate(client):
    kinds: list[dict] = [
        {},
        {"guidance_scale": 1},
        {"guidance_scale": 9.5},
        {"negative_prompt": "owl", "guidance_scale": 9.5},
    ]
    shown = [pixels(ask(client, seed=3, **kind))[0].tobytes() for kind in kinds]
    assert len(set(shown)) == len(kinds)
    want = MODELS["classes"].generate(["cat"] * 2, seed=3, negative="owl", guidance=9.5)[0]
    assert (
        np.abs(np.frombuffer(shown[3], np.uint8).astype(int) - np.asarray(want).flatten().astype(int)).max()
        <= 1
    )


def test_streams_show_scales_and_end_with_the_picture(client):
    answer = ask(client, stream=True, partial_images=2, seed=1, n=2)
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = events(answer.text)
    for index, whole in enumerate(ask(client, seed=1, n=2).json()["data"]):
        own = [(name, data) for name, data in told if data["index"] == index]
        assert [name.partition(".")[2] for name, _ in own] == ["partial_image", "partial_image", "completed"]
        assert [data.get("partial_image_index") for _, data in own] == [0, 1, None]
        assert all(name == data["type"] and data["seed"] == 1 for name, data in own)
        assert own[-1][1]["b64_json"] == whole["b64_json"] != own[0][1]["b64_json"]
        assert own[-1][1]["usage"]["output_tokens"] == 14


@pytest.mark.parametrize(
    ("steps", "pictures", "want"),
    [(6, 0, []), (6, 3, [2, 3, 4]), (3, 3, [1, 2]), (1, 3, []), (256, 3, [64, 128, 192]), (None, 3, [])],
)
def test_partial_pictures_lie_evenly_over_the_steps(steps, pictures, want):
    assert sorted(shown_steps(steps, pictures)) == want


def test_edits_draw_anew_what_is_transparent(client):
    original, redraw = Image.open(io.BytesIO(png())).convert("RGB"), np.zeros((6, 6), bool)
    redraw[:3] = True
    want = paste(inpaint(MODELS["classes"], original, redraw, "dog", 1, 5), original, redraw)[0]
    fields = {"prompt": "dog", "seed": "5"}
    by_mask = client.post(EDITS, data=fields, files={"image": png(), "mask": png(hole=True)})
    by_list = client.post(EDITS, data=fields, files={"image[]": png(), "mask": png(hole=True)})
    for answer in (by_mask, by_list):
        image = pixels(answer)[0]
        assert np.array_equal(image[3:], np.asarray(original)[3:])
        assert np.abs(image.astype(int) - np.asarray(want).astype(int)).max() <= 1
    own_hole = client.post(EDITS, data=fields, files={"image": png(hole=True)})
    assert own_hole.status_code == 200
    told = client.post(
        EDITS, data={"stream": "true", "partial_images": "1", "n": "2"}, files={"image": png(hole=True)}
    )
    assert [name for name, _ in events(told.text)] == ["image_edit.partial_image"] * 2 + [
        "image_edit.completed"
    ] * 2


@pytest.mark.parametrize(
    ("files", "fields", "param", "says"),
    [
        ({}, {}, "image", "missing"),
        ({"image": b"GIF89a nonsense"}, {}, "image", "picture"),
        ({"image": png()}, {}, "image", "send a mask"),
        ({"image": png(), "mask": png()}, {}, "mask", "nothing in it is transparent"),
        ({"image": png(), "mask": png(mode="RGB")}, {}, "mask", "nothing in it is transparent"),
        ({"image": png(), "mask": png((4, 8), hole=True)}, {}, "mask", "4x8"),
        ({"image": png((101, 100), hole=True)}, {}, "image", "10000"),
        ({"image": png(hole=True)}, {"size": "12x12"}, "size", "6x6"),
        ({"image": png(hole=True)}, {"size": "12"}, "size", "pattern"),
        ({"image": png(hole=True)}, {"n": "11"}, "n", "10"),
        ({"image": png(hole=True)}, {"colour": "red"}, "colour", "unknown parameter 'colour'"),
        ({"image": png(hole=True)}, {"mask": "text"}, "mask", "a file"),
        ({"image": png(hole=True), "seed": b"1"}, {}, "seed", "no file"),
        ({"image": png(hole=True), "image[]": png()}, {}, "image", "twice"),
        ({"image": png(hole=True)}, {"negative_prompt": "cat"}, "negative_prompt", "needs a prompt"),
        ({"image": png(hole=True)}, {"prompt": "cow"}, "prompt", "unknown class 'cow'"),
    ],
)
def test_edits_that_cannot_be_made_say_why(client, files, fields, param, says):
    # With two files httpx sends a form even where a test has none.
    given = {name: ("name.png", data) for name, data in files.items()} or {"other": ("", b"")}
    answer = client.post(EDITS, data=fields, files=given)
    if not files:
        assert answer.status_code == 400
        return
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, param) and says in error["message"], error


def test_bombs_are_refused_by_their_header(client):
    large = png((9_000, 1_000), mode="1")
    answer = client.post(EDITS, files={"image": ("bomb.png", large)})
    assert (
        len(large) < LIMITS.body
        and answer.status_code == 400
        and "10000 pixels" in error_of(answer)["message"]
    )


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"colour": "red"}, "colour", "unknown parameter 'colour'"),
        ({"quality": "high"}, "quality", "unknown parameter 'quality'"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": 3}, "prompt", "string"),
        ({"prompt": "cow"}, "prompt", "unknown class 'cow'"),
        ({"prompt": "x" * 5000}, "prompt", "4000"),
        ({"negative_prompt": "cow"}, "negative_prompt", "unknown class 'cow'"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": "2"}, "n", "integer"),
        ({"n": True}, "n", "integer"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "less than or equal"),
        ({"size": "12x6"}, "size", "cannot make 12x6"),
        ({"size": "wide"}, "size", "pattern"),
        ({"guidance_scale": 101}, "guidance_scale", "100"),
        ({"response_format": "svg"}, "response_format", "url"),
        ({"partial_images": 4}, "partial_images", "3"),
        ({"negative_prompt": "owl", "guidance_scale": 1}, None, "needs guidance"),
    ],
)
def test_wrong_parameters_are_refused_by_name(client, body, param, says):
    answer = ask(client, **body)
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, param) and says in error["message"], error
    assert error["type"] == "invalid_request_error" and answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 50_000, b'{"n": ' + b"9" * 5000 + b"}"],
)
def test_bodies_that_are_no_json_object_are_refused(client, content: bytes):
    answer = client.post(GENERATIONS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error_of(answer)


def test_addresses_methods_and_queries_that_are_not_there(client):
    assert error_of(client.get("/v2"))["type"] == "invalid_request_error"
    assert client.get("/v2").status_code == 404 and client.get(GENERATIONS).status_code == 405
    answer = client.post(GENERATIONS + "?seed=1", json={"prompt": "cat"})
    assert answer.status_code == 400 and error_of(answer)["param"] == "seed"
    answer = client.post(EDITS, json={"prompt": "cat"})
    assert answer.status_code == 400 and "multipart/form-data" in error_of(answer)["message"]


def test_models_are_listed(client):
    listed = client.get("/v1/models").json()["data"]
    assert [(m["id"], m["size"], m["prompts"], m["edits"]) for m in listed] == [
        ("classes", "6x6", "classes", True),
        ("words", "6x6", "captions", True),
    ]
    assert client.get("/v1/models/words").json() == listed[1]
    for answer in (client.get("/v1/models/none"), ask(client, model="none")):
        assert answer.status_code == 404 and error_of(answer)["code"] == "model_not_found"


def test_large_bodies_are_refused_whether_they_say_so_or_not(client):
    def parts() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 10_000

    for answer in (
        client.post(GENERATIONS, content=b" " * (LIMITS.body + 1)),
        client.post(GENERATIONS, content=parts()),
    ):
        assert answer.status_code == 413 and error_of(answer)["code"] == "body_too_large"


def test_metrics_count_what_happened():
    with TestClient(create_app(MODELS, LIMITS), base_url=HERE) as client:
        ask(client, n=3)
        ask(client, n=0)
        client.get("/v1/nothing")
        text = client.get("/metrics").text
    for line in (
        'varkit_requests_total{route="/v1/images/generations",status="200"} 1.0',
        'varkit_requests_total{route="/v1/images/generations",status="400"} 1.0',
        'varkit_requests_total{route="other",status="404"} 1.0',
        'varkit_pictures_total{outcome="drawn"} 3.0',
        'varkit_rows_total{kind="padding"} 3.0',
        "varkit_step_seconds_count 6.0",
        "varkit_waiting_pictures 0.0",
    ):
        assert line in text.splitlines(), text


def test_health_follows_the_life_of_the_server():
    app = create_app(MODELS, LIMITS)
    with TestClient(app, base_url="http://elsewhere") as client:
        assert client.get("/healthz").json() == {"status": "ok", "waiting": 0, "active": 0}
        app.state.service.batcher.close()
        assert client.get("/healthz").status_code == 503
    with TestClient(create_app(MODELS, LIMITS), base_url=HERE) as client:
        client.app.state.service.batcher.close()  # type: ignore[attr-defined]
        answer = ask(client)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0 and error_of(answer)


def test_only_holders_of_a_key_get_in():
    with TestClient(create_app(MODELS, LIMITS, KEYS), base_url="http://elsewhere") as client:
        assert client.get("/healthz").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
            for given in ({}, {"authorization": "Bearer third-key"}, {"authorization": f"Basic {KEYS[0]}"}):
                answer = client.get(path, headers=given)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert error_of(answer)["code"] == "invalid_api_key"
        for key in KEYS:
            assert client.get("/v1/models", headers={"authorization": f"bearer {key}"}).status_code == 200


def test_without_keys_web_pages_cannot_reach_it_through_a_browser(client):
    for headers in (
        {"host": "evil.example"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"host": "["},
    ):
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == 403 and error_of(answer)
    for headers in ({"host": "localhost:8000"}, {"host": "[::1]:8000"}, {"origin": "http://127.0.0.2:3000"}):
        assert client.get("/v1/models", headers=headers).status_code == 200


def run_frozen(limits: Limits, talk, thaw: bool = False) -> Any:
    """Talk to a server whose batcher does not move, over ASGI."""

    async def main() -> Any:
        app = create_app(MODELS, limits)
        batcher = app.state.service.batcher
        moves = batcher.tick
        batcher.tick = lambda: moves() if thaw and batcher.closed else False
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url=HERE, timeout=20) as client:
                return await talk(client, batcher)

    return asyncio.run(main())


def test_a_full_queue_is_429_and_says_when_to_come_back():
    async def talk(client, batcher):
        first = asyncio.create_task(ask(client, n=10))
        while not batcher.waiting:
            await asyncio.sleep(0.01)
        answer = await ask(client)
        first.cancel()
        return answer

    answer = run_frozen(replace(LIMITS, grace=0), talk)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert error_of(answer)["code"] == "queue_full" and "x-should-retry" not in answer.headers


def test_late_pictures_are_504_and_leave_the_queue():
    async def talk(client, batcher):
        answers = await ask(client), await ask(client, stream=True)
        return answers, batcher.open_jobs

    (whole, stream), left = run_frozen(replace(LIMITS, seconds=0.2, grace=0), talk)
    assert left == 0
    assert whole.status_code == 504 and error_of(whole)["code"] == "time_limit"
    assert whole.headers["x-should-retry"] == "false"
    ((name, data),) = events(stream.text)
    assert name == "error" and data["error"]["code"] == "time_limit"


def test_a_stopping_server_finishes_what_it_has_or_says_that_it_cannot():
    async def talk(client, batcher):
        asked = asyncio.create_task(ask(client, n=2))
        while not batcher.waiting:
            await asyncio.sleep(0.01)
        await client._transport.app.state.service.stop()
        return await asked

    assert run_frozen(LIMITS, talk, thaw=True).status_code == 200
    answer = run_frozen(replace(LIMITS, grace=0.1), talk)
    assert (
        answer.status_code == 503 and answer.headers["retry-after"] and error_of(answer)["code"] == "stopping"
    )


def test_what_breaks_is_told_without_saying_where():
    def broken(step, values, state):
        raise RuntimeError("in /work/secret/file.py")

    app = create_app({"broken": MODELS["classes"].using(override=broken)}, LIMITS)
    with TestClient(app, base_url=HERE, raise_server_exceptions=False) as client:
        answer = ask(client)
        assert (
            answer.status_code == 500
            and "secret" not in answer.text
            and error_of(answer)["code"] == "internal_error"
        )
        ((name, data),) = events(ask(client, stream=True).text)
        assert name == "error" and data["error"]["code"] == "internal_error"
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"waiting": 3}, {"seconds": 0}, {"body": 0}, {"grace": -1}])
def test_limits_that_allow_nothing_are_refused(wrong):
    with pytest.raises(UserError):
        replace(LIMITS, **wrong)


def test_answers_are_described_as_they_are_given():
    described = create_app(MODELS, LIMITS).openapi()
    for path in (GENERATIONS, EDITS):
        answers = described["paths"][path]["post"]["responses"]
        assert set(answers) == {"200", "400", "401", "403", "404", "408", "413", "429", "500", "503", "504"}
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
