"""The time budget skips only slow tests that begin too late, says so loudly, and hides no failure."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

TESTS = """
import time, pytest

@pytest.mark.slow
def test_first():
    time.sleep(0.3)
    assert {first}

@pytest.mark.slow
def test_late(): pass

def test_quick(): pass
"""


def run(folder: Path, first: bool, *options: str) -> tuple[int, str]:
    (folder / "test_example.py").write_text(TESTS.format(first=first))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow: slow\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.time_budget",
        "--rootdir",
        str(folder),
        str(folder),
    ]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_late_slow_tests_are_reported_as_not_run(tmp_path: Path) -> None:
    code, text = run(tmp_path, True, "--slow-budget", "0.3")
    assert code == 0
    assert "1 slow tests NOT RUN" in text and "NOT RUN test_example.py::test_late" in text
    assert "2 passed, 1 skipped" in text.splitlines()[-1]


def test_failure_before_the_budget_is_a_failure(tmp_path: Path) -> None:
    code, text = run(tmp_path, False, "--slow-budget", "0.3")
    assert code == 1
    assert "1 failed, 1 passed, 1 skipped" in text.splitlines()[-1]


def test_without_a_budget_all_run(tmp_path: Path) -> None:
    code, text = run(tmp_path, True)
    assert code == 0 and "3 passed" in text.splitlines()[-1]
