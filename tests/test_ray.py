"""`varkit generate --ray`: with a local Ray, the pictures of one process, byte for byte; interrupted runs go on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import text_models
from tests.text_models import LONG

t5, features_model = text_models.t5, text_models.features_model
pytestmark = pytest.mark.slow
pytest.importorskip("ray")


def varkit(*words: object, cwd: Path) -> subprocess.Popen[str]:
    """A real process, as a user starts it."""
    command = [sys.executable, "-m", "varkit", *map(str, words)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=180)
    finally:
        process.kill()
    return process.returncode, out, err


def drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture
def command(t5: Path, features_model: Path, tmp_path: Path) -> tuple[object, ...]:
    """Twenty-seven pictures of nine prompts, with words, a negative prompt and previews."""
    words = LONG.split()
    (tmp_path / "prompts.txt").write_text("\n".join(" ".join(words[:n]) for n in range(1, 10)))
    model = ("--model", features_model, "--text-encoder", t5, "--negative", "blue circle")
    return ("generate", "--prompts", "prompts.txt", "--n", 3, "--seed", 6, "--previews", *model)


def test_many_workers_draw_what_one_process_draws(command: tuple[object, ...], tmp_path: Path):
    code, out, err = finished(varkit(*command, "--out", "whole", cwd=tmp_path))
    assert code == 0, err
    code, told, err = finished(varkit(*command, "--out", "ray", "--ray", "local", cwd=tmp_path))
    assert code == 0, err
    whole = drawn(tmp_path / "whole")
    assert len(whole) == 54 and drawn(tmp_path / "ray") == whole
    assert sorted(told.splitlines()) == sorted(out.replace("whole/", "ray/").splitlines())


def test_an_interrupted_run_goes_on(command: tuple[object, ...], tmp_path: Path):
    """Ctrl-C after the first picture; what is there stays as it is."""
    code, _, err = finished(varkit(*command, "--out", "whole", cwd=tmp_path))
    assert code == 0, err
    process = varkit(*command, "--out", "ray", "--ray", "local", cwd=tmp_path)
    while not list((tmp_path / "ray").glob("*.png")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    code, _, err = finished(process)
    assert code in (0, 130), err
    kept = sorted(drawn(tmp_path / "ray"))[:3]
    pictures = [name for name in kept if "previews" not in name]
    for name in pictures:
        (tmp_path / "ray" / name).write_bytes(b"a picture of mine")
    code, told, err = finished(varkit(*command, "--out", "ray", "--ray", "local", "--resume", cwd=tmp_path))
    assert code == 0, err
    whole, again = drawn(tmp_path / "whole"), drawn(tmp_path / "ray")
    assert again.keys() == whole.keys() and not any(name in told for name in pictures)
    assert {name for name in whole if again[name] != whole[name]} == set(pictures)


def test_what_goes_wrong_is_told_in_one_line(command: tuple[object, ...], tmp_path: Path):
    code, out, err = finished(varkit(*command, "--ray", "127.0.0.1:1", cwd=tmp_path))
    assert code == 2 and "no Ray cluster was found at '127.0.0.1:1'" in err and err.count("\n") == 1
    code, out, err = finished(varkit(*command, "--ray", "auto", cwd=tmp_path))
    assert code == 2 and "start one (ray start --head), or give --ray local" in err and err.count("\n") == 1
    code, out, err = finished(varkit(*command, "--ray", "local", "--grid", cwd=tmp_path))
    assert code == 2 and "leave out --shard, --resume and --ray" in err
    code, out, err = finished(varkit(*command, "--ray", "local", "--guidance", 1, cwd=tmp_path))
    assert code == 2 and "a negative prompt needs guidance" in err and err.count("\n") == 1
