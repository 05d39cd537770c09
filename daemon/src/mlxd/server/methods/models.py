"""models.*: what is there, what is loaded and stays so, what the hub has and what the disk keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxd_client.types import (
    UNSET,
    CatalogResult,
    DeleteResult,
    DownloadParams,
    DownloadResult,
    Empty,
    Lease,
    LeaseParams,
    ListParams,
    LoadParams,
    Model,
    ModelParams,
    ModelsResult,
    OptionalModelParams,
    Plan,
    PlanParams,
    StoriesResult,
    VerifyResult,
)

from .connection import EMPTY

if TYPE_CHECKING:
    from ..call import Call


async def list_models(call: Call, params: ListParams) -> ModelsResult:
    found = call.runtime.models(updates=params.updates)
    return ModelsResult(models=found if isinstance(found, list) else await found)


async def get(call: Call, params: ModelParams) -> Model:
    return await call.runtime.model(params.model)


async def story(call: Call, params: OptionalModelParams) -> StoriesResult:
    return await call.runtime.stories(None if params.model is UNSET else params.model)


async def load(call: Call, params: LoadParams) -> Model:
    return await call.runtime.load(call.client, params)


async def unload(call: Call, params: ModelParams) -> Model:
    return await call.runtime.unload(params.model)


async def acquire(call: Call, params: ModelParams) -> Lease:
    return await call.runtime.acquire(call.client, params.model)


def release(call: Call, params: LeaseParams) -> Empty:
    call.runtime.release(call.client, params.lease)
    return EMPTY


# --- the hub and the disk -----------------------------------------------------------------------------------------


async def plan(call: Call, params: PlanParams) -> Plan:
    return await call.runtime.plan(params)


async def download(call: Call, params: DownloadParams) -> DownloadResult:
    return DownloadResult(job=await call.runtime.download(call.client, params))


async def delete(call: Call, params: ModelParams) -> DeleteResult:
    return DeleteResult(freed_bytes=await call.runtime.delete(call.client, params.model))


async def verify(call: Call, params: ModelParams) -> VerifyResult:
    return await call.runtime.verify(params.model)


async def catalog(call: Call, params: Empty) -> CatalogResult:
    return await call.runtime.catalog()
