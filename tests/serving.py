"""A server in a process of its own, as a user would start it."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS_TO_START = 240


class Server:
    """`varkit serve` with these options, listening at `address` (http://HOST:PORT/v1)."""

    def __init__(self, *options: str, keys: str = "") -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "VARKIT_API_KEYS": keys}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "varkit", "serve", *options],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        late = threading.Timer(SECONDS_TO_START, self.process.kill)
        late.start()
        lines = ""
        for line in self.process.stdout:  # Ray may say something first
            lines += line
            if found := re.search(r"http://\S+/v1", line):
                self.address = found[0]
                break
        late.cancel()
        if not hasattr(self, "address"):
            raise AssertionError(f"the server did not start: {lines}{self.process.communicate()[1][-2000:]}")

    @property
    def port(self) -> str:
        """Where it listens."""
        return self.address.rpartition(":")[2].partition("/")[0]

    def end(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Stop it; its exit code and what it said on stderr."""
        self.process.send_signal(how)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@contextmanager
def server(*options: str, keys: str = "") -> Iterator[Server]:
    """A server that is killed behind the block, unless it has ended."""
    started = Server(*options, keys=keys)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.communicate()
