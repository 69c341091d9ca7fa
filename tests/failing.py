"""Commands that must fail as every command does: one line on stderr, the documented exit code, nothing left behind.

A test file takes them by `here, fails = failing.here, failing.fails`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from varkit.cli.main import main

Fails = Callable[..., str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, where files go that are not told where to go."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fails(here: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail in one line, which is returned, with `code`, and leave no trace."""

    def run(*args: object, code: int = 2) -> str:
        before = contents(here)
        assert main([str(arg) for arg in args]) == code, capsys.readouterr()
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("varkit: error: ") and err.count("\n") == 1, err
        assert contents(here) == before
        return err

    return run


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below `folder`, hidden ones too; empty folders do not count."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
