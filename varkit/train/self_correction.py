"""Bitwise self-correction: training on inputs with wrong bits, to put right what came out wrong (arXiv 2412.04431).

At each scale the bits of what is still missing are the target; some are then flipped, and the missing of the next scale
is taken against what came of that:

    bits_k = sign(area(f - f_hat_k-1)),    f_hat_k = f_hat_k-1 + up(code(flip(bits_k, s_k))),    s_k ~ U{0, .01, ..., p}

so that finer scales are taught to correct coarser ones. Without the second quantisation flips teach nothing (the
paper's ablation). It needs the features before quantisation, which `Bitwise.training_latents` keeps with the bits.
Legend: B batch, L positions, D bits of a token, h w grid of the features, d its channels.
"""

import torch
from torch import Tensor

from varkit.canvases.base import Canvas
from varkit.errors import UserError
from varkit.plans.scales import ScalePlan
from varkit.tokenizers.base import Latents
from varkit.tokenizers.bitwise import Bitwise
from varkit.train.lessons import WholePlan


class SelfCorrection(WholePlan):
    """Teacher forcing with flipped bits; held-out losses are measured without flips.

    strongest: p, the largest share of bits flipped at a scale; each scale of each batch draws its own. scales: how many
    of the first scales are flipped. step_power: as in `WholePlan`; 0.5 is published.
    """

    def __init__(
        self,
        tokenizer: Bitwise,
        plan: ScalePlan,
        strongest: float = 0.3,
        scales: int = 13,
        step_power: float = 0.5,
    ) -> None:
        super().__init__(tokenizer, plan, step_power)
        if not 0 <= strongest <= 1:
            raise UserError(f"a share of flipped bits of {strongest} is outside 0 to 1; 0.3 is published")
        self.quantizer, self.schedule = tokenizer.quantizer, plan.schedule
        self.strongest, self.scales = strongest, scales
        self.settings |= {"strongest": strongest, "scales": scales}

    def taught(self, latents: Latents) -> tuple[Canvas, Latents]:
        """The inputs that flipped bits give, and the bits that were right there."""
        true: list[Tensor] = []

        def flip(level: int, bits: Tensor) -> Tensor:
            true.append(bits)
            return self.flipped(bits) if level < self.scales else bits

        used = self.quantizer.encode(self._features(latents), self.schedule, override=flip)
        canvas = self.tokenizer.canvas(len(used), self.schedule)
        canvas.fill({"bits": used})
        return canvas, {"bits": torch.cat(true, dim=1)}

    def flipped(self, bits: Tensor) -> Tensor:
        """Bits (B, n, D), each flipped with a probability drawn from 0, 0.01, ..., p."""
        share = 0.01 * torch.randint(round(100 * self.strongest) + 1, ()).item()
        return torch.where(torch.rand(bits.shape, device=bits.device) < share, 1 - bits, bits)

    def _features(self, latents: Latents) -> Tensor:
        """(B, h w, d) -> (B, d, h, w)."""
        if "features" not in latents:
            raise UserError(
                "self-correction needs the features of the pictures beside their bits; encode them with "
                "Bitwise.training_latents"
            )
        grid = self.quantizer.zeros(0, self.schedule).shape[2:]
        return latents["features"].mT.unflatten(2, grid)
