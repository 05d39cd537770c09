"""jobs.*: what outlives a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxd_client.types import CancelJobParams, Empty, Job, JobParams, JobsResult

if TYPE_CHECKING:
    from ..call import Call


def list_jobs(call: Call, params: Empty) -> JobsResult:
    return JobsResult(jobs=call.runtime.jobs())


def get(call: Call, params: JobParams) -> Job:
    return call.runtime.job(params.job)


async def wait(call: Call, params: JobParams) -> Job:
    return await call.runtime.wait_job(params.job)


async def cancel(call: Call, params: CancelJobParams) -> Job:
    return await call.runtime.cancel_job(params.job, discard=params.discard)
