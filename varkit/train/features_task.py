"""Training of the default features (`varkit/evaluate/small_features.py`): what is in a picture, and what spoilt it.

A batch is scenes (half), digits and patches of photographs (a quarter each) at 64 x 64. Several things in one picture
share the probability equally. Then pictures are faded, blurred and noised, each with a chance of its own, and the
network tells how much. Legend: B batch, N scenes.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.data.real import Digits, Photographs
from varkit.data.render import BACKGROUNDS
from varkit.data.scenes import Scenes
from varkit.evaluate.small_features import COUNTS, DAMAGES, SIDE, THINGS, SmallFeatures
from varkit.files import StrPath
from varkit.hub.states import write_safetensors
from varkit.pictures import to_tensor
from varkit.ranks import current
from varkit.train.loop import load_run, train
from varkit.train.run import Request
from varkit.train.task import Phase, Task, TrainConfig

BATCH = 64
SETTINGS = TrainConfig(minutes=8, lr=1.5e-3, dtype="bfloat16", final=0.02)
HELD_OUT = 256
IGNORED = -100
"""The target of pictures that are no scenes, where only scenes have one."""

CHANCE = 1 / 3
MOST = {"fade": 0.7, "blur": 2.0, "noise": 0.3}
"""Damage at level 1: share of the contrast lost; deviations of the Gaussian kernel, in pixels, and of the noise."""

KERNEL_REACH = 5
WEIGHTS = {"things": 1.0, "background": 0.5, "number": 0.5, "damage": 8.0}


class Pictures(NamedTuple):
    """images (B, 3, 64, 64); things (B, 87), each row adding up to 1; background and number (B,); damage (B, 3)."""

    images: Tensor
    things: Tensor
    background: Tensor
    number: Tensor
    damage: Tensor


class FeaturesTask(Task):
    """Train `network`; held out are scenes of unseen content and digits of unseen writers."""

    def __init__(self, network: SmallFeatures, batch_size: int = BATCH, seed: int = 0) -> None:
        self.network, self.batch_size, self.seed = network, batch_size, seed
        self.modules = {"features": network}
        self.phases = (Phase("features", ("features",)),)
        self.recipe = {"features": "small", "batch_size": batch_size, "weights": WEIGHTS, "damage": MOST}
        self.scenes, self.held_out_scenes = Scenes("train", seed), Scenes("test", seed)
        digits = Digits()
        self.digits, self.held_out_digits = digits.split("train"), digits.split("validation")
        self.photographs = Photographs()

    def batch(self, step: int, micro: int) -> Pictures:
        """A pure function of (seed, step, micro)."""
        rng = np.random.default_rng([self.seed, step, micro])
        scenes, quarter = self.batch_size - 2 * (self.batch_size // 4), self.batch_size // 4
        clean = _joined(
            _scenes(self.scenes, rng.integers(0, 2**40, scenes)),
            _digits(self.digits, rng.integers(0, len(self.digits), quarter), rng),
            _photographs(self.photographs, rng.integers(0, len(self.photographs), quarter), rng),
        )
        return damaged(clean, rng)

    def loss(self, phase: str, batch: Pictures, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Cross-entropies of what is there, and the squared error of the damage."""
        losses = self._losses(batch)
        total = torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum()
        return total, {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The losses, and how often the likeliest thing is there, on undamaged and damaged held-out pictures."""
        rng = np.random.default_rng(0)
        clean = _joined(
            _scenes(self.held_out_scenes, np.arange(HELD_OUT)),
            _digits(self.held_out_digits, np.arange(min(HELD_OUT, len(self.held_out_digits))), None),
        )
        found = self.network.heads(clean.images).things.argmax(dim=1)
        right = clean.things.gather(1, found[:, None]) > 0
        losses = self._losses(damaged(clean, rng))
        return {"things_right": right.float().mean().item()} | {k: v.item() for k, v in losses.items()}

    def _losses(self, batch: Pictures) -> dict[str, Tensor]:
        heads = self.network.heads(batch.images.to(self.network.stem.weight.dtype))
        return {
            "things": F.cross_entropy(heads.things.float(), batch.things),
            "background": F.cross_entropy(heads.background.float(), batch.background, ignore_index=IGNORED),
            "number": F.cross_entropy(heads.number.float(), batch.number, ignore_index=IGNORED),
            "damage": F.mse_loss(heads.damage.float(), batch.damage),
        }


def train_features(out: StrPath, request: Request, resume: bool = False) -> Path:
    """Train in the folder `out`; returns the weights there, float16, for `load_features`."""
    torch.manual_seed(request.seed)
    task = FeaturesTask(SmallFeatures(), request.micro_batch(BATCH), request.seed)
    result = train(task, request.apply(SETTINGS, share=1.0), out, resume)
    weights = load_run(result.path)["features"]
    path = result.path / "features.safetensors"
    if current().first:
        write_safetensors(path, {name: value.half() for name, value in weights.items()})
    return path


def damaged(clean: Pictures, rng: np.random.Generator) -> Pictures:
    """Fade, blur and noise the pictures, each with a chance of `CHANCE` and at a uniform level."""
    shape = (len(clean.images), len(DAMAGES))
    levels = rng.random(shape) * (rng.random(shape) < CHANCE)
    damage = torch.from_numpy(levels).float()
    amounts = {name: damage[:, k, None, None, None] * MOST[name] for k, name in enumerate(DAMAGES)}
    noise = torch.from_numpy(rng.standard_normal(clean.images.shape, np.float32))
    middle = clean.images.mean(dim=(2, 3), keepdim=True)
    images = _blurred(middle + (clean.images - middle) * (1 - amounts["fade"]), amounts["blur"].flatten())
    return clean._replace(images=(images + noise * amounts["noise"]).clamp(-1, 1), damage=damage)


def _blurred(images: Tensor, deviations: Tensor) -> Tensor:
    """Gaussian blur of (B, 3, H, W), with a deviation (B,) in pixels for each picture; 0 leaves it as it is."""
    batch, channels = images.shape[:2]
    places = torch.arange(-KERNEL_REACH, KERNEL_REACH + 1)
    kernels = torch.exp(-(places**2) / (2 * deviations.clamp(min=1e-3)[:, None] ** 2))
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    flat = F.pad(
        images.reshape(1, batch * channels, *images.shape[2:]), (KERNEL_REACH,) * 4, mode="replicate"
    )
    flat = F.conv2d(flat, kernels[:, None, None, :], groups=batch * channels)
    return F.conv2d(flat, kernels[:, None, :, None], groups=batch * channels).reshape(images.shape)


def _scenes(scenes: Scenes, numbers: np.ndarray) -> Pictures:
    chosen = [scenes[int(number)] for number in numbers]
    things = torch.zeros(len(chosen), len(THINGS))
    for row, scene in zip(things, chosen, strict=True):
        for thing in scene.content:
            row[THINGS.index(thing)] += 1 / len(scene.content)
    backgrounds = list(BACKGROUNDS)
    return Pictures(
        to_tensor(np.stack([scene.image(SIDE) for scene in chosen])),
        things,
        torch.tensor([backgrounds.index(scene.background) for scene in chosen]),
        torch.tensor([min(len(scene.objects), COUNTS) - 1 for scene in chosen]),
        torch.zeros(len(chosen), len(DAMAGES)),
    )


def _digits(digits: Digits, rows: np.ndarray, rng: np.random.Generator | None) -> Pictures:
    crops = None if rng is None else rng.random((len(rows), 2))
    batch = digits.batch(rows.tolist(), (SIDE, SIDE), crops)
    assert batch.labels is not None
    return _labelled(batch.images, [THINGS.index(f"digit {label}") for label in batch.labels])


def _photographs(photographs: Photographs, rows: np.ndarray, rng: np.random.Generator) -> Pictures:
    batch = photographs.batch(rows.tolist(), (SIDE, SIDE), rng.random((len(rows), 2)))
    return _labelled(batch.images, [THINGS.index(photographs.patches[row][0]) for row in rows])


def _labelled(images: np.ndarray, things: list[int]) -> Pictures:
    """Pictures of one thing each that are no scenes."""
    nothing = torch.full((len(things),), IGNORED)
    one_hot = F.one_hot(torch.tensor(things), len(THINGS)).float()
    return Pictures(to_tensor(images), one_hot, nothing, nothing, torch.zeros(len(things), len(DAMAGES)))


def _joined(*parts: Pictures) -> Pictures:
    return Pictures(*map(torch.cat, zip(*parts, strict=True)))
