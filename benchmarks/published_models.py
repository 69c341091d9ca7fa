"""The published implementations as they come, made to run where there is no GPU: one picture each, guidance on.

Nothing of them is bundled: DIR holds checkouts named VAR, LlamaGen, Infinity and mar (of github.com/FoundationVision
and github.com/LTH14). Each has two functions: `save` writes random weights in the published layout, `step` loads them
and returns what draws a picture. In bfloat16 they run as their own scripts do: under autocast, LlamaGen as a model
cast, Infinity with its blocks cast too. Infinity compiles its norms, for which torch wants a C++ compiler.
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

from varkit.bench.measure import PROMPT

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
    _stub("timm.models.vision_transformer", Block=ViTBlock)
    with _importing(folder / "mar"):
        from models.mar import mar_base  # type: ignore[import-not-found]
        from models.vae import AutoencoderKL  # type: ignore[import-not-found]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment,method-assign]
    torch.manual_seed(0)
    vae = AutoencoderKL(embed_dim=16, ch_mult=(1, 1, 2, 2, 4))
    mar = mar_base(diffloss_d=6, diffloss_w=1024, num_sampling_steps="100")
    return vae.eval(), mar.eval()


def infinity_save(folder: Path, out: Path) -> None:
    """Infinity-125M and its tokenizer of 32 bits."""
    vae, infinity = _infinity(folder)
    torch.save({"vae": vae.state_dict()}, out / "infinity_vae_d32.pth")
    torch.save(infinity.state_dict(), out / "infinity_125M_256x256.pth")


def infinity_step(folder: Path, weights: Path, dtype: str) -> Step:
    """The inference script's call at 256 x 256 pixels, for a prompt of random features: cfg 4, tau 0.5, top-p 0.97."""
    vae, infinity = _infinity(folder, str(weights / "infinity_vae_d32.pth"))
    infinity.load_state_dict(torch.load(weights / "infinity_125M_256x256.pth", weights_only=True))
    if dtype == "bfloat16":
        for block in infinity.unregistered_blocks:
            block.bfloat16().ca_norm.float()  # a norm of mixed dtypes is CUDA's alone
    from infinity.utils.dynamic_resolution import dynamic_resolution_h_w  # type: ignore[import-not-found]

    schedule = [(1, h, w) for _, h, w in dynamic_resolution_h_w[1.0]["0.06M"]["scales"]]
    features = torch.randn(PROMPT, 2048, generator=torch.Generator().manual_seed(0))
    prompt = (features, [PROMPT], torch.tensor([0, PROMPT], dtype=torch.int32), PROMPT)
    steps = len(schedule)

    @torch.no_grad()
    def step() -> None:
        with _autocast(dtype):
            infinity.autoregressive_infer_cfg(
                vae=vae, scale_schedule=schedule, label_B_or_BLT=prompt, g_seed=0, cfg_list=[4.0] * steps,
                tau_list=[0.5] * steps, top_k=900, top_p=0.97, returns_vemb=1, cfg_insertion_layer=[0], vae_type=32,
                ret_img=True, inference_mode=True,
            )  # fmt: skip

    return step


def _infinity(folder: Path, vae_file: str | None = None) -> tuple[nn.Module, Any]:
    _stub("timm.models", register_model=lambda function: function)
    _stub("timm.models.layers", DropPath=type("DropPath", (nn.Identity,), {}), drop_path=None)
    _stub("timm.loss", SoftTargetCrossEntropy=type("SoftTargetCrossEntropy", (nn.Module,), {}))
    _stub("flash_attn", flash_attn_func=_flash, flash_attn_varlen_kvpacked_func=_flash_packed)
    _stub("torchvision", transforms=None)
    _stub("einops", rearrange=_rearrange, reduce=None, pack=None, unpack=None)
    for name in ("pytz", "imageio"):
        _stub(name)
    torch._dynamo.config.cache_size_limit = 64  # as the script says: each scale has its shape
    with _importing(folder / "Infinity"), contextlib.redirect_stdout(io.StringIO()):
        from infinity.models.bsq_vae.vae import vae_model  # type: ignore[import-not-found]
        from infinity.models.infinity import Infinity  # type: ignore[import-not-found]

        torch.manual_seed(0)
        vae = vae_model(vae_file, "dynamic", 32, 2**32)
        infinity = Infinity(
            vae, text_channels=2048, text_maxlen=512, depth=12, embed_dim=768, num_heads=8, block_chunks=4,
            shared_aln=True, fused_norm=True, pad_to_multiplier=128, rope2d_each_sa_layer=1,
            rope2d_normalized_by_hw=2, pn="0.06M", inference_mode=True, train_h_div_w_list=[1.0],
        )  # fmt: skip
    return vae, infinity.eval().requires_grad_(False)


def _flash(*args: Any) -> Tensor:
    """Stands for a kernel that this size is not run with."""
    raise NotImplementedError


def _flash_packed(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float, **rest: Any
) -> Tensor:
    """What flash-attn's function of that name computes: prompts of any lengths end to end, each with its queries.

    q (rows of all, heads, width), kv (tokens of all, 2, heads, width), beginnings of each prompt's.
    """
    found = []
    for row in range(len(cu_seqlens_q) - 1):
        own = q[cu_seqlens_q[row] : cu_seqlens_q[row + 1]].transpose(0, 1)
        k, v = kv[cu_seqlens_k[row] : cu_seqlens_k[row + 1]].permute(1, 2, 0, 3)
        found.append(F.scaled_dot_product_attention(own, k, v, scale=softmax_scale).transpose(0, 1))
    return torch.cat(found)


def _rearrange(x: Tensor, pattern: str) -> Tensor:
    """The two of einops' patterns that the tokenizer's codes go through."""
    return {"... c d -> ... (c d)": x.flatten(-2), "b ... d -> b d ...": x.movedim(-1, 1)}[pattern]


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


def _stub(name: str, **contents: Any) -> None:
    """A module of that name for a checkout to import, in place of a package that no build of fits here."""
    parent, _, last = name.rpartition(".")
    if parent and parent not in sys.modules:
        _stub(parent)
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    if parent:
        setattr(sys.modules[parent], last, module)


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
    "infinity-125m": (infinity_save, infinity_step),
}
"""By the name that `varkit bench` has for the same size: what saves weights, what makes a step."""
