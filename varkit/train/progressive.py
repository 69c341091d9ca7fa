"""VAR's progressive training (arXiv 2404.02905, released code): coarse scales first, finer ones join in turn."""

import math

from varkit.train.task import TrainConfig


class Progressive:
    """VAR's progressive training: scales join one by one, and the newest scale's loss is ramped from 0.01 to 1.

    first: active scales until the warm-up ends (the published index pg0 = 4 is five scales); from there their number
    grows linearly, rounded, to all at step `fraction` x steps. ramp: steps for which a scale is new; the scales active
    from the start are not.
    """

    def __init__(
        self, levels: int, steps: int, first: int = 5, fraction: float = 0.8, warmup: int = 0, ramp: int = 1
    ) -> None:
        self.levels, self.first, self.warmup, self.ramp = levels, min(first, levels), warmup, max(1, ramp)
        self.end = max(warmup + 1, round(fraction * steps))

    @classmethod
    def over(cls, levels: int, config: TrainConfig, fraction: float) -> "Progressive":
        """Published proportions for a run whose steps are known: a ramp of 1/300 of the run after the warm-up."""
        assert config.steps is not None
        warm = config.warmup if isinstance(config.warmup, int) else round(config.warmup * config.steps)
        return cls(levels, config.steps, fraction=fraction, warmup=warm, ramp=config.steps // 300)

    def at(self, step: int) -> tuple[int, float]:
        """Active levels and the weight of the newest at a training step."""
        levels = self._levels(step)
        if levels == self.first:
            return levels, 1.0
        joined = self.warmup + (levels - self.first - 0.5) / (self.levels - self.first) * (
            self.end - self.warmup
        )
        return levels, min(1.0, max(0.01, (step - joined) / self.ramp))

    def _levels(self, step: int) -> int:
        if step < self.warmup:
            return self.first
        part = min(1.0, (step - self.warmup) / (self.end - self.warmup))
        return self.first + math.floor(part * (self.levels - self.first) + 0.5)
