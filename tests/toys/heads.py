"""Continuous toy heads: a Gaussian whose noise comes from the draws, and a flow over the backbone's own evaluations."""

from torch import Tensor, nn

from varkit.heads.base import Ask, Head


class GaussianHead(Head):
    """values = mean(h) + sigma * noise, with the sample's own noise."""

    def __init__(self, width: int, channels: int, sigma: float = 0.5) -> None:
        super().__init__()
        self.mean, self.sigma, self.channels = nn.Linear(width, channels), sigma, channels

    def loss(self, h: Tensor, targets: dict[str, Tensor], draws=None) -> Tensor:
        return (self.mean(h) - targets["vectors"]).square().mean(-1)

    def sample(self, h: Tensor, ask: Ask) -> dict[str, Tensor]:
        mean = ask.combine(self.mean(h), ask.progress)
        noise = ask.draws.normal("noise", ask.at, ask.step.target.clamp(min=0), self.channels)
        return {"vectors": mean + self.sigma * noise.to(mean.dtype)}


class EulerHead(Head):
    """One Euler step of a flow whose velocity the backbone gives: x_s = x_t + (s - t) v, t being the slot's time.

    `steps` evaluations go from t = 1 (noise) to t = 0 (data); what was fed at the slot is x_t.
    """

    def __init__(self, width: int, channels: int, steps: int) -> None:
        super().__init__()
        self.velocity, self.steps = nn.Linear(width, channels), steps

    def loss(self, h: Tensor, targets: dict[str, Tensor], draws=None) -> Tensor:
        return (self.velocity(h) - targets["velocity"]).square().mean(-1)

    def sample(self, h: Tensor, ask: Ask) -> dict[str, Tensor]:
        v = ask.combine(self.velocity(h), ask.progress)
        return {"vectors": ask.fed["vectors"] - v / self.steps}
