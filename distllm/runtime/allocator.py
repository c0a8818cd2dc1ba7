"""Settings of the allocators: of CUDA's memory, and of glibc's, which shall keep memory that tensors free.

By default glibc (2.36) returns large blocks to the kernel at once, and every step of training allocates them
again, page by page, each cleared first: 130,000 page faults a step of 34 million parameters in bf16, which
cost 4% of the time at sequences of 512 tokens and 15% at 2,048.
"""

from __future__ import annotations

import ctypes
import os

# malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_INT = 2**31 - 1
LARGEST_KEPT_BLOCK = 1 << 30
# The second name is the older one; where both are set PyTorch (2.13) reads both.
CUDA_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
USERS_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Keep freed memory from now on, and return whether this works.

    It does not with another C library, and nothing is changed where the environment sets the limits already.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in USERS_SETTINGS):
        return False
    # Both, since setting one of them turns off the rule by which glibc adjusts the other.
    kept = mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK), mallopt(M_TRIM_THRESHOLD, LARGEST_INT)
    return all(kept)


def let_segments_grow() -> None:
    """Let PyTorch extend a segment of CUDA memory instead of adding one where a block does not fit.

    Free memory is then less often in pieces that are too small. Called before CUDA starts; a setting of the
    user's stays as it is.
    """
    if not any(name in os.environ for name in CUDA_SETTINGS):
        os.environ[CUDA_SETTINGS[0]] = "expandable_segments:True"


def release_freed_memory() -> None:
    """Return freed memory to the kernel once, for the sake of the next measurement."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
