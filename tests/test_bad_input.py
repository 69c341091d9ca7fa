"""Whatever is wrong with the input: one line on stderr, the documented exit code, and nothing half-written."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests import failing, models
from tests.failing import Fails, contents
from tests.launch import start, wait_until
from varkit.cli.main import main
from varkit.generators.text import TextConfig
from varkit.hub.pipeline import WEIGHTS

class_model, text_model = models.class_model, models.text_model
here, fails = failing.here, failing.fails


# Prompts


def test_prompts_that_a_text_model_does_not_know(fails: Fails, text_model: Path) -> None:
    assert "unknown word 'rod'; did you mean 'red'" in fails(
        "generate", "a rod circle", "--model", text_model
    )
    line = fails("generate", "a red circle a blue square a red", "--model", text_model)
    assert "has 8 words; this model reads at most 7: shorten it" in line
    assert "label 3 was given to a text model" in fails("generate", "--label", 3, "--model", text_model)


def test_recipes_that_are_no_models_yet(fails: Fails) -> None:
    says = "'llamagen-scenes' is a recipe, and no model of it comes with varkit; run varkit train llamagen-scenes --out"
    for command in (
        ("generate", "a", "--model"),
        ("serve", "--port", 0, "--model"),
        ("evaluate", "--suite", "scenes"),
        ("bench",),
    ):
        assert says in fails(*command, "llamagen-scenes")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["ow"], "unknown class 'ow'; did you mean 'owl'? (or a label from 0 to 2)"),
        (["a red circle"], "unknown class 'a red circle'"),
        (["--label", "3"], "label 3 is out of range; this model knows 0 to 2"),
        (["--label", "-1"], "label -1 is out of range"),
        (["--label", "one"], "--label"),
        (["7"], "label 7 is out of range"),
        (["²"], "unknown class '²'"),
    ],
)
def test_prompts_that_a_class_model_does_not_know(
    fails: Fails, class_model: Path, given: list[str], says: str
) -> None:
    assert says in fails("generate", *given, "--model", class_model)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--seed", "-1"], "seed -1 is out of range; use an integer from 0"),
        (["--seed", str(2**63)], "is out of range"),
        (["--n", "0"], "--n is 0; ask for 1 to 1000000 pictures"),
        (["--n", "1000000000"], "--n is 1000000000; ask for 1 to 1000000 pictures"),
        (["--out", "owls.gif"], "'owls.gif' does not end as a picture does; end it in one of .png, .jpg"),
        (["--out", "o" * 300 + ".png"], "file name too long"),
        (["--n", "-2"], "--n is -2"),
        (["--n", "many"], "--n"),
        (["--size", "64"], "--size '64' is not HEIGHTxWIDTH"),
        (["--size", "axb"], "--size 'axb' is not HEIGHTxWIDTH"),
        (["--size", "7x6"], "size 7x6 cannot be made by this model; its schedule makes 6x6"),
        (["--size", "0x0"], "size 0x0 cannot be made"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--temperature", "nan"], "temperature nan"),
        (["--guidance", "nan"], "guidance nan"),
        (["--top-k", "-1"], "top-k -1"),
        (["--top-p", "1.5"], "top-p 1.5"),
        (["owl"], "caption and label were given; give one"),
        (["--prompts", "nowhere.txt"], "label and prompts were given"),
        (["--lable", "1"], "unknown option '--lable'; did you mean '--label'"),
    ],
)
def test_options_out_of_range(fails: Fails, class_model: Path, given: list[str], says: str) -> None:
    assert says in fails("generate", "--label", "1", *given, "--model", class_model)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "has no prompt; write one a line"),
        (b"\n  \n\t\n", "has no prompt"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "is not a text in UTF-8"),
        (b"a red circle\0", "is not a text: it has zero bytes"),
        (b"a red circle\n" * 20 + b"a rod circle\n", "unknown word 'rod'"),
    ],
)
def test_prompt_files(
    fails: Fails, here: Path, text_model: Path, data: bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "prompts.txt").write_bytes(data)
    monkeypatch.setattr("varkit.cli.generate.draw", None)  # a mistake shows before anything is drawn
    assert says in fails("generate", "--prompts", "prompts.txt", "--model", text_model, "--out", "new")


def test_prompt_files_that_cannot_be_read(fails: Fails, here: Path, text_model: Path) -> None:
    assert "no such file or folder: 'nowhere.txt'" in fails("generate", "--prompts", "nowhere.txt")
    (here / "folder").mkdir()
    assert "'folder' is a folder" in fails("generate", "--prompts", "folder", "--model", text_model)
    assert "nothing to draw was given" in fails("generate", "--model", text_model)


# Places


@pytest.fixture
def full_disk(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a disk of its own that is full, where the tests may mount one; else writing fails by fiat."""
    disk = here / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k,mode=777", "varkit-test", str(disk)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        (disk / "filler").write_bytes(bytes(12288))
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
        return

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("varkit.files._fsync", full)
    yield disk


