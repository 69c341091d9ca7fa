"""Where to compute: a device by name, and things moved there.

Tensors that decide shapes and branches (steps, masks, draws) live on the CPU, and follow the work to a device without
waiting for it: it would stand idle while the host prepares what comes next.
"""

import itertools
import os
import sys
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from varkit.errors import UserError

AUTO = "auto"
MOST_WORKERS = 8

_COPIES = WeakTensorKeyDictionary()
"""By tensor and device; a copy is forgotten with its tensor."""


def find_device(name: str = AUTO) -> torch.device:
    """The device called "cpu", "cuda", "cuda:1", ...; "auto" is CUDA's first if there is one, else the CPU: others have
    to be asked for, since nothing has been tried on them.

    Raises `UserError` for what this machine, or this build of torch, does not have.
    """
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == AUTO:
        return there if there is not None and there.type == "cuda" else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is no device; use {_known(there)}") from None
    if device.type == "cpu":
        return device
    count = torch.accelerator.device_count() if there is not None and there.type == device.type else 0
    if (device.index or 0) >= count:
        raise UserError(f"--device {name!r} is not on this machine; use {_known(there)}")
    return device


def placed(value: Any, device: torch.device) -> Any:
    """Tensors in nested dicts, lists, tuples and named tuples on the device; everything else as it is."""
    assert not is_dataclass(value), "tensors in dataclasses would be left behind"
    return tree_map(lambda x: sent(x, device) if isinstance(x, Tensor) else x, value)


def sent(t: Tensor, device: torch.device) -> Tensor:
    """t on the device, the same tensor if it is there. What comes back to the CPU is waited for, and what a CUDA graph
    records may not send anything.
    """
    recording = device.type == "cuda" and t.device.type == "cpu" and torch.cuda.is_current_stream_capturing()
    assert not recording, f"a tensor of shape {tuple(t.shape)} would be sent within a CUDA graph"
    return t.to(device, non_blocking=device.type != "cpu")


def sent_once(t: Tensor, device: torch.device) -> Tensor:
    """t on the device, copied the first time only: for what is never written to, as the tensors of a plan's steps."""
    if t.device == device:
        return t
    copies = _COPIES.setdefault(t, {})
    if device not in copies:
        copies[device] = sent(t, device)
    return copies[device]


def device_of(part: Any) -> torch.device:
    """Where a module's weights are; the CPU for what has none."""
    tensors = itertools.chain(part.parameters(), part.buffers()) if isinstance(part, nn.Module) else iter(())
    first = next(tensors, None)
    return torch.device("cpu") if first is None else first.device


def workers_for(device: torch.device) -> int:
    """Processes that prepare pictures meanwhile: beside a CPU none, since the networks take all cores already, nor
    where processes cannot be forked safely.
    """
    return (
        0
        if device.type == "cpu" or sys.platform != "linux"
        else min(MOST_WORKERS, max(1, (os.cpu_count() or 1) - 1))
    )


def _known(there: torch.device | None) -> str:
    return "cpu" if there is None else f"cpu or {there.type}"
