"""Weights made from their names, so that full-size reference cases need no weight files.

Each tensor is drawn from NumPy's default generator seeded by [seed, CRC-32 of its name], then scaled by its role:
matrices and convolutions keep unit variance, tables get half, norm scales are one plus a tenth of it, biases a tenth.
"""

import zlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

IMAGE_STREAM = 7
"""Second word of the seed of test images."""


def fill_array(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The float32 array that stands for tensor `name`."""
    if name.endswith("running_var"):
        return np.ones(shape, dtype=np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    normal = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) < 2:
        centre = 1.0 if name.endswith(".weight") else 0.0
        return np.float32(centre) + np.float32(0.1) * normal
    if shape[0] == 1 or "embed" in name or name.endswith("_emb.weight"):
        return normal * np.float32(0.5)
    return normal / np.float32(np.sqrt(np.prod(shape[1:])))


def image_array(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Test images (B, 3, H, W) in [-1, 1]: a plane wave in each channel, plus noise."""
    batch, channels, height, width = shape
    rng = np.random.default_rng([seed, IMAGE_STREAM])
    y, x = np.mgrid[:height, :width].astype(np.float32) / np.float32(max(height, width))
    waves = np.empty(shape, dtype=np.float32)
    for plane in waves.reshape(batch * channels, height, width):
        fx, fy, phase = rng.uniform(1, 6, size=3).astype(np.float32)
        plane[:] = np.sin(np.float32(2 * np.pi) * (fx * x + fy * y) + phase)
    noise = rng.uniform(-1, 1, size=shape).astype(np.float32)
    return np.clip(np.float32(0.8) * waves + np.float32(0.2) * noise, -1, 1)


def filled_state(
    keys: Mapping[str, Any], seed: int, leave_out: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """A state dict for {name: [shape, dtype]}, without the names in `leave_out`."""
    return {
        name: torch.from_numpy(fill_array(name, tuple(shape), seed))
        for name, (shape, _) in keys.items()
        if name not in leave_out
    }
