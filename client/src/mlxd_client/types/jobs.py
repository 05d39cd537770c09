"""Jobs: whatever outlives a request."""

from __future__ import annotations

from typing import Literal

from .base import ErrorObject, Name, Params, Result


class Job(Result, kw_only=True):
    """Whatever outlives a request. Of a download: `phase` as in Model, `done_bytes` of `total_bytes` are on disk,
    `rate_bytes_s` is the average of the last seconds, `attempts` the most that any of its files has needed so far.

    Of a batch job: `done_items` of `total_items` have a result, `failed_items` of those an error; `model` is
    set where all of its items go to one. `phase` is `open` until it is started, `waiting` while something that `error`
    tells keeps its items from running, and `cancelling`. One that has `failed` goes on when it is started again."""

    job: str
    kind: Literal["download", "load", "batch"]
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    model: str | None = None
    progress: float | None = None
    attempts: int = 1
    phase: str | None = None
    done_bytes: int | None = None
    total_bytes: int | None = None
    rate_bytes_s: float | None = None
    revision: str | None = None
    name: str | None = None
    total_items: int | None = None
    done_items: int | None = None
    failed_items: int | None = None
    error: ErrorObject | None = None
    started_at: float | None = None
    ended_at: float | None = None


class JobParams(Params, kw_only=True):
    job: Name


class CancelJobParams(Params, kw_only=True):
    """`discard` also removes what a download has fetched so far; else a later one goes on from there."""

    job: Name
    discard: bool = False


class JobsResult(Result, kw_only=True):
    jobs: list[Job]
