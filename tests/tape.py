"""What a CUDA graph does, on any device: operations are written down once, with the tensors that they read and wrote,
and run again on the same tensors. Whatever Python decided meanwhile stays decided."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from varkit.decode.graphs import WARM_UPS


class Tape(TorchDispatchMode):
    """The operations that run under it. Values brought to or from the CPU cannot be on a CUDA graph's either."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        far = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.ndim}
        assert len(far) < 2, f"{func} crosses from one device to another within a recording"
        self.operations.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        """Compute everything anew, into the same tensors."""
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and not func._schema.is_mutable and not func.is_view:
                    place.copy_(value)


def record(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """As `varkit.decode.graphs.CudaGraphs` does."""
    for _ in range(WARM_UPS):
        function()
    tape = Tape()
    with tape:
        output = function()
    return output, torch.no_grad()(tape.replay)
