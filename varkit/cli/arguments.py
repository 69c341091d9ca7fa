"""From words on the command line to a command dataclass, by tyro; a mistake becomes one `UserError` line.

tyro prints mistakes as a multi-line box and exits. The box is caught (by a stream that is no terminal, hence
plain ASCII) and its message becomes the line; unknown options are named first, with the nearest known ones.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import tyro

from varkit.errors import UserError, unknown_name

T = TypeVar("T")

MARKERS = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)


def wants_help(args: Sequence[str]) -> bool:
    """Whether help was asked for anywhere among the options."""
    return "-h" in args or "--help" in args


def print_help(command: type, prog: str) -> None:
    """Print the help of `command` to stdout."""
    with contextlib.suppress(SystemExit):
        tyro.cli(command, prog=prog, args=["--help"], config=MARKERS)


def parse(command: type[T], prog: str, args: Sequence[str]) -> T:
    """Build `command` from `args`, or raise `UserError` in one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stdout(box), contextlib.redirect_stderr(box), _columns(10_000):
            return tyro.cli(command, prog=prog, args=list(args), config=MARKERS)
    except SystemExit:
        _check_options(command, prog, args)
        line = _unboxed(box.getvalue()).removeprefix(f"Error parsing {command.__name__}: ")
        raise UserError(f"{line}; see {prog} --help") from None


def _check_options(command: type, prog: str, args: Sequence[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as text, _columns(10_000):
        print_help(command, prog)
    known = set(re.findall(r"(?<!\S)(--?[a-z][\w-]*)", text.getvalue()))
    for word in args:
        name = word.partition("=")[0].replace("_", "-")
        if re.match(r"--?[a-zA-Z]", name) and name not in known:
            raise unknown_name("option", name, known, hint=f"(see {prog} --help)")


def _unboxed(box: str) -> str:
    """The message in tyro's box (rulers part title, message, and the help of the option), as one line."""
    sections = [
        [row.strip() for row in section.splitlines() if row.strip()]
        for section in re.split(r"\n\s*-{3,}\s*\n", box)
    ]
    if len(sections) < 2:
        return " ".join(box.split())
    message = sections[1]
    if message[0].startswith("Missing from"):
        return "missing: " + ", ".join(row for row in message[1:] if not row.endswith("(required)"))
    if message[0].startswith("Unrecognized options: "):
        words = message[0].partition(": ")[2].split(", ")
        return f"unexpected {' '.join(words)!r}; words that belong together need quotes around them"
    value_error = re.match(r"Error parsing \S+: (.*?)\.?$", message[0])
    if value_error and sections[2][0] == "Argument helptext:":
        return f"wrong value for {sections[2][1]}: {value_error[1]}"
    return " ".join(message).rstrip(".")


@contextlib.contextmanager
def _columns(width: int) -> Iterator[None]:
    """tyro asks the terminal, hence COLUMNS, how wide to wrap; a wrapped path could not be joined again."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
