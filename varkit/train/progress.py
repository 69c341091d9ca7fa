"""Progress of a training, and of the encoding within it, on stderr: a bar with the time left on terminals, a line every
ten seconds elsewhere.
"""

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_LINES = 10.0


def say(line: str) -> None:
    """One line on stderr."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """`advance` after each step, `note` what is known, `say` a line; `quiet` drops all but the lines said."""

    work, unit = "training", "step"
    ends = True
    """Whether the last line is printed however short the work was."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.total, self.first, self.done = total, 0, 0
        self.notes: dict[str, str] = {}
        self.quiet = quiet
        self.started = self.last_line = time.monotonic()
        self.bar: Any = None
        if not quiet and sys.stderr.isatty():
            self.bar, self.row = _rich_bar(self.work, total)

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
        elif self.ends and not self.quiet and self.done > self.first:
            self._line()

    def begin(self, step: int) -> None:
        """The steps before `step` were done earlier."""
        self.first = self.done = step
        self.started = self.last_line = time.monotonic()
        if self.bar:
            self.bar.reset(self.row, completed=step)

    def note(self, values: Mapping[str, float]) -> None:
        """Numbers to show from now on."""
        self.notes.update({name: f"{value:.4g}" for name, value in values.items()})

    def advance(self) -> None:
        """One step is done."""
        self.reach(self.done + 1)

    def reach(self, done: int) -> None:
        """So many are done."""
        self.done = done
        if self.bar:
            self.bar.update(self.row, completed=self.done, note=self._noted())
        elif not self.quiet and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def say(self, line: str) -> None:
        """Print a line, also when quiet: it is a warning."""
        if self.bar:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            say(line)

    def _noted(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self.notes.items())

    def _line(self) -> None:
        self.last_line = time.monotonic()
        per_step = (self.last_line - self.started) / max(1, self.done - self.first)
        left = timedelta(seconds=round(per_step * (self.total - self.done)))
        self.say(f"{self.unit} {self.done}/{self.total}  {self._noted()}  {left} left")


class Encoding(Progress):
    """Of pictures that are encoded, where `reach` follows each batch. One that is over at once says nothing."""

    work, unit = "encoding", "encoded"
    ends = False


def _rich_bar(work: str, total: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn(work),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )
    return bar, bar.add_task(work, total=total, note="")
