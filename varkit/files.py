"""Writing files so that nothing is ever half-written: build beside the target, fsync, rename over it.

`os.replace` within one folder is atomic, so a reader sees the old file or the whole new one. A process killed
outright (`kill -9`, power loss) can leave a hidden `.part-*` beside the target, never a torn target.
"""

import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from varkit.errors import UserError

StrPath = str | os.PathLike[str]

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_write(path: StrPath) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, with its suffix; on success it becomes `path`.

    Write the temporary file by any means. When the block raises, it is removed and `path` stays as it was.
    """
    final = _target(path)
    if final.exists() and not final.is_file():
        raise UserError(f"cannot write {str(path)!r}: it is not a regular file; choose another file name")
    with _building_beside(final) as part:
        yield part
        assert part.is_file(), f"nothing was written to the temporary file for {final}"
        _fsync(part)
        os.replace(part, final)
        _fsync_folder(final.parent)


@contextmanager
def atomic_folder(path: StrPath, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it becomes `path`.

    A folder that already has files is refused, unless `replace` says that it is the caller's own: then it is
    moved aside (whole, as `.old-*`) for the instant of the rename and removed afterwards.
    """
    final = _target(path)
    _check_folder(final, path, replace)
    with _building_beside(final) as part:
        part.mkdir()
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _fsync(file)
        old = _move_aside(final)
        try:
            os.replace(part, final)
        except BaseException:
            if old:
                os.replace(old, final)
            raise
        _fsync_folder(final.parent)
        if old:
            shutil.rmtree(old)


def write_json(path: StrPath, value: Any) -> None:
    """Write `value` as indented strict JSON (no NaN or infinity), atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def ensure_writable(path: StrPath) -> None:
    """Raise `UserError` now if `path` (a file or folder, existing or not) could not be written later.

    The nearest existing folder is probed with an unnamed file: permission bits alone say nothing to root, nor
    of a read-only disk.
    """
    final = _target(path)
    if final.exists() and not (final.is_file() or final.is_dir()):
        raise UserError(f"cannot write {str(path)!r}: it is not a regular file; choose another file name")
    folder = final if final.is_dir() else final.parent
    try:
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise UserError(
                f"cannot write {str(path)!r}: {str(folder)!r} is a file, not a folder; choose another place"
            )
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"cannot write {str(path)!r}: {reason} in {str(folder)!r}; choose another place"
        ) from error


def ensure_new_folder(path: StrPath) -> None:
    """Raise `UserError` now if `atomic_folder(path)` would refuse `path`, or could not write it."""
    _check_folder(_target(path), path, replace=False)
    ensure_writable(path)


def _check_folder(final: Path, path: StrPath, replace: bool) -> None:
    if final.exists() and not final.is_dir():
        raise UserError(f"cannot make the folder {str(path)!r}: a file has that name; choose another name")
    if not replace and final.is_dir() and any(final.iterdir()):
        raise UserError(f"the folder {str(path)!r} already has files in it; choose a new folder or empty it")


def _target(path: StrPath) -> Path:
    """Follow symbolic links, as plain `open` does: the rename must not replace the link itself."""
    return Path(os.path.realpath(Path(path).expanduser()))


@contextmanager
def _building_beside(final: Path) -> Iterator[Path]:
    part = final.parent / f".part-{secrets.token_hex(6)}{final.suffix}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield part
    except BaseException as error:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
        code = _disk_full(error)
        if code:
            raise OSError(code, os.strerror(code), str(final)) from error
        raise


def _disk_full(error: BaseException) -> int | None:
    """The errno when `error` means that the disk is full, also as Rust's safetensors words it.

    torch's own error, which it raises on closing the file, hides the one that came first.
    """
    if isinstance(error, OSError):
        return error.errno if error.errno in DISK_FULL else None
    found = next((code for code in DISK_FULL if f"(os error {code})" in str(error)), None)
    return found or (_disk_full(error.__context__) if error.__context__ else None)


def _move_aside(final: Path) -> Path | None:
    if not final.exists():
        return None
    old = final.parent / f".old-{secrets.token_hex(6)}"
    os.replace(final, old)
    return old


def _fsync(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def _fsync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere folders cannot be opened, and the rename is durable enough
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
