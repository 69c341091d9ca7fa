"""README's first screen holds what a newcomer needs, and everything it shows runs as it stands.

```python and ```console blocks are executed in the order of the page, in one empty folder, as a reader would. ```sh
blocks (a training takes long) are checked for commands and options that do not exist, and are not run.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import ROOT, Fence, check_command, commands, fences, run_python, wrong_references
from varkit.cli.main import main

README = ROOT / "README.md"
FIRST_SCREEN = 60
NOT_RUN = ("cd", "git", "pip", "python", "python3", "source", ".venv/bin/pip", ".venv/bin/python")
"""Commands of a terminal block that set things up; files they name must exist all the same."""


@pytest.fixture
def readme() -> str:
    if not README.exists():
        pytest.fail(
            "README.md is missing: it is the first thing a newcomer sees, and the package's description"
        )
    return README.read_text(encoding="utf-8")


def make_targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def run_command(words: list[str]) -> None:
    """Run `varkit ...` in this process; look the rest up."""
    line = " ".join(words)
    if words[0] == "varkit":
        assert main(words[1:]) == 0, f"{line!r} failed"
    elif words[0] == "make":
        targets = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
        assert targets <= make_targets(), f"{line!r}: the Makefile has no {targets - make_targets()}"
    else:
        assert words[0] in NOT_RUN, f"{line!r} is neither varkit nor make; put it into a ```sh block"


def run_block(block: Fence, names: dict[str, Any]) -> None:
    """Execute a block of Python, or the commands of a terminal block."""
    if block.language == "python":
        run_python(block, README, names)
        return
    for words in commands(block.text):
        run_command(words)


def test_everything_shown_runs_in_the_order_of_the_page(
    readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    for block in fences(readme, "python", "console"):
        run_block(block, names)


def test_commands_that_are_not_run_can_be_typed(readme: str):
    for block in fences(readme, "sh"):
        for words in commands(block.text):
            if words[0] == "varkit":
                check_command(words)


def test_a_newcomer_finds_the_commands(readme: str):
    shown = [words for block in fences(readme, "console") for words in commands(block.text)]
    for needed in (["make", "demo"], ["make", "test"], ["varkit", "generate"]):
        assert any(words[: len(needed)] == needed for words in shown), f"no {' '.join(needed)!r} is shown"


def test_the_first_screen_has_a_picture_commands_six_lines_of_python_and_numbers(readme: str):
    screen = "\n".join(readme.splitlines()[:FIRST_SCREEN])
    assert re.search(r"!\[[^\]]*\]\([^)]+\)|<img ", screen), "no picture"
    assert fences(screen, "console"), "no commands"
    python = fences(screen, "python")
    assert python, "no Python"
    lines = [line for line in python[0].text.splitlines() if line.strip()]
    assert len(lines) <= 6, f"{len(lines)} lines of Python, six are enough"
    assert re.search(r"^\|.*\d.*\|\s*$", screen, re.MULTILINE), "no table of numbers"
    assert re.search(r"core|CPU|GPU", screen), "measured numbers name the hardware"


def test_everything_named_exists(readme: str):
    assert not (wrong := sorted(set(wrong_references(README)))), f"README.md names what is not there: {wrong}"


def test_wrong_commands_are_noticed():
    assert {"setup", "demo", "test", "test-all", "lint"} <= make_targets()
    run_command(["make", "test", 'PYTEST_ARGS="-k plans"'])
    for words in (["make", "tests"], ["varkti", "generate"], ["varkit", "generate", "--no-such-option"]):
        with pytest.raises(AssertionError):
            run_command(words)