def test_a_full_disk(fails: Fails, full_disk: Path, class_model: Path) -> None:
    generate = ("generate", "--label", 1, "--n", 64, "--grid", "--previews", "--model", class_model)
    line = fails(*generate, "--out", full_disk / "a.png", code=1)
    assert f"no space left on device while writing '{full_disk / 'a.png'}'; free some space" in line
    back = ("convert", "--to", "published", class_model, "--out", full_disk / "published")
    assert "no space left on device while writing" in fails(*back, code=1)


def test_a_disk_that_fills_up_in_training(full_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", "--steps", "1", "--out", str(full_disk / "run")]) == 1
    *logs, line = capsys.readouterr().err.splitlines()
    assert line.startswith("varkit: error: no space left on device while writing") and len(logs) <= 1
    assert not list(full_disk.rglob(".part-*"))


@pytest.mark.parametrize("place", ["/proc/varkit/a.png", "/proc/varkit-pictures/", "file/a.png"])
def test_places_where_nothing_can_be_written(fails: Fails, here: Path, class_model: Path, place: str) -> None:
    (here / "file").write_text("in the way")
    assert f"cannot write '{place.rstrip('/')}" in fails(
        "generate", "--label", 1, "--model", class_model, "--out", place
    )
    assert "cannot write" in fails("train", "digits", "--steps", 1, "--out", place)
    assert "cannot write" in fails("convert", "x.pth", "--out", place)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--out", "y.xyz"], "'y.xyz' does not end as a picture does; end it in one of .png"),
        (["--out", "y"], "'y' does not end as a picture does"),
        (["--out", "folder.png"], "'folder.png' is a folder; choose another --out"),
        (["--n", "0"], "--n is 0; ask for 1 to 1000000 pictures"),
    ],
)
def test_edits_that_could_not_be_written(fails: Fails, here: Path, given: list[str], says: str) -> None:
    (here / "folder.png").mkdir()
    assert says in fails("edit", "mine.png", "--box", "0", "0", "1", "0.5", *given)


def test_pictures_never_replace_folders(fails: Fails, here: Path, class_model: Path) -> None:
    (here / "a.png").mkdir()
    line = fails("generate", "--label", 1, "--model", class_model, "--out", "a.png")
    assert "'a.png' is a folder" in line


# Training


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            ["digist"],
            "unknown recipe 'digist'; did you mean 'digits'",
        ),
        (["some/where"], "folder some/where does not exist; give a folder of pictures"),
        (["pictures"], "folder pictures gives no pictures: it has no .jpg, .png or other picture files"),
        (["digits", "--minutes", "1", "--steps", "5"], "both --minutes 1.0 and --steps 5 were given"),
        (["digits", "--minutes", "-3"], "--minutes -3.0 is not a number above 0"),
        (["digits", "--minutes", "nan"], "--minutes nan is not a number above 0"),
        (["digits", "--minutes", "inf"], "--minutes inf is not a number above 0"),
        (["digits", "--steps", "0"], "--steps 0 is below 1"),
        (["digits", "--steps", "many"], "--steps"),
        (["digits", "--seed", "-1"], "--seed -1 is out of range"),
        (["digits", "--tokenizer", "nowhere"], "there is no folder 'nowhere'"),
        (["digits", "--from", "nowhere"], "there is no folder 'nowhere'"),
        (["digits", "--accumulation", "3"], "a batch of 32 cannot be split into 3"),
        (
            ["digits", "--tokenizer", WEIGHTS / "digits", "--accumulation", "5"],
            "a batch of 64 cannot be split",
        ),
        (["digits", "--device", "cuda:99"], "--device 'cuda:99' is not on this machine"),
        (["digits-raster", "--from", WEIGHTS / "digits"], "has no VQ tokenizer, which the recipe needs"),
        (["scenes-small", "--from", WEIGHTS / "digits"], "does not fit its configuration"),
        (
            ["markov-digits", "--from", WEIGHTS / "digits", "--steps", "1"],
            f"the recipe 'markov-digits' is made for scales of 1, 2, 3, 4, 6, 8, and the tokenizer of "
            f"'{WEIGHTS / 'digits'}' has 1, 2, 3, 4; give --from a model with the recipe's, or take another recipe",
        ),
        (["digits", "--resume"], "'run' is not a training's folder; leave --resume out"),
    ],
)
def test_trainings_that_cannot_begin(fails: Fails, here: Path, given: list[str | Path], says: str) -> None:
    (here / "pictures").mkdir()
    (here / "pictures" / "notes.txt").write_text("no picture")
    assert says in fails("train", *given, "--out", "run")
    assert not (here / "run").exists()


