"""Attention and SiLU by powers of two: the numbers of MLX, and MLX itself for all that they are not made for."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxd.worker import powers

mlx_attention, mlx_silu = mx.fast.scaled_dot_product_attention, nn.silu


def inputs(batch: int, heads: int, groups: int, length: int, whole: int) -> tuple[mx.array, mx.array, mx.array]:
    keys = [mx.random.key(seed) for seed in range(3)]
    q = mx.random.normal((batch, heads, length, 16), key=keys[0]) * 3
    k = mx.random.normal((batch, groups, whole + 5, 16), key=keys[1])[:, :, :whole]  # as a cache hands them out
    v = mx.random.normal((batch, groups, whole + 5, 24), key=keys[2])[:, :, :whole]
    return q, k, v


def padded(batch: int, length: int, whole: int) -> mx.array:
    """What a batch's caches make of rows that begin later and later; of some queries nothing is to be seen."""
    seen = mx.arange(whole - length, whole)[:, None] >= mx.arange(whole)[None]
    return seen & (mx.arange(whole) >= mx.arange(0, 3 * batch, 3)[:, None, None, None])


@pytest.mark.parametrize(
    "shape", [(1, 4, 4, 1, 1), (1, 4, 2, 1, 33), (3, 6, 2, 7, 7), (2, 4, 1, 5, 40), (4, 4, 4, 9, 9)]
)
@pytest.mark.parametrize("masked", ["none", "causal", "rows", "pairs"])
def test_attention_has_the_numbers_of_mlx(shape: tuple[int, int, int, int, int], masked: str) -> None:
    batch, _, _, length, whole = shape
    pairs = padded(1, length, whole)[0, 0]
    mask = {"none": None, "causal": "causal", "rows": padded(batch, length, whole), "pairs": pairs}[masked]
    q, k, v = inputs(*shape)
    made = powers.attend(q, k, v, scale=0.25, mask=mask, sinks=None)
    wanted = mlx_attention(q, k, v, scale=0.25, mask=mask)
    assert made.shape == wanted.shape
    assert mx.allclose(made, wanted, rtol=1e-5, atol=1e-5).item()


def test_weights_far_apart_neither_overflow_nor_vanish() -> None:
    q, k, v = inputs(1, 2, 2, 4, 12)
    made = powers.attend(q * 1e4, k, v, scale=1.0, mask="causal")
    assert mx.allclose(made, mlx_attention(q * 1e4, k, v, scale=1.0, mask="causal"), rtol=1e-5, atol=1e-5).item()


@pytest.mark.parametrize("other", ["half", "adds", "sinks", "each head", "stream"])
def test_what_it_is_not_made_for_goes_to_mlx(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(2, 4, 2, 3, 9)
    options = {
        "half": {},
        "adds": {"mask": mx.zeros((3, 9))},
        "sinks": {"sinks": mx.zeros(4)},
        "each head": {"mask": mx.ones((2, 4, 3, 9), dtype=mx.bool_)},
        "stream": {"stream": mx.cpu},
    }[other]
    if other == "half":
        q, k, v = (one.astype(mx.float16) for one in (q, k, v))
    asked: list[mx.array] = []
    monkeypatch.setattr(powers, "_attend", lambda *arrays, **named: asked.append(mlx_attention(*arrays, **named)))
    powers.attend(q, k, v, scale=0.25, **options)
    assert asked


def test_silu_has_the_numbers_of_mlx() -> None:
    x = mx.array([0.0, -0.0, 1.0, -1.0, 30.0, -30.0, 88.0, -88.0, 1000.0, -1000.0, 3e38, -3e38])
    assert mx.allclose(powers.silu(x), mlx_silu(x), rtol=1e-6, atol=1e-30).item()
    half = x[:8].astype(mx.float16)
    assert powers.silu(half).dtype == mx.float16
    assert mx.array_equal(powers.silu(half), mlx_silu(half))
