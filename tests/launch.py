"""Run a module as a user would start it with torchrun, or alone."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launch(ranks: int, module: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """`ranks` processes of one thread each, which must succeed; more than one by torchrun."""
    # What follows -- is the module's own: torchrun would take --n for one of its options.
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "--"]
    done = subprocess.run(
        [sys.executable, *(torchrun if ranks > 1 else ["-m"]), module, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done
