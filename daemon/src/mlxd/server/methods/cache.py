"""cache.*: what is kept of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxd_client.types import UNSET, CacheResult, ClearCacheParams, ClearCacheResult, Empty

if TYPE_CHECKING:
    from ..call import Call


async def list_caches(call: Call, params: Empty) -> CacheResult:
    return await call.runtime.caches()


async def clear(call: Call, params: ClearCacheParams) -> ClearCacheResult:
    return await call.runtime.clear_caches(None if params.model is UNSET else params.model)
