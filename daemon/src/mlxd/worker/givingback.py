"""Memory that nobody uses any more goes back to the system: MLX, Python and the C library each keep some for later."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys

import mlx.core as mx

# What MLX may keep of freed buffers where it had to give them back; more would only fill up again.
CACHE_BYTES = 256 * 1024 * 1024


_usual: list[int] = []  # what MLX may keep otherwise, while it may not


def give_back(*, limit: bool = True) -> None:
    """Return what is free to the system.

    Args:
        limit: MLX keeps less for later from now on, until `relax`.
    """
    gc.collect()
    mx.clear_cache()
    if limit and not _usual:
        _usual.append(mx.set_cache_limit(CACHE_BYTES))
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)


def relax() -> None:
    """Let MLX keep as much for later as it does otherwise."""
    while _usual:
        mx.set_cache_limit(_usual.pop())
