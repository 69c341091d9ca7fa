"""How much memory a process takes to load something and read all of it: KIND DTYPE PATH ... prints bytes, as JSON.

KIND is `folder` (a model's) or `files` (published ones); DTYPE a dtype or `own`. Memory is what is resident, pages of
mapped files included.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

from torch import nn

from tests.models import tiny_pipeline
from varkit.generators.conditioning import ClassConfig
from varkit.hub.pipeline import Pipeline, load
from varkit.hub.published import pipeline_from_published, save_published


def peak_bytes() -> int:
    """The most that was resident since the process began, or since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> int:
    """Begin anew; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"no {field} in /proc/self/status"
    return int(found[1]) * 1024


def read_all(pipeline: Pipeline) -> float:
    """Touch every page of every weight."""
    modules = [part for part in pipeline.parts.values() if isinstance(part, nn.Module)]
    return sum(float(p.detach().flatten()[::512].sum()) for module in modules for p in module.parameters())


def main(kind: str, dtype: str, paths: list[str]) -> None:
    """Load a tiny model, which imports what there is to import, then the one asked for, and print."""

    def loaded(paths: list[str]) -> Pipeline:
        wanted = None if dtype == "own" else dtype
        return load(paths[0], wanted) if kind == "folder" else pipeline_from_published(paths, wanted)

    with tempfile.TemporaryDirectory() as scratch:
        tiny_pipeline(ClassConfig(3)).save(f"{scratch}/model")
        files = save_published(load(f"{scratch}/model"), f"{scratch}/files")
        read_all(loaded([f"{scratch}/model"] if kind == "folder" else list(map(str, files))))
    before = forget_peak()
    read_all(loaded(paths))
    print(json.dumps({"grown": peak_bytes() - before}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
