"""Attention's softmax and SiLU on an x86 CPU, by powers of two: MLX has no vector instructions there, and its own
exponential takes three times as long as the C library's power. Where tokens are many, that is half of all the time.

The numbers are those of mlx.core and mlx.nn but for the last digits. All else goes to theirs: other types of numbers,
sinks, masks that add.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

__all__ = ["attend", "silu", "use_powers"]

_LOG2_E = math.log2(math.e)
_TWO = mx.array(2.0)
_LEAST = mx.array(mx.finfo(mx.float32).min)
_attend: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention
_silu: Callable[[mx.array], mx.array] = nn.silu


def use_powers() -> None:
    """Have all models of this process computed so, where that is faster. Comes before they are loaded."""
    if sys.platform == "linux" and platform.machine() == "x86_64" and mx.default_device() == mx.Device(mx.cpu):
        mx.fast.scaled_dot_product_attention = attend
        nn.silu = silu


def attend(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **options: Any
) -> mx.array:
    """As mx.fast.scaled_dot_product_attention."""
    if sinks is not None or options or not q.dtype == k.dtype == v.dtype == mx.float32 or not _is_plain(mask):
        return _attend(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
    batch, heads, length, width = q.shape
    groups, whole = k.shape[1:3]
    repeats = heads // groups
    if isinstance(mask, str):
        mask = _causal(length, whole) if length > 1 else None
    # Heads that share keys are rows of one product: the keys are read once for all of them.
    q = (q * (scale * _LOG2_E)).reshape(batch, groups, repeats * length, width)
    scores = q @ k.swapaxes(-1, -2)
    if mask is not None:
        apart = scores.reshape(batch, groups, repeats, length, whole)
        mask = mask[:, :, None] if mask.ndim == 4 else mask
        scores = mx.where(mask, apart, _LEAST).reshape(scores.shape)
    weights = mx.power(_TWO, scores - scores.max(axis=-1, keepdims=True))
    made = (weights @ v) / weights.sum(axis=-1, keepdims=True)
    return made.reshape(batch, heads, length, -1)


def _is_plain(mask: Any) -> bool:
    """Nothing, `causal`, or what says of each pair, the same for all heads, whether one sees the other."""
    if mask is None or isinstance(mask, str):
        return mask in (None, "causal")
    return bool(mask.dtype == mx.bool_ and (mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == 1)))


def _causal(length: int, whole: int) -> mx.array:
    return mx.arange(whole - length, whole)[:, None] >= mx.arange(whole)[None]


def silu(x: mx.array) -> mx.array:
    """As mlx.nn.silu."""
    if x.dtype != mx.float32:
        return _silu(x)
    return x / (1 + mx.power(_TWO, x * -_LOG2_E))
