"""Tensors that decide shapes and branches (steps, masks, draws) live on the CPU; here they follow the work to a device.

Neither function waits for the device, which would stand idle while the host prepares what comes next.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_COPIES = WeakTensorKeyDictionary()
"""By tensor and device; a copy is forgotten with its tensor."""


def sent(t: Tensor, device: torch.device) -> Tensor:
    """t on the device, the same tensor if it is there."""
    return t.to(device, non_blocking=True)


def sent_once(t: Tensor, device: torch.device) -> Tensor:
    """t on the device, copied the first time only: for what is never written to, as the tensors of a plan's steps."""
    if t.device == device:
        return t
    copies = _COPIES.setdefault(t, {})
    if device not in copies:
        copies[device] = sent(t, device)
    return copies[device]
