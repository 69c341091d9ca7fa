"""`varkit version`: what is installed and on which machine, for bug reports; torch is not even imported."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from varkit import __version__
from varkit.cli.console import print_json
from varkit.hardware import hardware


@dataclass(frozen=True)
class Version:
    """Show the versions of varkit, Python and torch, and the machine."""

    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        facts = {
            "varkit": __version__,
            "python": platform.python_version(),
            "torch": _installed("torch"),
            "threads": _threads(),
            "hardware": hardware(),
        }
        if self.json:
            print_json(facts)
        else:
            print("\n".join(f"{name}: {value or 'not installed'}" for name, value in _flat(facts)))


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _threads() -> int:
    """The threads that torch will take: OMP_NUM_THREADS, else the processors this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit():
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _flat(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        rows += _flat(value) if isinstance(value, dict) else [(name, value)]
    return rows
