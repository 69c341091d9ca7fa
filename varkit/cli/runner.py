"""How a command ends: its exit code, and one line on stderr when something went wrong.

A traceback is printed only with `--debug`.
"""

import contextlib
import errno
import io
import select
import sys
import traceback
from collections.abc import Callable

from varkit.errors import UserError
from varkit.files import DISK_FULL

BROKE, WRONG_INPUT, INTERRUPTED, READER_LEFT = 1, 2, 130, 141
EXIT_CODES = "0 done, 1 something broke, 2 the input was wrong, 130 Ctrl-C, 141 the reader of stdout left"
"""What users are told of them, in `varkit --help` and README."""

PATH_PROBLEMS: dict[type[OSError], str] = {
    FileNotFoundError: "no such file or folder: {path!r}; check the path",
    PermissionError: "permission denied: {path!r}; check its permissions or choose another path",
    IsADirectoryError: "{path!r} is a folder; give the path of a file",
    NotADirectoryError: "{path!r} is a file; give the path of a folder",
    FileExistsError: "{path!r} already exists; choose another path or remove it",
}

EXTRA_OF_MODULE = {
    "datasets": "data",
    "fastapi": "serve",
    "gradio": "studio",
    "matplotlib": "plots",
    "prometheus_client": "serve",
    "ray": "ray",
    "skimage": "data",
    "sklearn": "data",
    "transformers": "text",
    "uvicorn": "serve",
}


def run_guarded(command: Callable[[], int | None], debug: bool = False) -> int:
    """Run `command` and return the exit code; what it raises becomes one line on stderr."""
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return READER_LEFT
        code, line = explain(error)
        with contextlib.suppress(OSError):  # stderr may be gone too; the exit code still tells
            if debug:
                traceback.print_exc()
            print("varkit: " + " ".join(line.split()), file=sys.stderr)
        return code


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for `error`."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted; {error if error.args else 'nothing was left half-written'}"
    if isinstance(error, UserError) or (isinstance(error, ValueError) and _raised_by_varkit(error)):
        return WRONG_INPUT, f"error: {error}"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = repr(error.filename) if error.filename else "the output"
        reason = (error.strerror or "disk full").lower()
        return BROKE, f"error: {reason} while writing {where}; free some space or write to another disk"
    if isinstance(error, OSError) and error.filename and type(error) in PATH_PROBLEMS:
        return WRONG_INPUT, "error: " + PATH_PROBLEMS[type(error)].format(path=str(error.filename))
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return (
            WRONG_INPUT,
            f"error: file name too long: {str(error.filename)[:60]!r} ...; choose a shorter one",
        )
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if extra := EXTRA_OF_MODULE.get(module):
            return BROKE, f"error: this needs the package {module!r}; run: pip install 'varkit[{extra}]'"
    message = f"{type(error).__name__}: {str(error)[:500]}".rstrip(":. \n")
    return BROKE, f"error: {message}; run with --debug for the traceback"


def _raised_by_varkit(error: BaseException) -> bool:
    """Whether varkit's own code raised it: its `ValueError`s are written for users, a library's are not."""
    frames = traceback.walk_tb(error.__traceback__)
    modules = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    return bool(modules) and modules[-1].partition(".")[0] == "varkit"


def _reader_left() -> bool:
    """Whether stdout or stderr is the broken pipe, rather than, say, a pipe to a worker that died."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(io.UnsupportedOperation):  # a stream without a file cannot break
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
