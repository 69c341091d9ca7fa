"""Kernels of the library against their slow twins: attention's backward, losses by parts, cosine norms, the linear."""

import pytest
import torch
import torch.nn.functional as F

from varkit.bench.machine import convolution_linear
from varkit.heads import categorical
from varkit.heads.categorical import CategoricalHead
from varkit.nn import attention
from varkit.nn.attention import CosineNorm, View, attend
from varkit.nn.linear import ONEDNN_LINEAR, Linear, differentiable_linear, linear, onednn_linear, pack
from varkit.tokenizers.conv import ConvConfig, Decoder, Encoder


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("shape", [None, (5, 7), (2, 1, 5, 7), (2, 1, 1, 7)])
@pytest.mark.parametrize("scale", [1.0, None])
def test_attention_in_training_is_as_exact_as_the_stock_kernel(shape, scale) -> None:
    torch.manual_seed(0)
    mask = None if shape is None else torch.rand(shape) < 0.6
    if mask is not None:
        mask[..., 0] = True
    inputs = [torch.randn(2, 3, n, 8).bfloat16() for n in (5, 7, 7)]
    outer = torch.randn(2, 3, 5, 8).bfloat16()

    def gradients(function, dtype):
        own = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*own)
        return out, torch.autograd.grad(out, own, outer.to(dtype))

    def stock(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    out, ours = gradients(lambda q, k, v: attend(q, [View(k, v, mask)], scale), torch.bfloat16)
    twin, theirs = gradients(stock, torch.bfloat16)
    true_out, exact = gradients(stock, torch.float64)
    for own, other, true in zip((out, *ours), (twin, *theirs), (true_out, *exact), strict=True):
        assert relative(own, true) < max(0.01, 1.5 * relative(other, true))


@pytest.mark.parametrize("shape", [None, (1, 7), (2, 1, 1, 7)])
@pytest.mark.parametrize("scale", [1.0, None])
def test_one_query_is_more_exact_than_the_stock_kernel(shape, scale, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mask = None if shape is None else (torch.rand(shape) < 0.6) | (torch.arange(7) == 0)
    q, k, v = (torch.randn(2, 3, n, 64).bfloat16() for n in (1, 7, 7))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, scale=scale)
    ours = attend(q, [View(k, v, mask)], scale)
    monkeypatch.setattr(attention, "_is_one_query", lambda q: False)
    stock = attend(q, [View(k, v, mask)], scale)
    assert ours.dtype == torch.bfloat16 and not torch.equal(ours, stock)
    assert relative(ours, exact) <= min(relative(stock, exact), 2.0**-8)


def test_a_query_that_sees_nothing_has_no_gradient() -> None:
    q, k, v = (torch.randn(1, 1, 4, 8).bfloat16().requires_grad_() for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    out = attend(q, [View(k, v, mask)])
    assert not out[0, 0, 2].any()
    out.sum().backward()
    assert q.grad is not None and k.grad is not None
    assert q.grad.isfinite().all() and k.grad.isfinite().all() and not q.grad[0, 0, 2].any()


def test_long_sequences_compute_probabilities_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(6, 6, dtype=torch.bool).tril()

    def gradients() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        own = [torch.randn(2, 2, 6, 8).bfloat16().requires_grad_() for _ in range(3)]
        return torch.autograd.grad(attend(own[0], [View(own[1], own[2], mask)]).float().square().sum(), own)

    kept = gradients()
    monkeypatch.setattr(attention, "SHORT", 5)
    assert all(torch.equal(a, b) for a, b in zip(kept, gradients(), strict=True))


def test_losses_by_parts_are_the_loss_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(categorical, "ROWS", 7)
    torch.manual_seed(0)
    head = CategoricalHead(8, 11).double()
    h = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 11, (3, 5))
    whole = F.cross_entropy(head.logits(h).float().flatten(0, 1), ids.flatten(), reduction="none").view(3, 5)
    assert torch.allclose(head.log_prob(h, ids), -whole, atol=1e-6)
    (ours,) = torch.autograd.grad(head.loss(h, {"ids": ids}).sum(), h)
    (theirs,) = torch.autograd.grad(whole.sum(), h)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_cosine_norm_is_normalisation_and_takes_zeros() -> None:
    norm = CosineNorm(3)
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    k[0, 0, 0] = 0
    q, k = q.requires_grad_(), k.requires_grad_()
    scaled, unit = norm(q, k)
    assert torch.allclose(scaled, 4 * F.normalize(q, dim=-1), atol=1e-6)
    assert torch.allclose(unit, F.normalize(k, dim=-1), atol=1e-6)
    (scaled.sum() + unit.square().sum()).backward()
    assert q.grad is not None and k.grad is not None
    assert q.grad.isfinite().all() and k.grad.isfinite().all()


needs_onednn = pytest.mark.skipif(not ONEDNN_LINEAR, reason="this torch has no such operator")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "kernel", [convolution_linear, pytest.param(differentiable_linear, marks=needs_onednn)]
)
def test_the_kernel_is_the_linear_at_any_number_of_threads(kernel, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = [t.requires_grad_() for t in (torch.randn(4, 33, 16), torch.randn(24, 16), torch.randn(24))]
        ours, theirs = kernel(*inputs), F.linear(*inputs)
        assert torch.allclose(ours, theirs, atol=1e-5)
        outer = torch.randn_like(ours)
        pairs = zip(
            torch.autograd.grad(ours, inputs, outer), torch.autograd.grad(theirs, inputs, outer), strict=True
        )
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    finally:
        torch.set_num_threads(before)


@needs_onednn
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (0, 1)])
def test_the_product_with_gradients_is_the_linear(wanted: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(4, 33, 16), torch.randn(24, 16), torch.randn(24)]
    differentiated = [inputs[i].requires_grad_() for i in wanted]
    ours, theirs = differentiable_linear(*inputs), F.linear(*inputs)
    assert torch.allclose(ours, theirs, atol=1e-5)
    outer = torch.randn(24, 4, 33).permute(1, 2, 0)  # gradients come in any layout
    pairs = zip(
        torch.autograd.grad(ours, differentiated, outer),
        torch.autograd.grad(theirs, differentiated, outer),
        strict=True,
    )
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)


