"""The method table: the one list that dispatch, `hello`, `rpc.discover` and the wire reference read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mlxd_client import errors, types
from mlxd_client.errors import RpcError
from mlxd_client.types import Empty

from . import admin, batch, cache, config, connection, events, generation, jobs, models

__all__ = ["METHODS", "Method"]


class Method:
    """One method of the wire.

    Args:
        params: the struct its parameters are checked against.
        result: the struct it answers with; None where that is a plain JSON object.
        handler: `handler(call, params)` returns the result, or PENDING (the call is answered later), or is a coroutine
            function, run as a task that ends with the request.
        errors: what it answers beyond what every method may (invalid params, cancelled, internal error).
        waits: the answer may take its time: it counts as in flight. Follows from a coroutine handler.
        work: new work, refused while the daemon drains; implies `waits`.
        bound: about this very connection, so that no other daemon could answer it.
        since: the protocol version that introduced it.
    """

    __slots__ = (
        "bound",
        "errors",
        "handler",
        "is_async",
        "name",
        "no_params",
        "params",
        "result",
        "since",
        "summary",
        "waits",
        "work",
    )

    def __init__(
        self,
        name: str,
        handler: Callable[[Any, Any], Any],
        params: type[Any],
        result: type[Any] | None,
        summary: str,
        *,
        errors: tuple[type[RpcError], ...] = (),
        waits: bool = False,
        work: bool = False,
        bound: bool = False,
        since: int = 1,
    ) -> None:
        self.name = name
        self.handler = handler
        self.params = params
        self.result = result
        self.summary = summary
        self.errors = errors
        self.is_async = inspect.iscoroutinefunction(handler)
        self.work = work
        self.bound = bound
        self.waits = waits or work or self.is_async
        self.no_params = params is Empty
        self.since = since


_GENERATION = (
    errors.ModelNotFound,
    errors.ModelNotDownloaded,
    errors.DownloadFailed,
    errors.VerificationFailed,
    errors.InsufficientDisk,
    errors.PermissionDenied,
    errors.ModelInvalid,
    errors.ModelBusy,
    errors.QueueFull,
    errors.InsufficientMemory,
    errors.MemoryPressure,
    errors.LoadFailed,
    errors.WorkerDied,
    errors.DeadlineExceeded,
    errors.Unsupported,
    errors.ContextExceeded,
    errors.ShuttingDown,
)
_LOADING = (
    errors.ModelNotFound,
    errors.ModelNotDownloaded,
    errors.DownloadFailed,
    errors.VerificationFailed,
    errors.InsufficientDisk,
    errors.PermissionDenied,
    errors.ModelInvalid,
    errors.ModelBusy,
    errors.QueueFull,
    errors.InsufficientMemory,
    errors.LoadFailed,
    errors.WorkerDied,
    errors.Unsupported,
    errors.ShuttingDown,
)

_HUB = (
    errors.ModelNotFound,
    errors.QueueFull,
    errors.ModelInvalid,
    errors.DownloadFailed,
    errors.PermissionDenied,
    errors.Unsupported,
)

_KEPT = (errors.InsufficientDisk, errors.PermissionDenied, errors.Unsupported)
_BATCH = (
    errors.ModelNotFound,
    errors.ModelNotDownloaded,
    errors.ModelInvalid,
    errors.QueueFull,
    errors.ShuttingDown,
    *_KEPT,
)

_TABLE = (
    Method(
        "hello",
        connection.hello,
        types.HelloParams,
        types.HelloResult,
        "Agree on a protocol version and learn the daemon's limits. Without it a connection speaks version 1.",
        errors=(errors.Unsupported,),
        bound=True,
    ),
    Method("ping", connection.ping, Empty, Empty, "Answer at once.", bound=True),
    Method("status", admin.status, Empty, types.Status, "The daemon's health in numbers."),
    Method(
        "stats",
        admin.stats,
        types.StatsParams,
        types.Stats,
        "What was counted and measured since the daemon began: requests, tokens, times, loads, deaths.",
        errors=(errors.ModelNotFound, errors.ModelInvalid),
    ),
    Method("metrics", admin.metrics, Empty, types.MetricsResult, "The same, and how things stand, for Prometheus."),
    Method(
        "shutdown",
        admin.shutdown,
        types.ShutdownParams,
        Empty,
        "Let running requests end, refuse new ones, then exit.",
        errors=(errors.DaemonBusy, errors.Unsupported),
    ),
    Method(
        "restart",
        admin.restart,
        Empty,
        types.RestartResult,
        "Have a new daemon take over, of the version that is installed by now, and exit once all that was accepted is "
        "answered. Where the new one fails, this one goes on.",
        errors=(errors.RestartFailed, errors.Unsupported, errors.ShuttingDown),
        work=True,
    ),
    Method("rpc.discover", admin.discover, Empty, None, "This interface as an OpenRPC document."),
    Method("models.list", models.list_models, types.ListParams, types.ModelsResult, "Every model that is known."),
    Method(
        "models.get",
        models.get,
        types.ModelParams,
        types.Model,
        "One model.",
        errors=(errors.ModelNotFound, errors.ModelInvalid),
    ),
    Method(
        "models.story",
        models.story,
        types.OptionalModelParams,
        types.StoriesResult,
        "What became of a model lately, or of all: its last changes of state, and what caused each.",
        errors=(errors.ModelNotFound, errors.ModelInvalid),
    ),
    Method(
        "models.load",
        models.load,
        types.LoadParams,
        types.Model,
        "Load a model; answers once it is Ready, and at once where it is already.",
        errors=(*_LOADING, errors.ContextExceeded),
        work=True,
    ),
    Method(
        "models.unload",
        models.unload,
        types.ModelParams,
        types.Model,
        "Unload a model; answers once its memory is free.",
        errors=(errors.ModelNotFound, errors.ModelBusy),
    ),
    Method(
        "models.acquire",
        models.acquire,
        types.ModelParams,
        types.Lease,
        "Load a model and keep it loaded until it is released or this connection ends.",
        errors=_LOADING,
        work=True,
    ),
    Method(
        "models.release",
        models.release,
        types.LeaseParams,
        Empty,
        "End a lease of this connection.",
        errors=(errors.NotFound,),
        bound=True,
    ),
    Method(
        "models.plan",
        models.plan,
        types.PlanParams,
        types.Plan,
        "What downloading and running a model would take. Needs metadata only.",
        errors=_HUB,
    ),
    Method(
        "models.download",
        models.download,
        types.DownloadParams,
        types.DownloadResult,
        "Fetch a model from the hub, or its newest revision; answers with the job, which outlives the connection.",
        errors=(errors.ModelNotFound, errors.ModelBusy, errors.QueueFull, errors.Unsupported, errors.ShuttingDown),
        work=True,
    ),
    Method(
        "models.delete",
        models.delete,
        types.ModelParams,
        types.DeleteResult,
        "Remove a model of the hub from the disk; refused while it is in use.",
        errors=(errors.ModelNotFound, errors.ModelBusy, errors.Unsupported, errors.ShuttingDown),
    ),
    Method(
        "models.verify",
        models.verify,
        types.ModelParams,
        types.VerifyResult,
        "Compare every file of a model with what the hub says it holds. Reads all of it.",
        errors=(errors.ModelNotFound, errors.ModelInvalid, errors.ModelBusy),
    ),
    Method(
        "models.catalog", models.catalog, Empty, types.CatalogResult, "Recommended models, and which of them fit here."
    ),
    Method(
        "config.get",
        config.get,
        types.GetConfigParams,
        types.ConfigResult,
        "The settings: what each is, where it came from, and when a change takes effect.",
    ),
    Method(
        "config.set",
        config.set_values,
        types.SetConfigParams,
        types.ConfigChange,
        "Change settings in the file, comments kept, and take them over: all of them or, where one is wrong, none.",
        errors=(errors.InvalidSettings, errors.PermissionDenied, errors.InsufficientDisk),
    ),
    Method(
        "config.reload",
        config.reload,
        Empty,
        types.ConfigChange,
        "Take over what the file says now, as the daemon does by itself a second or two after a change, and at SIGHUP.",
        errors=(errors.InvalidSettings,),
    ),
    Method("cache.list", cache.list_caches, Empty, types.CacheResult, "What is kept of prompts, by model."),
    Method(
        "cache.clear",
        cache.clear,
        types.ClearCacheParams,
        types.ClearCacheResult,
        "Forget what is kept of prompts, in memory and on disk. Requests that run keep what they have.",
        errors=(errors.ModelNotFound, errors.ModelInvalid, errors.PermissionDenied),
    ),
    Method("jobs.list", jobs.list_jobs, Empty, types.JobsResult, "Every job that is known."),
    Method("jobs.get", jobs.get, types.JobParams, types.Job, "One job.", errors=(errors.NotFound,)),
    Method(
        "jobs.wait",
        jobs.wait,
        types.JobParams,
        types.Job,
        "One job, once it has ended. Giving up the wait does not end the job.",
        errors=(errors.NotFound,),
    ),
    Method("jobs.cancel", jobs.cancel, types.CancelJobParams, types.Job, "End a job.", errors=(errors.NotFound,)),
    Method(
        "batch.submit",
        batch.submit,
        types.BatchSubmitParams,
        types.Job,
        "Put in a batch job, which is worked off in idle slots and survives the daemon. Answered once it is on disk.",
        errors=_BATCH,
        work=True,
    ),
    Method(
        "batch.append",
        batch.append,
        types.BatchAppendParams,
        types.Job,
        "Add items to a batch job that was submitted `open`.",
        errors=(errors.NotFound, *_BATCH),
        work=True,
    ),
    Method(
        "batch.start",
        batch.start,
        types.JobParams,
        types.Job,
        "Have an open batch job run, or one that has failed or was cancelled go on.",
        errors=(errors.NotFound, *_KEPT),
        work=True,
    ),
    Method("batch.list", batch.list_batches, Empty, types.JobsResult, "Every batch job."),
    Method("batch.get", batch.get, types.JobParams, types.Job, "One batch job.", errors=(errors.NotFound,)),
    Method(
        "batch.results",
        batch.results,
        types.BatchResultsParams,
        types.BatchResultsResult,
        "Some of a batch job's results, in the order of its items.",
        errors=(errors.NotFound, *_KEPT),
    ),
    Method(
        "batch.cancel",
        batch.cancel,
        types.JobParams,
        types.Job,
        "End a batch job; the results that there are stay.",
        errors=(errors.NotFound,),
    ),
    Method(
        "batch.delete",
        batch.delete,
        types.BatchDeleteParams,
        Empty,
        "Remove a batch job with its prompts and results.",
        errors=(errors.NotFound, errors.ModelBusy, *_KEPT),
    ),
    Method(
        "personas.list",
        generation.personas,
        Empty,
        types.PersonasResult,
        "The personas and prompt templates of the settings, which `process` and `chat` may name.",
    ),
    Method(
        "process",
        generation.process,
        types.ProcessParams,
        types.Completion,
        "One prompt in, one text out.",
        errors=_GENERATION,
        work=True,
    ),
    Method(
        "chat",
        generation.chat,
        types.ChatParams,
        types.Completion,
        "The next turn of a conversation.",
        errors=_GENERATION,
        work=True,
    ),
    Method(
        "tokens.count",
        generation.count_tokens,
        types.TokensParams,
        types.TokensResult,
        "How many tokens a text, or a conversation with its chat template, is for a model.",
        errors=_LOADING,
        work=True,
    ),
    Method(
        "tokens.encode",
        generation.encode,
        types.EncodeParams,
        types.EncodeResult,
        "A text as a model's tokens.",
        errors=_LOADING,
        work=True,
    ),
    Method(
        "tokens.decode",
        generation.decode,
        types.DecodeParams,
        types.DecodeResult,
        "The text that a model's tokens spell.",
        errors=_LOADING,
        work=True,
    ),
    Method(
        "embed",
        generation.embed,
        types.EmbedParams,
        types.EmbedResult,
        "Vectors for texts, such as searching by meaning compares.",
        errors=_GENERATION,
        work=True,
    ),
    Method(
        "cancel",
        connection.cancel,
        types.CancelParams,
        types.CancelResult,
        "End another request of this connection; that request is answered too, mostly with `cancelled`. "
        "May be sent as a notification.",
        bound=True,
    ),
    Method(
        "events.subscribe",
        events.subscribe,
        types.SubscribeParams,
        types.SubscribeResult,
        "Watch the daemon: a snapshot, then numbered events.",
        errors=(errors.QueueFull,),
    ),
    Method(
        "events.unsubscribe",
        events.unsubscribe,
        types.SubscriptionParams,
        Empty,
        "End a subscription of this connection. Events that were under way may still arrive.",
        errors=(errors.NotFound,),
        bound=True,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}
