"""What a next-scale model costs under its plan, at any size: random weights, since neither time nor memory asks more.

Memory is the most that becomes resident in a process of its own (Linux). Times of alternatives are taken in turn.
Legend: B samples.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import linear_regression, median
from typing import TYPE_CHECKING

from varkit.generators.conditioning import ClassConfig
from varkit.generators.var import VARConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.plans.refined import RefinedConfig
from varkit.plans.scales import ScalesConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig

if TYPE_CHECKING:
    from varkit.train.lessons import Lessons

CODES, CODE_WIDTH = 256, 8


@dataclass(frozen=True)
class Work:
    """A next-scale network under a plan: decoding draws B guided pictures, `train` takes one step over B.

    VAR's of depth, width and heads, or `generator`, which has its own. A plan that refines scales trains first guesses.
    mixed: training takes the scales apart, and its step is the one of most tokens.
    """

    plan: ScalesConfig
    depth: int = 8
    width: int = 256
    heads: int = 4
    batch: int = 4
    mixed: bool = False
    train: bool = False
    codes: int = CODES
    generator: VARConfig | None = None

    @cached_property
    def pipeline(self) -> Pipeline:
        """The model; its tokenizer is as small as can be."""
        schedule = self.plan.schedule
        generator = self.generator or VARConfig(
            self.depth, self.width, self.heads, schedule, CODE_WIDTH, ClassConfig(10)
        )
        conv = ConvConfig(8, multipliers=(1, 2), res_blocks=1, latent_channels=CODE_WIDTH, attention=False)
        head = CategoricalConfig(generator.width, self.codes)
        configs = {
            "tokenizer": MultiScaleVQConfig(conv, self.codes, generator.code_width, schedule),
            "generator": generator,
            "head": head,
            "plan": self.plan,
        } | ({"head_mask": head} if isinstance(self.plan, RefinedConfig) else {})
        parts = {name: config.build() for name, config in configs.items()}  # type: ignore[attr-defined]
        return Pipeline(parts, configs, Settings(guidance=2.0))

    def __call__(self) -> None:
        """Do it once."""
        self._train() if self.train else self._decode()

    def carried(self) -> float:
        """Megabytes of keys and values that lie in the cache at the end of decoding."""
        return self._decode() / 1e6

    def _decode(self) -> int:
        from varkit.decode.loop import run

        state = self.pipeline.start([0] * self.batch)
        return run(self.pipeline.model, state).cache.nbytes

    @cached_property
    def _lessons(self) -> "Lessons":
        """Made once, as in training: the packed plan, with its mask, is no part of a step."""
        from varkit.train.lessons import WholePlan
        from varkit.train.masked_scales import FirstGuesses
        from varkit.train.mixed_scales import MixedScales

        whole = FirstGuesses if isinstance(self.plan, RefinedConfig) else WholePlan
        return (MixedScales if self.mixed else whole)(self.pipeline.tokenizer, self.pipeline.parts["plan"])

    def _train(self) -> None:
        import torch

        from varkit.train.objective import NextStepLoss

        pipeline, lessons = self.pipeline, self._lessons
        total = pipeline.parts["plan"].schedule.total
        latents = {"ids": torch.randint(0, self.codes, (self.batch, total))}
        steps = [lessons.lesson(latents, step) for step in range(len(getattr(lessons, "round", [0])))]
        largest = max(steps, key=lambda lesson: len(lesson.step.target))
        objective = NextStepLoss(pipeline.generator, pipeline.model.heads["main"]).train()
        objective(largest, {"label": torch.zeros(self.batch, dtype=torch.int64)}).backward()
        objective.zero_grad()


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of values ~ sizes^p, by least squares in logarithms."""
    return linear_regression([log(s) for s in sizes], [log(v) for v in values]).slope


def seconds(works: Sequence[Callable[[], object]], rounds: int = 5) -> list[float]:
    """Median seconds of each, taken in turn after a first round."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for found, work in zip(times, works, strict=True):
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
    return [median(found[1:]) for found in times]


def peak_memory(work: Work) -> float:
    """Megabytes that a process grows by to build the model and do the work."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, work), daemon=True)
    process.start()
    try:
        return float(ours.recv())
    finally:
        process.join()


def _measure(line: Connection, work: Work) -> None:
    tiny = Work(ScalesConfig((1, 2)), depth=1, width=32, batch=1, train=work.train)
    tiny()  # what is loaded once
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    line.send((_status("VmHWM") - before) / 1e6)


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
