"""Files appear whole or not at all: after errors, on a full disk, at Ctrl-C and `kill -9`."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from varkit.errors import UserError
from varkit.files import atomic_folder, atomic_write, ensure_writable, write_json


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def child(code: str, *args: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_write_appears_whole_with_its_parents_and_usual_permissions(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "a.png"
    with atomic_write(target) as part:
        assert part.suffix == ".png" and part.parent == target.parent
        part.write_bytes(b"picture")
        assert not target.exists()
    assert target.read_bytes() == b"picture"
    assert names(target.parent) == {"a.png"}
    plain = tmp_path / "plain"
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(type(error)), atomic_write(target) as part:
        part.write_text("ne")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), Exception("I/O error: No space left (os error 28)")],
    ids=["python", "rust"],
)
def test_full_disk_names_the_target(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "a.bin"
    with pytest.raises(OSError) as caught, atomic_write(target) as part:
        part.write_text("half")
        raise error
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(target)
    assert names(tmp_path) == set()


def test_real_size_limit_ends_a_command_with_one_line(tmp_path: Path) -> None:
    code = """
import resource, sys
from varkit.cli.runner import run_guarded
from varkit.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
def command():
    with atomic_write(sys.argv[1]) as part:
        part.write_bytes(bytes(10**6))
sys.exit(run_guarded(command))
"""
    target = tmp_path / "big.bin"
    process = child(code, target)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert stderr.count("\n") == 1 and str(target) in stderr and "free some space" in stderr
    assert names(tmp_path) == set()


@pytest.mark.parametrize("kind", ["atomic_write", "atomic_folder"])
def test_kill_leaves_no_half_file_under_the_final_name(tmp_path: Path, kind: str) -> None:
    code = f"""
import sys, time
from varkit.files import {kind} as atomic
with atomic(sys.argv[1]) as part:
    (part / "inner" if part.is_dir() else part).write_text("half")
    print("written", flush=True)
    time.sleep(60)
"""
    target = tmp_path / "result"
    process = child(code, target)
    assert process.stdout and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert not target.exists()
    assert all(name.startswith(".part-") for name in names(tmp_path))


def test_link_is_followed_and_devices_are_refused(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    with atomic_write(link) as part:
        part.write_text("new")
    assert link.is_symlink() and real.read_text() == "new"
    with pytest.raises(UserError, match="not a regular file"), atomic_write("/dev/null"):
        pass
    with pytest.raises(UserError, match="not a regular file"):
        ensure_writable("/dev/null")


def test_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "model"
    with atomic_folder(target) as part:
        (part / "sub").mkdir()
        (part / "sub" / "config.json").write_text("{}")
        assert not target.exists()
    assert names(tmp_path) == {"runs", "runs/model", "runs/model/sub", "runs/model/sub/config.json"}


def test_folder_with_files_is_refused_unless_it_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with atomic_folder(target) as part:  # an empty folder is no loss
        (part / "old").touch()
    with pytest.raises(UserError, match="already has files"), atomic_folder(target):
        pass
    with atomic_folder(target, replace=True) as part:
        (part / "new").touch()
    assert names(tmp_path) == {"model", "model/new"}


def test_failed_replacement_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as part:
        (part / "old").touch()
    with pytest.raises(KeyboardInterrupt), atomic_folder(target, replace=True) as part:
        (part / "new").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == {"model", "model/old"}

    rename = os.replace

    def fail_on_the_new_one(source: Path, to: Path) -> None:
        if source.name.startswith(".part-"):
            raise OSError(errno.EIO, "broken disk")
        rename(source, to)

    monkeypatch.setattr(os, "replace", fail_on_the_new_one)
    with pytest.raises(OSError, match="broken disk"), atomic_folder(target, replace=True) as part:
        (part / "new").touch()
    assert names(tmp_path) == {"model", "model/old"}


def test_json_is_strict_and_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, 2.5, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"é": [1, 2.5, None]} and "é" in text and text.endswith("\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", {"loss": float("nan")})
    assert names(tmp_path) == {"a.json"}


def test_ensure_writable_leaves_no_trace(tmp_path: Path) -> None:
    ensure_writable(tmp_path)
    ensure_writable(tmp_path / "new" / "deep" / "a.png")
    assert names(tmp_path) == set()


def test_ensure_writable_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, not a folder"):
        ensure_writable(tmp_path / "file" / "a.png")


@pytest.fixture
def forbidden_folder() -> Iterator[Path]:
    """A folder in which this process may not write, also when the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
            try:
                yield Path(name)
            finally:
                os.seteuid(0)
        else:
            yield Path(name)
            os.chmod(name, 0o755)


def test_forbidden_folder(forbidden_folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        ensure_writable(forbidden_folder / "new" / "a.png")
    message = str(caught.value)
    assert "permission denied" in message and str(forbidden_folder) in message and "\n" not in message
    with pytest.raises(PermissionError), atomic_write(forbidden_folder / "a.png") as part:
        part.touch()
