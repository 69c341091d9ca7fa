"""The scenes world as a data set: endless captioned pictures, rendered at whatever side is asked for."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from varkit.data.base import Batch, Dataset, Report, Side
from varkit.data.scenes import Scenes


class SceneSet:
    """`split("validation")` gives unseen combinations of objects (the scenes' test split). tidy: `Scenes.tidy`."""

    size: int | None = None
    class_names: list[str] | None = None

    def __init__(self, split: str = "train", seed: int = 0, tidy: bool = False) -> None:
        self.scenes = Scenes(split, seed, tidy=tidy)
        self.report = Report()

    def batch(self, indices: Sequence[int], side: Side, crops: np.ndarray | None = None) -> Batch:
        """Pictures (B, h, w, 3) and captions; nothing is cropped, since a scene is drawn at its side."""
        scenes = [self.scenes[int(i)] for i in indices]
        images = np.stack([scene.image(side) for scene in scenes])
        return Batch(images, None, [scene.caption for scene in scenes])

    def split(self, part: Literal["train", "validation"]) -> Dataset:
        """The other split of the same world and seed."""
        return SceneSet("train" if part == "train" else "test", self.scenes.seed, self.scenes.tidy)
