"""Draw with a model of Infinity-8B's shape in limited memory: FOLDER disk|ram|none LIMIT prints what it took, as JSON.

LIMIT, in bytes, is the kernel's on the memory of this process (RLIMIT_DATA); 0 is none. `write_model` writes such a
folder without having it in memory; its weights repeat one pool of random numbers.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.programs.peak import peak_bytes
from varkit.decode.loop import run
from varkit.files import write_json
from varkit.generators.infinity import InfinityConfig
from varkit.heads.bits import BitsConfig
from varkit.hub.config import to_json
from varkit.hub.folder import CONFIG
from varkit.hub.pipeline import Settings, load
from varkit.hub.registry import type_name
from varkit.hub.states import build_empty
from varkit.plans.ratios import scales
from varkit.tokenizers.bitwise import BitwiseConfig

WORDS = 16
POOL = 2**24


def write_model(folder: Path, depth: int) -> int:
    """A folder of `depth` of the 8B model's blocks, in bfloat16; returns the bytes of its weights."""
    plan = scales(1.0, "0.06M")
    whole = InfinityConfig.published("8b")
    configs: dict[str, Any] = {
        "tokenizer": BitwiseConfig.published(14, plan.schedule, patch=2),
        "generator": InfinityConfig(
            depth, whole.width, whole.heads, whole.code_width, mlp_ratio=whole.mlp_ratio
        ),
        "head": BitsConfig(whole.width, whole.code_width),
        "plan": plan,
    }
    folder.mkdir()
    parts = {name: {"type": type_name(config), "config": to_json(config)} for name, config in configs.items()}
    defaults = to_json(Settings(guidance=3.0))
    write_json(folder / CONFIG, {"format_version": 1, "parts": parts, "defaults": defaults, "about": {}})
    built = {name: build_empty(config.build) for name, config in configs.items()}
    return sum(
        _write_random(folder / f"{name}.safetensors", part.state_dict())
        for name, part in built.items()
        if isinstance(part, nn.Module)
    )


def _write_random(file: Path, state: Mapping[str, Tensor]) -> int:
    """Normal numbers of a hundredth as bfloat16, under the names and shapes of `state`."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(0.01).bfloat16()
    header, end = {}, 0
    for name, tensor in state.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in state.values():
            for first in range(0, tensor.numel(), POOL):
                out.write(pool[: min(POOL, tensor.numel() - first)].view(torch.uint8).numpy().data)
    return end


def main(folder: Path, place: str, limit: int) -> None:
    """One picture, of random features."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    began = time.perf_counter()
    pipeline = load(folder, offload=None if place == "none" else place)
    loaded = time.perf_counter()
    features = torch.randn(1, 1, WORDS, 2048, generator=torch.Generator().manual_seed(1))
    condition = {"features": features, "mask": torch.ones(1, 1, WORDS, dtype=torch.bool)}
    state = run(pipeline.model, pipeline.start_from(condition, 0, [0], pipeline.settings))
    drawn = time.perf_counter()
    (picture,) = pipeline.pictures(state)
    assert math.isfinite(float(state.canvas.f_hat.sum()))  # type: ignore[attr-defined]
    seconds = {"load": loaded - began, "draw": drawn - loaded, "decode": time.perf_counter() - drawn}
    print(json.dumps({"peak": peak_bytes(), "picture": picture.size, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
