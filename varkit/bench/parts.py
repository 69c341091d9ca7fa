"""Which part of a model the time goes to: a stack of names, each charged for the time that it is on top.

parts = Parts()
with parts.of("generator"):
    ...                      # a part within a part is charged to the inner one alone
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
REST = "rest"
"""What belongs to no part: the loop, the canvas, conversions."""


class Parts:
    """seconds: by name, since the last `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack, self._since = [REST], time.perf_counter()

    @property
    def current(self) -> str:
        """The part at work now."""
        return self._stack[-1]

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Charge what happens within to `name`."""
        self.settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self.settle()
            self._stack.pop()

    def settle(self) -> None:
        """Charge the time since the last change."""
        now = time.perf_counter()
        self.seconds[self.current] += now - self._since
        self._since = now

    def wrap(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """The function, charged to `name`."""

        def charged(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.of(name):
                return function(*args, **kwargs)

        return charged
