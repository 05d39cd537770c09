"""Memory that nobody uses any more goes back to the system: MLX, Python and the C library each keep some for later."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys

import mlx.core as mx

# What MLX may keep of freed buffers once it had to give them back; more would only fill up again.
CACHE_BYTES = 256 * 1024 * 1024


def give_back(*, for_good: bool = True) -> None:
    """Return what is free to the system.

    Args:
        for_good: MLX keeps less for later from now on.
    """
    gc.collect()
    mx.clear_cache()
    if for_good:
        mx.set_cache_limit(CACHE_BYTES)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)
