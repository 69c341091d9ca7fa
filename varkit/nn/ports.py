"""Ports: named places between blocks where a caller reads, adds to or replaces hidden states, without subclassing.

    ports = {("block", 5): lambda h, step: h + control}
    generator(fed, step, prepared, window, ports)

Sites: "input" (before the first block, layer 0), "attention" (a block's self-attention output, before it is added),
"block" (after a block), "output" (after the last norm). A port gets h (N, L, C) and the step, and returns h or another.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from varkit.plans.step import Step

Port = Callable[[Tensor, Step], Tensor]
Ports = Mapping[tuple[str, int], Port]


def through(ports: Ports | None, site: str, layer: int, h: Tensor, step: Step) -> Tensor:
    """h after the caller's port at (site, layer), or as it is."""
    port = ports.get((site, layer)) if ports else None
    return h if port is None else port(h, step)


def port_at(ports: Ports | None, site: str, layer: int, step: Step) -> Callable[[Tensor], Tensor] | None:
    """The port at (site, layer) as a function of hidden states alone, for passing into a block; None when there is
    none.
    """
    port = ports.get((site, layer)) if ports else None
    return None if port is None else (lambda h: port(h, step))
