"""Keep freed memory for the next step.

A training step allocates and frees the same large tensors again and again. The C library hands blocks from 128 KiB up
back to the system at once, so every step has the system map and clear all its pages afresh. On two Zen 4 cores, by
`benchmarks/train_step.py --returned`: 41.0 pictures a second of a small VAR in bfloat16 where memory is returned, 47.0
where it is kept; 26.5 and 28.8 in float32.
"""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_UP_TO = 2**30
"""Bytes of a block that stays with the process once freed."""


def keep_freed_memory() -> bool:
    """Tell the C library, for this whole process; False where there is no such setting (it is glibc's)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, KEPT_UP_TO)) and bool(
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )
