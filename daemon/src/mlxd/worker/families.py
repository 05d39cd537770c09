"""What mlx_lm's architectures cannot do in a batch, and how each of them is served all the same.

Found by tools/try_families.py, which compares what a batch says with what each row says alone. An architecture that is
not named here is taken to batch; docs/models.md has the whole table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

from mlx_lm.models.cache import make_prompt_cache

__all__ = ["Batching", "prepare"]

# together: everything in one batch. decode: prompts are read one after the other. alone: one request at a time.
Batching = Literal["together", "decode", "alone"]

# Their states take in the padding that prompts of different lengths have in a batch.
_READ_ALONE = frozenset({"mamba", "jamba", "olmo_hybrid", "bailing_moe_linear"})
# They take a position for a number that is the same for all rows.
_ALONE = frozenset({"gpt_bigcode"})


def prepare(model: Any) -> Batching:
    """Make a loaded model fit for a batch, or for a batch of one. Returns how its requests may be computed."""
    family = type(model).__module__.rpartition(".")[2]
    if not all(hasattr(cache, "merge") for cache in make_prompt_cache(model)):
        _make_lone(model)
        return "alone"
    if family == "gemma2":
        _widen_masks(type(model).__module__)
    if family in _ALONE:
        return "alone"
    return "decode" if family in _READ_ALONE else "together"


class _Lone:
    """Comes before the class of a cache that mlx_lm cannot merge: a batch of one row is that row."""

    @classmethod
    def merge(cls, caches: list[Any]) -> Any:
        (one,) = caches
        return one

    def filter(self, keep: Any) -> None:
        assert len(keep) == 1

    def extract(self, index: int) -> Any:
        return self

    def finalize(self) -> None:
        """One row has no padding."""


def _make_lone(model: Any) -> None:
    """Have the model make such caches."""
    make: Callable[[], list[Any]] = getattr(model, "make_cache", None) or (lambda: make_prompt_cache(model))

    def lone() -> list[Any]:
        caches = make()
        for cache in caches:
            kind = type(cache)
            cache.__class__ = type(kind.__name__, (_Lone, kind), {})
        return caches

    model.make_cache = lone


def _widen_masks(module: str) -> None:
    """Attention that soft-caps its scores groups heads in an axis of their own, which masks of several rows lack."""
    place: Any = sys.modules[module]
    make = place.create_attention_mask
    if getattr(make, "widened", False):
        return

    def widened(*arguments: Any, **options: Any) -> Any:
        mask = make(*arguments, **options)
        return mask[:, :, None] if getattr(mask, "ndim", 0) == 4 else mask

    widened.widened = True  # type: ignore[attr-defined]
    place.create_attention_mask = widened
