"""models.*: what is there, what is loaded, and what stays loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxd_client.types import Empty, Lease, LeaseParams, LoadParams, Model, ModelParams, ModelsResult

from .connection import EMPTY

if TYPE_CHECKING:
    from ..call import Call


async def list_models(call: Call, params: Empty) -> ModelsResult:
    found = call.runtime.models()
    return ModelsResult(models=found if isinstance(found, list) else await found)


async def get(call: Call, params: ModelParams) -> Model:
    return await call.runtime.model(params.model)


async def load(call: Call, params: LoadParams) -> Model:
    return await call.runtime.load(call.client, params)


async def unload(call: Call, params: ModelParams) -> Model:
    return await call.runtime.unload(params.model)


async def acquire(call: Call, params: ModelParams) -> Lease:
    return await call.runtime.acquire(call.client, params.model)


def release(call: Call, params: LeaseParams) -> Empty:
    call.runtime.release(call.client, params.lease)
    return EMPTY
