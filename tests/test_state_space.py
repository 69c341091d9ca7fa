"""Mamba-2: the chunked scan is the recurrence, and carried pieces are the whole."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varkit.nn.state_space import recurrence, scan


def inputs(
    n: int, length: int, heads: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """x, dt, a, b, c and a state that is not empty."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    dt = torch.nn.functional.softplus(normal(n, length, heads) - 1)
    a = -torch.exp(normal(heads))
    return [
        normal(n, length, heads, 8), dt, a, normal(n, length, 16), normal(n, length, 16), normal(n, heads, 8, 16),
    ]  # fmt: skip


def close(a: Tensor, b: Tensor, bound: float) -> bool:
    return bool((a - b).abs().max() <= bound * b.abs().max().clamp(min=1.0))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    length=st.integers(1, 70), chunk=st.integers(1, 40), heads=st.integers(1, 3), seed=st.integers(0, 1000)
)
def test_chunks_equal_the_recurrence(length: int, chunk: int, heads: int, seed: int) -> None:
    given_ = inputs(2, length, heads, seed)
    for ours, twin in zip(scan(*given_, chunk=chunk), recurrence(*given_), strict=True):
        assert close(ours, twin, 1e-5)


def test_chunks_have_the_gradients_of_the_recurrence() -> None:
    grads = []
    for form in (lambda *t: scan(*t, chunk=16), recurrence):
        leaves = [t.requires_grad_() for t in inputs(2, 45, 3)]
        y, state = form(*leaves)
        (y.sin().sum() + state.cos().sum()).backward()
        grads.append([t.grad for t in leaves])
    for ours, twin in zip(*grads, strict=True):
        assert close(ours, twin, 1e-5)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(cut=st.integers(0, 33), seed=st.integers(0, 100))
def test_two_pieces_are_the_whole(cut: int, seed: int) -> None:
    x, dt, a, b, c, state = inputs(2, 33, 2, seed, torch.float64)
    whole, last = scan(x, dt, a, b, c, state, chunk=8)
    first, between = scan(x[:, :cut], dt[:, :cut], a, b[:, :cut], c[:, :cut], state, chunk=8)
    second, end = scan(x[:, cut:], dt[:, cut:], a, b[:, cut:], c[:, cut:], between, chunk=8)
    assert close(torch.cat([first, second], dim=1), whole, 1e-12) and close(end, last, 1e-12)


def test_later_slots_change_nothing_earlier() -> None:
    """Bit for bit: what is masked within a chunk is multiplied by an exact zero."""
    x, dt, a, b, c, state = inputs(1, 40, 2)
    before = scan(x, dt, a, b, c, state, chunk=16)[0]
    for t in (x, dt, b, c):
        t[:, 25:] += 1
    after = scan(x, dt, a, b, c, state, chunk=16)[0]
    assert torch.equal(before[:, :25], after[:, :25]) and not torch.equal(before[:, 25:], after[:, 25:])