def test_folders_of_other_things_are_not_trained_in(fails: Fails, here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "thesis.tex").write_text("mine")
    assert "'run' is not an empty folder; choose another --out" in fails("train", "digits", "--out", "run")
    assert "is not a training's folder" in fails("train", "digits", "--out", "run", "--resume")
    (here / "run" / "request.json").write_text("{")
    assert "'run/request.json' is damaged" in fails("train", "digits", "--out", "run", "--resume")
    (here / "run" / "request.json").write_text('{"recipe": "scenes", "seed": 3}')
    line = fails("train", "digits", "--out", "run", "--resume")
    assert "recipe (was 'scenes', now 'digits'), seed (was 3, now 0)" in line


def pictures(folder: Path, count: int, caption: str = "a {} square") -> Path:
    """A folder of small pictures, squares of two colours, with captions.jsonl."""
    folder.mkdir()
    rows = []
    for i in range(count):
        colour = ("red", "blue")[i % 2]
        Image.new("RGB", (40 + i % 7, 40), colour).save(folder / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "caption": caption.format(colour)})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_captions_longer_than_a_model_reads_show_before_training(fails: Fails, here: Path) -> None:
    from varkit.train.recipes import find_recipe

    pictures(here / "long", 3, caption="x" * 600)
    line = fails("train", "long", "--out", "run", "--steps", 1)
    assert "the caption of '000.png' has 600 bytes; a model made from a folder reads at most 511" in line
    pictures(here / "fit", 3, caption="x" * 511)
    condition = find_recipe("fit")[0].generator.config.condition
    assert isinstance(condition, TextConfig) and condition.encode(["x" * 511]).shape == (1, 512)


# Signals


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="watches memory maps to see the model loaded"
)
def test_ctrl_c_while_generating(class_model: Path, here: Path) -> None:
    args = ("generate", "--label", 1, "--n", 20_000, "--model", class_model, "--out", here / "new")
    process = start(*args, cwd=here)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: "head.safetensors" in maps.read_text(), process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert err == "varkit: interrupted; nothing was left half-written\n"
    finished = list((here / "new").glob("*.png"))
    assert len(out.splitlines()) <= len(finished) < 20_000
    for file in finished:  # those that were done are kept, whole
        with Image.open(file) as picture:
            picture.load()


def test_ctrl_c_while_training_and_going_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ("train", "digits", "--steps", 40, "--out", "run")
    process = start(*train, cwd=here)
    wait_until((here / "run/tokenizer/checkpoints/step-000000").exists, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, ""), err
    line = err.splitlines()[-1]
    assert line.startswith("varkit: interrupted; step ") and line.endswith(
        "of 40 is saved in run/tokenizer; go on with --resume"
    )
    assert "Traceback" not in err and not list(here.rglob(".part-*"))
    assert main(["generate", "--label", "1", "--model", "run"]) == 2
    assert "has made no model yet" in capsys.readouterr().err


# From end to end


def run(*args: object, cwd: Path) -> str:
    process = start(*args, cwd=cwd)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
def test_a_killed_training_resumed_equals_an_uninterrupted_one(here: Path) -> None:
    run("train", "digits", "--steps", 30, "--out", "whole", cwd=here)
    process = start("train", "digits", "--steps", 30, "--out", "killed", cwd=here)
    log = here / "killed/generator/log.jsonl"
    wait_until(lambda: log.exists() and "20" in log.read_text(), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (here / "killed/model").exists()
    run("train", "digits", "--steps", 30, "--out", "killed", "--resume", cwd=here)
    whole, resumed = contents(here / "whole/model"), contents(here / "killed/model")
    assert len(whole) == 4
    assert {p.name: data for p, data in whole.items()} == {p.name: data for p, data in resumed.items()}


@pytest.mark.slow
def test_a_folder_of_pictures_becomes_a_model(here: Path) -> None:
    pictures(here / "squares", 100)
    assert run("train", "squares", "--steps", 30, "--out", "run", cwd=here) == "run/model\n"
    made = run("generate", "a red square", "--model", "run", "--out", "red.png", cwd=here)
    assert made == "red.png\n" and Image.open(here / "red.png").size == (64, 64)
