"""What is kept of prompts and answers, so that requests that begin alike need not be computed anew."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from .base import ModelRef, Params, Result


class CacheInMemory(Result, kw_only=True):
    """Of one loaded model, since it was loaded: requests that found a prefix, those that found none, and tokens that
    were not computed; `bytes` is what is kept now."""

    hits: int = 0
    misses: int = 0
    saved_tokens: int = 0
    bytes: int = 0


class CacheOnDisk(Result, kw_only=True):
    """Of one model, loaded or not: how many entries there are, what they take, and when one was of use last. `hits` and
    `saved_tokens` are requests that took up tokens from files since the model was loaded, and how many; `failures`
    files that could not be read or written."""

    entries: int = 0
    bytes: int = 0
    last_used_at: float | None = None
    hits: int = 0
    saved_tokens: int = 0
    failures: int = 0


class ModelCache(Result, kw_only=True):
    """`memory` is absent where the model is not loaded, or keeps nothing."""

    model: str
    memory: CacheInMemory | None = None
    disk: CacheOnDisk | None = None


class CacheResult(Result, kw_only=True):
    """`memory_budget_bytes` is for each model, `disk_budget_bytes` for all together; 0 keeps nothing. On disk, what is
    kept also never takes more than a tenth of what is free."""

    models: list[ModelCache]
    disk_bytes: int
    memory_budget_bytes: int
    disk_budget_bytes: int


class ClearCacheParams(Params, kw_only=True):
    """Without `model`, of all models."""

    model: ModelRef | UnsetType = UNSET


class ClearCacheResult(Result, kw_only=True):
    """What was freed."""

    memory_bytes: int
    disk_bytes: int
