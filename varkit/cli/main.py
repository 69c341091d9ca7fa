"""The `varkit` command: finds the command named first, reads its options, runs it.

A command is one file in `varkit/cli/` with one frozen dataclass: its docstring and its fields' docstrings are
the help, `run` does the work and returns the exit code (None is 0). The file imports only light things at its
top, so that `varkit --help` stays quick; whatever needs torch is imported inside `run`. A worked example:

    # varkit/cli/shout.py
    "`varkit shout`: say a text loudly."

    from dataclasses import dataclass
    from pathlib import Path

    from tyro.conf import Positional

    from varkit.cli.console import log, print_json, progress
    from varkit.errors import UserError
    from varkit.files import atomic_write, ensure_writable

    @dataclass(frozen=True)
    class Shout:
        "Say a text loudly."                     # the line in `varkit --help`

        text: Positional[str | None] = None      # varkit shout [TEXT]; without a default: required
        \"\"\"What to say.\"\"\"
        out: Path | None = None                  # --out PATH
        \"\"\"Write it to this file too.\"\"\"
        times: int = 1                           # --times INT
        \"\"\"How often.\"\"\"
        json: bool = False                       # --json
        \"\"\"Print one JSON object.\"\"\"

        def __post_init__(self) -> None:
            if self.times < 1:
                raise UserError(f"--times is {self.times}; it must be at least 1")

        def run(self) -> None:
            import torch                         # heavy, so only here

            if self.out:
                ensure_writable(self.out)        # before the work, not after it
            loud = (self.text or "hello").upper()
            with progress("shouting", self.times) as advance:
                for _ in range(self.times):
                    advance()
            if self.out:
                with atomic_write(self.out) as part:
                    part.write_text(loud)
            print_json({"text": loud}) if self.json else print(loud)

and its row in `COMMANDS`: `"shout": "varkit.cli.shout:Shout"`. A command of several methods has a static
`narrowed(name)` too, which gives the command of the method named first (`varkit adapt sar ...`). Errors and exit codes
are the runner's.
"""

import importlib
import sys
from collections.abc import Sequence
from inspect import getdoc
from typing import Protocol

from varkit import __version__
from varkit.cli.runner import EXIT_CODES, run_guarded
from varkit.errors import UserError, unknown_name

COMMANDS: dict[str, str] = {
    "adapt": "varkit.cli.adapt:Adapt",
    "bench": "varkit.cli.bench:Bench",
    "convert": "varkit.cli.convert:Convert",
    "edit": "varkit.cli.edit:Edit",
    "embed": "varkit.cli.embed:Embed",
    "evaluate": "varkit.cli.evaluate:Evaluate",
    "generate": "varkit.cli.generate:Generate",
    "reproduce": "varkit.cli.reproduce:Reproduce",
    "serve": "varkit.cli.serve:Serve",
    "studio": "varkit.cli.studio:Studio",
    "systems": "varkit.cli.systems:Systems",
    "train": "varkit.cli.train:Train",
    "verify": "varkit.cli.verify:Verify",
    "version": "varkit.cli.version:Version",
}


class Command(Protocol):
    """What a command's dataclass provides."""

    def run(self) -> int | None:
        """Do the work; the exit code, None meaning 0."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run `varkit` with `argv` (those of the process by default) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = [word for word in words if word != "--debug"]
    return run_guarded(lambda: _dispatch(args), debug=len(args) < len(words))


def _dispatch(args: list[str]) -> int | None:
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if args[0] == "--version":
        print(f"varkit {__version__}")
        return 0
    name, options = args[0], args[1:]
    if name.startswith("-"):
        raise UserError(
            f"{name!r} stands before the command; write: varkit COMMAND {name} (see varkit --help)"
        )
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS, hint="(see varkit --help)")

    from varkit.cli.arguments import parse, print_help, wants_help

    command, prog = _load(name), f"varkit {name}"
    narrowed = getattr(command, "narrowed", None)
    if narrowed and options and not options[0].startswith("-"):
        command, prog, options = narrowed(options[0]), f"{prog} {options[0]}", options[1:]
    if wants_help(options):
        print_help(command, prog)
        return 0
    return parse(command, prog, options).run()


def _load(name: str) -> type[Command]:
    module, _, attribute = COMMANDS[name].partition(":")
    command: type[Command] = getattr(importlib.import_module(module), attribute)
    return command


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {(getdoc(_load(name)) or '').partition(chr(10))[0]}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: varkit COMMAND [OPTIONS]",
            "",
            "Visual autoregressive models: make, edit and measure pictures, train and compare models.",
            "",
            "commands:",
            *rows,
            "",
            "varkit COMMAND --help explains a command; --debug, anywhere, shows tracebacks; --version.",
            f"exit codes: {EXIT_CODES}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
