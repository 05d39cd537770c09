"""batch.*: many requests that are worked off in idle slots, and kept on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxd_client.types import (
    BatchAppendParams,
    BatchDeleteParams,
    BatchResultsParams,
    BatchResultsResult,
    BatchSubmitParams,
    Empty,
    Job,
    JobParams,
    JobsResult,
)

from .connection import EMPTY

if TYPE_CHECKING:
    from ..call import Call


async def submit(call: Call, params: BatchSubmitParams) -> Job:
    return await call.runtime.batches.submit(params)


async def append(call: Call, params: BatchAppendParams) -> Job:
    return await call.runtime.batches.append(params)


async def start(call: Call, params: JobParams) -> Job:
    return await call.runtime.batches.start(params.job)


def list_batches(call: Call, params: Empty) -> JobsResult:
    return JobsResult(jobs=call.runtime.batches.jobs())


def get(call: Call, params: JobParams) -> Job:
    return call.runtime.batches.get(params.job)


async def cancel(call: Call, params: JobParams) -> Job:
    return await call.runtime.batches.cancel(params.job)


async def delete(call: Call, params: BatchDeleteParams) -> Empty:
    await call.runtime.batches.delete(params)
    return EMPTY


async def results(call: Call, params: BatchResultsParams) -> BatchResultsResult:
    return await call.runtime.batches.results(params)
