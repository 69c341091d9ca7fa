"""Ports: named places between blocks where a caller reads, adds to or replaces hidden states, without subclassing.

    ports = {("block", 5): lambda h, step, prepared: h + prepared["control"].flatten(0, 1)}
    generator(fed, step, prepared, window, ports)

Sites: "input" (before the first block, layer 0), "attention" (a block's self-attention output, before it is added),
"block" (after a block), "output" (after the last norm). A port gets h (N, L, C), the step, and the run's prepared
condition (R, B, ...), and returns h or another; what it needs of each sample travels in the prepared condition.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from varkit.plans.step import Step

Port = Callable[[Tensor, Step, dict[str, Tensor]], Tensor]
Ports = Mapping[tuple[str, int], Port]


def through(
    ports: Ports | None, site: str, layer: int, h: Tensor, step: Step, prepared: dict[str, Tensor]
) -> Tensor:
    """h after the caller's port at (site, layer), or as it is."""
    port = ports.get((site, layer)) if ports else None
    return h if port is None else port(h, step, prepared)


def port_at(
    ports: Ports | None, site: str, layer: int, step: Step, prepared: dict[str, Tensor]
) -> Callable[[Tensor], Tensor] | None:
    """The port at (site, layer) as a function of hidden states alone, for passing into a block; None when there is
    none.
    """
    port = ports.get((site, layer)) if ports else None
    return None if port is None else (lambda h: port(h, step, prepared))
