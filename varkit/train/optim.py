"""AdamW and Muon over named parameters, learning-rate schedules, and the moving average of the weights.

VAR's (arXiv 2404.02905, released code): no decay for 1-D parameters, biases, scales and tables; warm-up from 0.005,
then `lin0`, flat for 5 % of the rest and linear to the final fraction.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TABLES = {
    "position", "level", "start", "log_scale", "modulation_offset", "embedding", "query", "null_features",
    "mask_embed",
}  # fmt: skip
WARMUP_FROM = 0.005
DECAY_SHARE = 0.2
"""Of a `wsd` run (warm-up, stable, decay; arXiv 2404.06395): such a run can be made longer while it is stable."""


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
    elif schedule == "wsd":
        rest = min(1.0, (1 - t) / DECAY_SHARE)
    elif schedule == "lin0":
        rest = min(1.0, (1 - t) / 0.95)
    else:
        rest = 1.0
    return final + (1 - final) * rest


def in_block(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix between hidden activations, which Muon is for: those of numbered blocks, whatever
    their stack is called.
    """
    return parameter.ndim == 2 and any(map(str.isdigit, name.split("."))) and decays(name, parameter)


class NamedOptimizer:
    """AdamW whose state is stored by parameter name, so that it survives a change of order; Muon for `matrices`.

    The fused AdamW is the fastest on CPUs too: 5 ms for 7.5M parameters where `foreach` takes 39 (one Zen 4 core).
    Muon's steps have the root mean square of AdamW's, so one learning rate serves both (arXiv 2502.16982, Sec. 2.2).
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        decay: Callable[[str, Tensor], bool],
        weight_decay: float,
        betas: tuple[float, float],
        matrices: Callable[[str, Tensor], bool] | None = None,
        muon: type[torch.optim.Muon] = torch.optim.Muon,
    ) -> None:
        self.parameters = parameters
        kinds = {name: matrices is not None and matrices(name, p) for name, p in parameters.items()}
        made: dict[bool, torch.optim.Optimizer] = {}
        for matrix in sorted(set(kinds.values())):
            own = {name: p for name, p in parameters.items() if kinds[name] is matrix}
            groups = [
                {"params": [p for n, p in own.items() if decay(n, p)], "weight_decay": weight_decay},
                {"params": [p for n, p in own.items() if not decay(n, p)], "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
            if matrix:
                made[matrix] = muon(groups, lr=0.0, adjust_lr_fn="match_rms_adamw")
            else:
                made[matrix] = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        self.of = {name: made[kinds[name]] for name in parameters}
        self.optimizers = list(made.values())
        self._decays = [[group["weight_decay"] for group in o.param_groups] for o in self.optimizers]

    def step(self, lr: float, decay_factor: float = 1.0) -> None:
        """Move the parameters along their gradients; `decay_factor` scales the weight decay."""
        for optimizer, decays_of in zip(self.optimizers, self._decays, strict=True):
            for group, decay in zip(optimizer.param_groups, decays_of, strict=True):
                group["lr"], group["weight_decay"] = lr, decay * decay_factor
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """`name/exp_avg`, `name/exp_avg_sq` and `name/step` of every parameter that has had a gradient; of Muon's,
        `name/momentum_buffer`.
        """
        states = {name: self.of[name].state.get(p, {}) for name, p in self.parameters.items()}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for key, value in state.items():
            name, _, kind = key.rpartition("/")
            parameter = self.parameters[name]
            own = torch.zeros((), device=parameter.device) if kind == "step" else torch.zeros_like(parameter)
            self.of[name].state[parameter][kind] = own.detach().copy_(value)


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """From `start` at step 0 to `end` at the last one, along half a cosine (VAR's weight decay)."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / max(1, steps - 1)))


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
        live = self.module.state_dict()
        averaged = [name for name in live if name in self.averaged]
        # At once: on an accelerator each call costs as much as the arithmetic of many.
        torch._foreach_lerp_([self.weights[n] for n in averaged], [live[n] for n in averaged], 1 - decay)
        for name in live.keys() - self.averaged:
            self.weights[name].copy_(live[name])

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
