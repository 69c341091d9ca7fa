"""How much memory loading takes, measured in processes of their own: at most 1.15 times the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import measured
from varkit.generators.conditioning import ClassConfig
from varkit.generators.var import VARConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.published import save_published
from varkit.plans.scales import ScalesConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of a process's memory"
)
ALLOWED = 1.15


def pipeline(width: int) -> Pipeline:
    """Random weights; nearly all of them in the generator."""
    conv = ConvConfig(channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=8)
    generator = VARConfig.published(8, (1, 2, 3), width=width, code_width=8, condition=ClassConfig(10))
    configs: dict[str, Any] = {
        "tokenizer": MultiScaleVQConfig(conv, 64, 8, (1, 2, 3)),
        "generator": generator,
        "head": CategoricalConfig(width, 64),
        "plan": ScalesConfig((1, 2, 3)),
    }
    torch.manual_seed(0)
    return Pipeline({name: config.build() for name, config in configs.items()}, configs, Settings())


def weights(model: Pipeline, width: int = 4) -> int:
    """Bytes of all parameters, at `width` bytes each."""
    parts = (model.generator, model.tokenizer, model.parts["head"])
    return width * sum(p.numel() for part in parts for p in part.parameters())


@pytest.mark.parametrize("dtype, width", [("own", 4), ("bfloat16", 2)])
def test_loading_a_folder(dtype: str, width: int, tmp_path: Path):
    model = pipeline(384)  # 85 MB
    model.save(tmp_path / "model")
    assert (
        measured("peak", "folder", dtype, tmp_path / "model")["grown"] < ALLOWED * weights(model, width) + 4e6
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["own", "bfloat16", "float32"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_loading_large_models(dtype: str, stored: torch.dtype, tmp_path: Path):
    """0.34 GB as float32: a folder, and published files, which are read whole before they become smaller."""
    model = pipeline(768).to(stored)
    model.save(tmp_path / "model")
    files = save_published(model, tmp_path / "files")
    size = sum(file.stat().st_size for file in files)
    held = weights(model, {"own": stored.itemsize, "bfloat16": 2, "float32": 4}[dtype])
    assert measured("peak", "folder", dtype, tmp_path / "model")["grown"] < ALLOWED * held
    assert measured("peak", "files", dtype, *files)["grown"] < ALLOWED * max(size, held)
