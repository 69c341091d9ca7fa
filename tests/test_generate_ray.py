"""`varkit generate --ray local`: a real Ray draws the pictures of one process, and goes on where it was interrupted."""

import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from tests import models
from tests.launch import launch, start, wait_until

pytest.importorskip("ray")

class_model = models.class_model
pytestmark = pytest.mark.slow


def written(folder: Path) -> dict[str, bytes]:
    """The pictures in a folder."""
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def generate(model: Path, prompts: Path, out: Path, *options: str) -> list[str]:
    """`varkit generate` in a process of one thread; the names of what it says it has written."""
    told = launch(1, "varkit", "generate", "--model", model, "--prompts", prompts, "--out", out, *options)
    return sorted(Path(line).name for line in told.stdout.splitlines())


def labels(folder: Path, count: int) -> Path:
    """A file of so many prompts for the class model."""
    file = folder / "prompts.txt"
    file.write_text("".join(f"{i % 3}\n" for i in range(count)))
    return file


def test_the_workers_draw_the_pictures_of_one_process(class_model: Path, tmp_path: Path):
    """Twenty are three batches, the last of which is filled up."""
    prompts = labels(tmp_path, 20)
    names = generate(class_model, prompts, tmp_path / "alone", "--previews")
    alone = written(tmp_path / "alone")
    assert sorted(alone) == names and len(names) == 40 and len(set(alone.values())) > 20
    assert generate(class_model, prompts, tmp_path / "ray", "--previews", "--ray", "local") == names
    assert written(tmp_path / "ray") == alone


def test_an_interrupted_run_goes_on_without_drawing_anything_twice(class_model: Path, tmp_path: Path):
    """Interrupted as by Ctrl-C in a terminal, which every process of the run hears."""
    count = 400
    prompts, out = labels(tmp_path, count), tmp_path / "ray"
    command = ("generate", "--model", class_model, "--prompts", prompts, "--out", out, "--ray", "local")
    process = start(*command, cwd=tmp_path)
    # a picture half written has a name that begins with a dot
    wait_until(lambda: any(not path.name.startswith(".") for path in out.glob("*.png")), process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert said.endswith("varkit: interrupted; nothing was left half-written\n") and "Traceback" not in said
    kept = {path: path.stat() for path in out.glob("*.png")}
    assert 0 < len(kept) < count
    for path in kept:  # there is nothing but whole pictures
        with Image.open(path) as picture:
            picture.load()

    drawn = generate(class_model, prompts, out, "--ray", "local", "--resume")
    whole = generate(class_model, prompts, tmp_path / "alone")
    assert len(whole) == count and drawn == sorted(set(whole) - {path.name for path in kept})
    assert all(path.stat().st_ino == stat.st_ino for path, stat in kept.items())
    assert written(out) == written(tmp_path / "alone")
