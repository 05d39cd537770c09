"""Starts computing a step while the rest of it is still being described.

MLX computes nothing before it is told to, and a model is described by Python, layer by layer. A GPU takes its work as
fast as it is described; the CPU's queue holds little, so that between two tokens a small model's cores have nothing to
do. Here each layer's result is asked for as soon as it is described. Numbers stay the same: only the moment changes.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn

__all__ = ["start_early"]


def start_early(model: Any) -> None:
    """Have each of `model.layers` computed as soon as it is called. A model without such a list stays as it is."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list):
        return
    for layer in layers[:-1]:  # the last one's result is asked for with the logits
        if isinstance(layer, nn.Module) and not isinstance(layer, _Early):
            kind = type(layer)
            layer.__class__ = type(kind.__name__, (_Early, kind), {})


class _Early(nn.Module):  # type: ignore[misc]
    """Comes before a layer's own class, which stays its class in every other respect."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        made = super().__call__(*arguments, **options)
        mx.async_eval(made)  # type: ignore[no-untyped-call]
        return made
