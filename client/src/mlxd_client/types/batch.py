"""Batch jobs: many `process` and `chat` requests that the daemon works off in idle slots, and keeps on disk."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from .base import ErrorObject, ModelRef, Name, Params, Result
from .generation import ChatParams, Completion, ProcessParams

MAX_FRAME_ITEMS = 1_000
MAX_BATCH_ITEMS = 1_000_000
MAX_PAGE = 1_000


class ProcessItem(Params, kw_only=True, tag_field="method", tag="process"):
    """A `process` request of a batch. `custom_id` is the caller's name for it, unique within its job."""

    params: ProcessParams
    custom_id: Name | UnsetType = UNSET


class ChatItem(Params, kw_only=True, tag_field="method", tag="chat"):
    """A `chat` request of a batch. `custom_id` is the caller's name for it, unique within its job."""

    params: ChatParams
    custom_id: Name | UnsetType = UNSET


BatchItem = ProcessItem | ChatItem
Items = Annotated[list[BatchItem], Meta(max_length=MAX_FRAME_ITEMS)]


class BatchSubmitParams(Params, kw_only=True):
    """`items` run in their order, those that name no `model` with this one. Their priority is always `batch`, they are
    not streamed, and `timeout_s` counts from when an item's turn has come.

    `key` makes it safe to ask again: where there is a job that was submitted under it, with the same items, that one is
    the answer. `open`: further items will be appended, and none runs before `batch.start`. `name` is for people."""

    items: Items = []
    model: ModelRef | UnsetType = UNSET
    key: Name | UnsetType = UNSET
    name: Name | UnsetType = UNSET
    open: bool = False


class BatchAppendParams(Params, kw_only=True):
    """`at` is how many items the job has by the caller's count, and makes it safe to ask again: what is there already
    is not added twice."""

    job: Name
    items: Items
    at: Annotated[int, Meta(ge=0, le=MAX_BATCH_ITEMS)] | UnsetType = UNSET


class BatchDeleteParams(Params, kw_only=True):
    """`cancel`: also where it has not ended; otherwise that is refused."""

    job: Name
    cancel: bool = False


class BatchResultsParams(Params, kw_only=True):
    """`after` is the `index` of the last result that the caller has; unset is from the beginning."""

    job: Name
    after: Annotated[int, Meta(ge=-1, le=MAX_BATCH_ITEMS)] | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 100


class BatchResult(Result, kw_only=True):
    """What became of the item at `index`, counted from 0: a `result` or an `error`."""

    index: int
    custom_id: str | None = None
    result: Completion | None = None
    error: ErrorObject | None = None


class BatchResultsResult(Result, kw_only=True):
    """Results in the order of their items, up to the first item that has none yet; of a job that has ended, all that
    there are. `more`: there are further ones at present. `complete`: no further ones will come. A page may be shorter
    than its `limit`, since it is also bounded in bytes."""

    results: list[BatchResult]
    more: bool = False
    complete: bool = False
