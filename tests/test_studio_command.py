"""`varkit studio` as a command and as an application: what it refuses, where it listens, what it gives to whom."""

import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests import models
from varkit.cli import main as cli
from varkit.cli.listening import address, listen, named_models
from varkit.cli.models import DEFAULT_MODEL
from varkit.errors import UserError
from varkit.hub.pipeline import Pipeline
from varkit.studio.app import create_app

class_model = models.class_model


@pytest.fixture
def free() -> int:
    """A port that was free a moment ago, and the one after it."""
    for _ in range(100):
        with closing(socket.socket()) as probe, closing(socket.socket()) as after:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            try:
                after.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("no two free ports in a row")


def test_the_next_free_port_is_taken_only_where_several_will_do(free: int):
    with listen("127.0.0.1", [free]) as taken:
        assert address(taken) == f"http://127.0.0.1:{free}"
        with listen("127.0.0.1", range(free, free + 2)) as other:
            assert other.getsockname()[1] == free + 1
        with pytest.raises(UserError, match=f"port {free} is taken on 127.0.0.1; choose another --port"):
            listen("127.0.0.1", [free])


def test_addresses_that_are_not_this_machines_are_refused():
    with pytest.raises(UserError, match="is no address"):
        listen("no.such.host.invalid", [0])
    with pytest.raises(UserError, match="cannot listen on 192.0.2.1"):
        listen("192.0.2.1", [0])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--host", "0.0.0.0"], ["0.0.0.0", "--user", "VARKIT_PASSWORD"]),
        (["--user", "ann"], ["ann", "password", "VARKIT_PASSWORD"]),
        (["--port", "70000"], ["70000", "65535"]),
        (["--workers", "0"], ["workers", "at least 1"]),
        (["--model", "scenez"], ["unknown model 'scenez'", "'scenes'"]),
    ],
)
def test_wrong_options_are_one_line(args, says, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VARKIT_PASSWORD", raising=False)
    assert cli.main(["studio", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(part in err for part in says), err


def test_a_taken_port_is_one_line(class_model: Path, free: int, capsys: pytest.CaptureFixture[str]):
    with listen("127.0.0.1", [free]):
        assert cli.main(["studio", "--model", str(class_model), "--port", str(free)]) == 2
    assert f"port {free} is taken" in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install():
    script = (
        "import sys; sys.modules |= {'gradio': None, 'fastapi': None, 'uvicorn': None}\n"
        "from varkit.cli.main import main\n"
        "sys.exit(main(['studio', '--model', 'digits']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install 'varkit[studio]'" in done.stderr


def test_visitors_see_the_last_part_of_a_folder_where_it_tells_all_apart(class_model: Path, tmp_path: Path):
    other = tmp_path / class_model.name
    other.symlink_to(class_model)
    assert list(named_models([str(class_model), "digits"])) == [class_model.name, "digits"]
    assert list(named_models([str(class_model), str(other)])) == [str(class_model), str(other)]
    assert list(named_models([]))[0] == DEFAULT_MODEL


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Pipeline]:
    return {"tiny": models.tiny_pipeline(models.ClassConfig(3))}


def test_the_page_names_no_other_host(pipelines):
    with TestClient(create_app(pipelines)) as client:
        page = client.get("/")
        assert page.status_code == 200
        for address in ("googleapis", "gstatic", "cdn", "huggingface.co"):
            assert address not in page.text, address
        assert "googleapis" not in client.get("/theme.css").text
        assert client.get("/config").json()["analytics_enabled"] is False


def test_pictures_of_experiments_are_given_by_name_alone(pipelines):
    with TestClient(create_app(pipelines)) as client:
        for name in ("no-such", "..%2f..%2fREADME", "%2fetc%2fpasswd"):
            assert client.get(f"/pictures/{name}.png").status_code == 404


def test_only_those_who_log_in_get_the_page(pipelines):
    with TestClient(create_app(pipelines, login=("ann", "pass"))) as client:
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "ann", "password": "pass"}).status_code == 200
        assert client.get("/config").status_code == 200


def test_no_handler_is_offered_as_an_api(pipelines):
    with TestClient(create_app(pipelines)) as client:
        assert client.get("/gradio_api/info").json()["named_endpoints"] == {}
