"""A second device where there is none: its tensors hold real values in main memory, but meet those of the CPU as
CUDA's do, not at all.

    with Pretended() as device:
        pipeline.to(device.name).generate(0)
    device.waits

An operation on tensors of both devices raises, save what CUDA allows: numbers (no dimension), and indices. `waits` says
where the host had to wait for the device: values brought back, and shapes that depend on values.
"""

from collections import Counter
from contextlib import nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "meta"
"""A kind of device that torch knows by name, and that needs no start-up when a tensor is asked for on it."""

DEVICE = torch.device(NAME)
aten = torch.ops.aten
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index)


class Far(Tensor):
    """A tensor on the device; `near` holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip

    def __init__(self, near: Tensor) -> None:
        self.near = near

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on a tensor of the device outside of `Pretended`")


class Pretended(TorchDispatchMode):
    """Within it tensors can be moved to `name`, and stay apart from the CPU's."""

    name = NAME

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._patched = _Attention(), mock.patch("torch.autocast", nullcontext_for_any)

    def __enter__(self):
        for each in self._patched:
            each.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for each in self._patched:
            each.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func._overloadpacket
        flat, _ = tree_flatten((args, kwargs))
        tensors = [t for t in flat if isinstance(t, Tensor)]
        far = any(isinstance(t, Far) for t in tensors)
        target = kwargs.get("device")
        moved = target is not None and torch.device(target).type in (NAME, "cpu")
        if moved:
            kwargs = kwargs | {"device": torch.device("cpu")}
        elif far:
            _check(packet, args, tensors)
        if moved and not tensors:  # a new tensor
            far = torch.device(target).type == NAME
        elif moved:  # from one device to another, or not
            there = torch.device(target).type == NAME
            if far != there and not (there and kwargs.get("non_blocking")):
                self.waits["there" if there else "back"] += 1
            far = there
        if packet in INDEXED and isinstance(args[0], Far) and any(type(i) is Tensor for i in args[1]):
            self.waits["there"] += 1  # numbers of the CPU as an index
        if far and packet in WAITS or _masked(packet, args):
            self.waits[str(packet)] += 1
        out = func(*tree_map(_near, args), **tree_map(_near, kwargs))
        if not far:
            return out
        return _same(args, out) if _inplace(func) else tree_map(_far, out)


def _inplace(func) -> bool:
    return func._schema.is_mutable and not func._schema.name.endswith("_out")


def _same(args, out):
    """What an operation in place returns is what it was given."""
    return args[0] if isinstance(out, Tensor) and isinstance(args[0], Far) else tree_map(_far, out)


def _near(x):
    return x.near if isinstance(x, Far) else x


def _far(x):
    return Far(x) if isinstance(x, Tensor) else x


def _check(packet, args, tensors: list[Tensor]) -> None:
    if packet in INDEXED and isinstance(args[0], Far):
        tensors = [args[0], *args[2:3]]
    if packet is aten.copy_ or packet is aten._copy_from:
        return
    strange = [t for t in tensors if not isinstance(t, Far) and t.ndim]
    assert not strange, f"{packet} meets a tensor of the CPU, of shape {tuple(strange[0].shape)}"


def _masked(packet, args) -> bool:
    """Whether a bool tensor of the device is an index, whose count has to be known."""
    if packet not in INDEXED:
        return False
    return any(isinstance(i, Far) and i.dtype == torch.bool for i in args[1])


def nullcontext_for_any(*_: object, **__: object) -> nullcontext:
    """In place of autocast, which knows no such device; nothing here asks for it."""
    return nullcontext()


class _Attention(TorchFunctionMode):
    """Scaled dot-product attention as one operation: torch would look for a kernel of the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if not any(isinstance(t, Far) for t in tensors):
            return func(*args, **kwargs)
        _check(func, args, tensors)
        return Far(func(*map(_near, args), **{k: _near(v) for k, v in kwargs.items()}))
