"""Run a module in a process of its own: with torchrun, alone to be measured, or as a command that is to be stopped."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def launch(ranks: int, module: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """`ranks` processes of one thread each, which must succeed; more than one by torchrun."""
    # What follows -- is the module's own: torchrun would take --n for one of its options.
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "--"]
    module_and_arguments = [*(torchrun if ranks > 1 else ["-m"]), module, *map(str, arguments)]
    done = _run(module_and_arguments, threads=1)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def measured(program: str, *arguments: object, fails: bool = False) -> dict[str, Any]:
    """What a program of tests/programs prints; of one that fails, the end of what it says."""
    done = _run(["-m", f"tests.programs.{program}", *map(str, arguments)], threads=2)
    assert (done.returncode != 0) == fails, done.stderr[-4000:]
    return {"error": done.stderr[-4000:]} if fails else json.loads(done.stdout.splitlines()[-1])


def start(*args: object, cwd: Path) -> "subprocess.Popen[str]":
    """`varkit` with these arguments, of one thread, in a group of processes of its own, as in a terminal."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "varkit", *map(str, args)],
        cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 300) -> None:
    """Raise `AssertionError` if the process ends, or the time, before the condition holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "it takes too long"
        time.sleep(0.01)


def _run(arguments: list[str], threads: int) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=600,
    )
