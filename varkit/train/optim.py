"""AdamW over named parameters, learning-rate schedules, and the moving average of the weights.

VAR's (arXiv 2404.02905, released code): no decay for 1-D parameters, biases, scales and tables; warm-up from 0.005,
then `lin0`, flat for 5 % of the rest and linear to the final fraction.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TABLES = {"position", "level", "start", "log_scale", "modulation_offset", "embedding"}
WARMUP_FROM = 0.005


def decays(name: str, parameter: Tensor) -> bool:
    """VAR's rule: whether weight decay applies to a parameter. `embedding` is a tokenizer's codebook."""
    parts = name.split(".")
    return parameter.ndim > 1 and not TABLES.intersection(parts) and not parts[-1].endswith("bias")


def lr_factor(schedule: str, step: int, steps: int, warmup: int | float, final: float) -> float:
    """The learning rate at `step` of 0 to steps - 1, as a fraction of the peak."""
    warm = round(warmup * steps) if isinstance(warmup, float) else min(warmup, steps)
    if step < warm:
        return WARMUP_FROM + (1 - WARMUP_FROM) * step / warm
    t = (step - warm) / max(1, steps - 1 - warm)
    if schedule == "cosine":
        rest = 0.5 * (1 + math.cos(math.pi * t))
    elif schedule == "linear":
        rest = 1 - t
    elif schedule == "lin0":
        rest = min(1.0, (1 - t) / 0.95)
    else:
        rest = 1.0
    return final + (1 - final) * rest


class NamedAdamW:
    """AdamW whose state is stored by parameter name, so that it survives a change of order.

    The fused kernel is the fastest on CPUs too: 5 ms for 7.5M parameters where `foreach` takes 39 (one Zen 4 core).
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        decay: Callable[[str, Tensor], bool],
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        self.parameters = parameters
        groups = [
            {"params": [p for n, p in parameters.items() if decay(n, p)], "weight_decay": weight_decay},
            {"params": [p for n, p in parameters.items() if not decay(n, p)], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=True)

    def step(self, lr: float) -> None:
        """Move the parameters along their gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """`name/exp_avg`, `name/exp_avg_sq` and `name/step` of every parameter that has had a gradient."""
        states = {name: self.adamw.state.get(p, {}) for name, p in self.parameters.items()}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.adamw.state.clear()
        for key, value in state.items():
            name, _, kind = key.rpartition("/")
            parameter = self.parameters[name]
            own = torch.zeros((), device=parameter.device) if kind == "step" else torch.zeros_like(parameter)
            self.adamw.state[parameter][kind] = own.detach().copy_(value)


class EMA:
    """Moving average of a module's parameters; buffers are copied.

    The decay is min(decay, (1 + n) / (10 + n)) after n updates, so that a short run does not average its start in.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.averaged = {
            name for name, p in module.named_parameters(remove_duplicate=False) if p.is_floating_point()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights in."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, value in self.module.state_dict().items():
            if name in self.averaged:
                self.weights[name].lerp_(value, 1 - decay)
            else:
                self.weights[name].copy_(value)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The module holds the averaged weights, and is in evaluation mode, while the block runs."""
        live = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.weights)
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.load_state_dict(live)
            self.module.train()
