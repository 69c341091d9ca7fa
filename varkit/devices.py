"""Tensors that decide shapes and branches (steps, masks, draws) live on the CPU; here they follow the work to a device.

Neither function waits for the device, which would stand idle while the host prepares what comes next.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_COPIES = WeakTensorKeyDictionary()
"""By tensor and device; a copy is forgotten with its tensor."""


def sent(t: Tensor, device: torch.device) -> Tensor:
    """t on the device, the same tensor if it is there. What a CUDA graph records may not send anything."""
    recording = device.type == "cuda" and t.device.type == "cpu" and torch.cuda.is_current_stream_capturing()
    assert not recording, f"a tensor of shape {tuple(t.shape)} would be sent within a CUDA graph"
    return t.to(device, non_blocking=True)


def sent_once(t: Tensor, device: torch.device) -> Tensor:
    """t on the device, copied the first time only: for what is never written to, as the tensors of a plan's steps."""
    if t.device == device:
        return t
    copies = _COPIES.setdefault(t, {})
    if device not in copies:
        copies[device] = sent(t, device)
    return copies[device]
