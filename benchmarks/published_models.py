"""The published implementations as they come, made to run where there is no GPU: one picture each, guidance on.

Nothing of them is bundled: DIR holds checkouts named VAR, LlamaGen and mar (of github.com/FoundationVision and
github.com/LTH14). Each has two functions: `save` writes random weights in the published layout, `step` loads them and
returns what draws a picture. In bfloat16 they run as their own scripts do: under autocast, LlamaGen as a model cast.
"""

import contextlib
import io
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rounds import Step
from torch import Tensor, nn

LABEL = 207


def var_save(folder: Path, out: Path) -> None:
    """VAR-d16 and its tokenizer."""
    vae, var = _var(folder)
    torch.save(vae.state_dict(), out / "vae_ch160v4096z32.pth")
    torch.save(var.state_dict(), out / "var_d16.pth")


def var_step(folder: Path, weights: Path, dtype: str) -> Step:
    """The demo's call: cfg 1.5, top-k 900, top-p 0.96."""
    vae, var = _var(folder)
    vae.load_state_dict(torch.load(weights / "vae_ch160v4096z32.pth", weights_only=True))
    var.load_state_dict(torch.load(weights / "var_d16.pth", weights_only=True))

    def step() -> None:
        with _autocast(dtype):
            var.autoregressive_infer_cfg(1, LABEL, g_seed=0, cfg=1.5, top_k=900, top_p=0.96)

    return step


def _var(folder: Path) -> tuple[nn.Module, Any]:
    with _importing(folder / "VAR"):
        from models import build_vae_var  # type: ignore[import-not-found]
    torch.manual_seed(0)
    kept = {kind: kind.reset_parameters for kind in (nn.Linear, nn.LayerNorm, nn.Conv2d)}
    with contextlib.redirect_stdout(io.StringIO()):
        vae, var = build_vae_var(device="cpu", depth=16)
    for kind, reset in kept.items():  # it switches them off for all that is made later
        kind.reset_parameters = reset  # type: ignore[assignment]
    for name, parameter in vae.named_parameters():  # which leaves them without values
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.constant_(parameter, "norm" in name and "weight" in name)
    return vae.eval(), var.eval()


def llamagen_save(folder: Path, out: Path) -> None:
    """LlamaGen-B for 256 tokens, and VQ-16."""
    vq, gpt = _llamagen(folder)
    torch.save({"model": vq.state_dict()}, out / "vq_ds16_c2i.pt")
    torch.save({"model": gpt.state_dict()}, out / "c2i_B_256.pt")


def llamagen_step(folder: Path, weights: Path, dtype: str) -> Step:
    """The demo's call: guidance 4, top-k 2000."""
    vq, gpt = _llamagen(folder)
    vq.load_state_dict(torch.load(weights / "vq_ds16_c2i.pt", weights_only=True)["model"])
    gpt.load_state_dict(torch.load(weights / "c2i_B_256.pt", weights_only=True)["model"])
    gpt.to(getattr(torch, dtype))
    with _importing(folder / "LlamaGen"):
        from autoregressive.models.generate import generate  # type: ignore[import-not-found]

    @torch.no_grad()
    def step() -> None:
        ids = generate(
            gpt, torch.tensor([LABEL]), 256, cfg_scale=4.0, temperature=1.0, top_k=2000, top_p=1.0, sample_logits=True
        )  # fmt: skip
        vq.decode_code(ids, [1, 8, 16, 16])

    return step


def _llamagen(folder: Path) -> tuple[Any, Any]:
    with _importing(folder / "LlamaGen"):
        from autoregressive.models.gpt import GPT_models  # type: ignore[import-not-found]
        from tokenizer.tokenizer_image.vq_model import VQ_models  # type: ignore[import-not-found]
    torch.manual_seed(0)
    vq = VQ_models["VQ-16"](codebook_size=16384, codebook_embed_dim=8)
    gpt = GPT_models["GPT-B"](
        vocab_size=16384, block_size=256, num_classes=1000, cls_token_num=1, model_type="c2i"
    )
    nn.init.normal_(gpt.output.weight, std=0.02)  # it starts at zero, and all codes would be alike
    return vq.eval(), gpt.eval()


def mar_save(folder: Path, out: Path) -> None:
    """MAR-B and KL-16."""
    vae, mar = _mar(folder)
    torch.save({"model": vae.state_dict()}, out / "kl16.ckpt")
    torch.save({"model": mar.state_dict(), "model_ema": mar.state_dict()}, out / "checkpoint-last.pth")


def mar_step(folder: Path, weights: Path, dtype: str) -> Step:
    """64 steps of 100 diffusion steps each, guidance 2.9."""
    vae, mar = _mar(folder)
    vae.load_state_dict(torch.load(weights / "kl16.ckpt", weights_only=True)["model"])
    mar.load_state_dict(torch.load(weights / "checkpoint-last.pth", weights_only=True)["model"])

    @torch.no_grad()
    def step() -> None:
        with _autocast(dtype):
            tokens = mar.sample_tokens(
                bsz=1, num_iter=64, cfg=2.9, labels=torch.tensor([LABEL]), temperature=1.0
            )
            vae.decode(tokens / 0.2325)

    return step


def _mar(folder: Path) -> tuple[nn.Module, Any]:
    vision = types.ModuleType("timm.models.vision_transformer")
    vision.Block = ViTBlock  # type: ignore[attr-defined]
    for name, module in (("timm", None), ("timm.models", None), ("timm.models.vision_transformer", vision)):
        sys.modules[name] = module or types.ModuleType(name)
    with _importing(folder / "mar"):
        from models.mar import mar_base  # type: ignore[import-not-found]
        from models.vae import AutoencoderKL  # type: ignore[import-not-found]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment,method-assign]
    torch.manual_seed(0)
    vae = AutoencoderKL(embed_dim=16, ch_mult=(1, 1, 2, 2, 4))
    mar = mar_base(diffloss_d=6, diffloss_w=1024, num_sampling_steps="100")
    return vae.eval(), mar.eval()


class ViTBlock(nn.Module):
    """What timm's block of that name computes; timm needs a torchvision that has no CPU build for this torch."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool = False, norm_layer: Any = nn.LayerNorm,
        proj_drop: float = 0.0, attn_drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = _Attention(dim, heads, qkv_bias)
        self.mlp = _MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _autocast(dtype: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


@contextlib.contextmanager
def _importing(folder: Path) -> Iterator[None]:
    """A checkout's own modules, which have names like `models`, may be imported within."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*CUDA.*")
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


WORKS = {
    "var-d16": (var_save, var_step),
    "llamagen-b": (llamagen_save, llamagen_step),
    "mar-base": (mar_save, mar_step),
}
"""By the name that `varkit bench` has for the same size: what saves weights, what makes a step."""