@needs_onednn
@pytest.mark.parametrize("bias", [None, torch.ones(8, requires_grad=True)])
def test_the_product_is_a_sound_operator(bias: torch.Tensor | None) -> None:
    x, weight = torch.randn(5, 16).requires_grad_(), torch.randn(8, 16).requires_grad_()
    torch.library.opcheck(differentiable_linear, (x, weight, bias))


@needs_onednn
@pytest.mark.parametrize("rows", [(1,), (2,), (2, 1), (18,), (2, 130)])
def test_onednns_linear_is_the_linear(rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*rows, 256), torch.randn(512, 256), torch.randn(512)
    with torch.no_grad():
        exact = F.linear(x.double(), weight.double(), bias.double())
        assert relative(onednn_linear(x, weight, bias), exact) < 1e-6
        assert relative(onednn_linear(x, weight, None), exact - bias) < 1e-6
        assert relative(linear(x, weight, bias), exact) < 1e-6
        strided = weight.T.contiguous().T
        assert relative(linear(x, strided, bias), exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_the_fused_activation_is_as_exact_as_the_separate_one(approximate: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = Linear(64, 96).to(dtype), torch.randn(3, 7, 64).to(dtype)
    wide = Linear(64, 96).double()
    wide.load_state_dict(layer.state_dict())
    with torch.no_grad():
        exact = F.gelu(wide(x.double()), approximate=approximate)
        separate = F.gelu(layer(x), approximate=approximate)
        assert relative(layer.gelu(x, approximate), exact) < 1.5 * relative(separate, exact) + 1e-7
    inputs = [x.requires_grad_(), *layer.parameters()]
    assert all(g.any() for g in torch.autograd.grad(layer.gelu(x, approximate).sum(), inputs))


def test_the_compiled_activation_is_the_plain_one() -> None:
    layer, x = Linear(8, 8).double(), torch.linspace(-12, 12, 80).double().view(10, 8).requires_grad_()
    compiled = torch.compile(layer.gelu, fullgraph=True, backend="eager")(x, "tanh")
    plain = F.gelu(layer(x), approximate="tanh")
    assert torch.allclose(compiled, plain, atol=1e-14)
    ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (compiled, plain))
    assert torch.allclose(ours, theirs, atol=1e-14)


@pytest.mark.parametrize("groups", [0, 4])
def test_channels_last_convolutions_are_the_plain_ones(groups: int) -> None:
    torch.manual_seed(0)
    config = ConvConfig(16, multipliers=(1, 2), res_blocks=1, latent_channels=4, groups=groups)
    encoder, decoder, images = Encoder(config), Decoder(config), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = encoder(images)
        rebuilt = decoder(features)
    assert relative(features, encoder(images)) < 1e-6
    assert relative(rebuilt, decoder(features)) < 1e-6


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_used_until_they_change(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = Linear(64, 96).to(dtype), torch.randn(5, 64).to(dtype)
    used: list[torch.Tensor] = []

    def watched(x, weight, *rest):
        used.append(weight)
        return onednn_linear(x, weight, *rest)

    pack(torch.nn.Sequential(layer))
    with torch.no_grad():
        plain = F.linear(x, layer.weight, layer.bias)
        monkeypatch.setattr("varkit.nn.linear.onednn_linear", watched)
        assert relative(layer(x), plain) < 1e-6 and used[-1].is_mkldnn
        assert relative(layer.gelu(x, "tanh"), F.gelu(plain, approximate="tanh")) < 0.01
        layer.weight.mul_(2)
        assert relative(layer(x) - layer.bias, 2 * (plain - layer.bias)) < 0.01
        layer.load_state_dict(Linear(64, 96).state_dict())
        assert relative(layer(x), F.linear(x, layer.weight, layer.bias)) < 1e-6
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert list(layer.state_dict()) == ["weight", "bias"]
