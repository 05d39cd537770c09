"""The method surface, once for both shells: each entry turns arguments into a Request and is bound by the shell.

An entry is written as a method that returns the Request; `remote` gives it, on `Client`, the type of the answer, and
on `AsyncClient` a coroutine of it. `wait_s` is everywhere the caller's own patience in seconds: unset means the
client's `timeout_s` for short calls and no limit for those that may rightly take long (generation, embed, load,
acquire, wait_job, verify, delete, plan, `models` with updates, clear_cache, restart, and whatever changes a batch job
or reads its results), None means no limit. It is not the option `timeout_s` of generation, a deadline which the daemon
keeps; where that is given, the patience that is unset is that deadline plus the client's `timeout_s`.
"""

from __future__ import annotations

import base64
import functools
import sys
from array import array
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, TypedDict, TypeVar, Unpack, overload

import msgspec
from msgspec import UNSET, UnsetType

from .errors import InvalidParams
from .types import (
    BatchAppendParams,
    BatchDeleteParams,
    BatchItem,
    BatchResultsParams,
    BatchResultsResult,
    BatchSubmitParams,
    CacheResult,
    CancelJobParams,
    CancelParams,
    CancelResult,
    CatalogResult,
    ChatParams,
    ClearCacheParams,
    ClearCacheResult,
    Completion,
    ConfigChange,
    ConfigResult,
    DecodeParams,
    DecodeResult,
    DeleteResult,
    DownloadParams,
    DownloadResult,
    EmbedParams,
    EmbedResult,
    EncodeParams,
    EncodeResult,
    GetConfigParams,
    Job,
    JobParams,
    JobsResult,
    Lease,
    ListParams,
    LoadParams,
    Message,
    MetricsResult,
    Model,
    ModelParams,
    ModelsResult,
    ModelStory,
    OptionalModelParams,
    PersonasResult,
    Plan,
    PlanParams,
    ProcessParams,
    RestartResult,
    SetConfigParams,
    ShutdownParams,
    Stats,
    StatsParams,
    Status,
    StoriesResult,
    TextPart,
    TokensParams,
    TokensResult,
    VerifyResult,
)

if TYPE_CHECKING:
    from . import aio, sync

__all__ = ["ChatOptions", "GenerateOptions", "Items", "Messages", "Methods", "Request", "Wait"]

P = ParamSpec("P")
T = TypeVar("T")

Wait = float | UnsetType | None
Messages = str | Sequence[Message | Mapping[str, Any]]
Items = Sequence[BatchItem | Mapping[str, Any]]


class Request(Generic[T]):
    """A call before it is sent.

    Attributes:
        pick: the wire's result to what the caller gets.
        long: whether it may rightly take any time.
        deadline_s: the limit that the daemon was asked to keep.
    """

    __slots__ = ("deadline_s", "long", "method", "params", "pick", "result_type", "wait_s")

    def __init__(
        self,
        method: str,
        params: Any,
        result_type: Any,
        wait_s: Wait,
        *,
        pick: Callable[[Any], T] | None = None,
        long: bool = False,
        deadline_s: float | None = None,
    ) -> None:
        self.method = method
        self.params = params
        self.result_type = result_type
        self.wait_s = wait_s
        self.pick = pick
        self.long = long
        self.deadline_s = deadline_s

    def patience_s(self, default_s: float | None) -> float | None:
        """How long to wait for the answer, in seconds; None is without limit."""
        if self.wait_s is not UNSET:
            return self.wait_s
        if not self.long:
            return default_s
        return None if self.deadline_s is None or default_s is None else self.deadline_s + default_s

    def finish(self, result: Any) -> T:
        return result if self.pick is None else self.pick(result)


class Blocking:
    """Marks the shell whose methods return the answer."""


class Awaiting:
    """Marks the shell whose methods return a coroutine."""


class _Entry(Generic[P, T]):
    """One method of the surface. `via` names the shell's method that the Request goes to."""

    via = "_run"

    def __init__(self, build: Callable[Concatenate[Any, P], Request[T]]) -> None:
        self.build = build

    def bound(self) -> Callable[..., Any]:
        build, via = self.build, self.via

        @functools.wraps(build)
        def method(self: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
            return getattr(self, via)(build(self, *args, **kwargs))

        return method


class remote(_Entry[P, T]):
    @overload
    def __get__(self, shell: Blocking, owner: Any) -> Callable[P, T]: ...
    @overload
    def __get__(self, shell: Awaiting, owner: Any) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, shell: Any, owner: Any) -> Any:
        raise NotImplementedError  # every shell has real functions in its place


class streamed(_Entry[P, Completion]):
    via = "_stream"

    @overload
    def __get__(self, shell: Blocking, owner: Any) -> Callable[P, sync.Stream]: ...
    @overload
    def __get__(self, shell: Awaiting, owner: Any) -> Callable[P, aio.AsyncStream]: ...
    def __get__(self, shell: Any, owner: Any) -> Any:
        raise NotImplementedError


class leased(_Entry[P, Lease]):
    via = "_lease"

    @overload
    def __get__(self, shell: Blocking, owner: Any) -> Callable[P, sync.ModelLease]: ...
    @overload
    def __get__(self, shell: Awaiting, owner: Any) -> Callable[P, aio.AsyncModelLease]: ...
    def __get__(self, shell: Any, owner: Any) -> Any:
        raise NotImplementedError


class GenerateOptions(TypedDict, total=False):
    """The options of GenerateParams, by the same names; None means unset. `timeout_s` is the daemon's deadline."""

    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: dict[str, float] | None
    seed: int | None
    stop: str | list[str] | None
    logprobs: int | None
    schema: dict[str, Any] | bool | None
    grammar: str | None
    thinking: bool | None
    keep_alive: float | None
    timeout_s: float | None
    priority: Literal["interactive", "batch"] | None
    cache_prompt: bool | None
    xtc_probability: float | None
    xtc_threshold: float | None
    thinking_budget: int | None
    n: int | None
    adapter: str | None
    speculation: Literal["auto", "off", "lookup", "draft"] | None
    context_policy: Literal["refuse", "drop_oldest", "rotate"] | None
    kv_bits: Literal[4, 8] | None
    deterministic: bool | None
    persona: str | None


class ProcessOptions(GenerateOptions, total=False):
    system: str | None
    template: str | None
    values: dict[str, str] | None


class ChatOptions(GenerateOptions, total=False):
    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None


def _set(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are set. Which exist, the struct says: it raises TypeError for others."""
    if "stream" in options:
        raise TypeError("`stream` is no option: call stream_process or stream_chat")
    made = {name: value for name, value in options.items() if value is not None}
    if isinstance(made.get("stop"), str):
        made["stop"] = [made["stop"]]
    return made


def _turns(messages: Messages) -> list[Message]:
    if isinstance(messages, str):
        return [Message(role="user", content=messages)]
    return [turn if isinstance(turn, Message) else Message(**_in_parts(turn)) for turn in messages]


def _in_parts(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """The turn, with texts that lie bare among its parts made parts."""
    content = turn.get("content")
    if isinstance(content, str) or not isinstance(content, Sequence):
        return turn
    return {**turn, "content": [TextPart(text=part) if isinstance(part, str) else part for part in content]}


def _generate(method: str, params: ProcessParams | ChatParams, wait_s: Wait) -> Request[Completion]:
    deadline_s = params.timeout_s if params.timeout_s is not UNSET else None
    return Request(method, params, Completion, wait_s, long=True, deadline_s=deadline_s)


def _unset(value: T | None) -> T | UnsetType:
    return UNSET if value is None else value


class Methods:
    """What a client can ask the daemon. Every method raises RpcError's kinds for the daemon's refusals, and
    ConnectFailed, ConnectionLost, RequestTimeout or ProtocolError for what goes wrong on the way."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name, entry in vars(Methods).items():
            if isinstance(entry, _Entry):
                setattr(cls, name, entry.bound())

    @remote
    def ping(self, *, wait_s: Wait = UNSET) -> Request[None]:
        """A round trip through the daemon, and nothing else."""
        return Request("ping", None, Any, wait_s, pick=_nothing)

    @remote
    def status(self, *, wait_s: Wait = UNSET) -> Request[Status]:
        """The daemon's version, age, memory, queue and workers."""
        return Request("status", None, Status, wait_s)

    @remote
    def stats(self, model: str | None = None, *, wait_s: Wait = UNSET) -> Request[Stats]:
        """What was counted and measured since the daemon began, of all models or one. Raises ModelNotFound."""
        return Request("stats", None if model is None else StatsParams(model=model), Stats, wait_s)

    @remote
    def metrics(self, *, wait_s: Wait = UNSET) -> Request[str]:
        """The same, and how things stand, as text for Prometheus (exposition format 0.0.4)."""
        return Request("metrics", None, MetricsResult, wait_s, pick=_exposition)

    @remote
    def shutdown(self, *, if_idle: bool = False, wait_s: Wait = UNSET) -> Request[None]:
        """Ask the daemon to drain and end. Returns when it has agreed, not when it has ended.

        Args:
            if_idle: only if nobody needs it, so that another daemon can be started in its place. Raises DaemonBusy.
        """
        return Request("shutdown", ShutdownParams(if_idle=True) if if_idle else None, Any, wait_s, pick=_nothing)

    @remote
    def restart(self, *, wait_s: Wait = UNSET) -> Request[RestartResult]:
        """Have a new daemon take over from this one, of the version that is installed by now. Returns once it serves;
        what was accepted before is answered by the old one. Raises RestartFailed: the old one goes on."""
        return Request("restart", None, RestartResult, wait_s, long=True)

    @remote
    def discover(self, *, wait_s: Wait = UNSET) -> Request[dict[str, Any]]:
        """The OpenRPC document that describes this daemon's methods."""
        return Request("rpc.discover", None, dict[str, Any], wait_s)

    @remote
    def personas(self, *, wait_s: Wait = UNSET) -> Request[PersonasResult]:
        """The personas and prompt templates that requests may name."""
        return Request("personas.list", None, PersonasResult, wait_s)

    @remote
    def config_get(self, *names: str, wait_s: Wait = UNSET) -> Request[ConfigResult]:
        """The settings, or those of these names: what each is, where it came from, when a change takes effect."""
        params = GetConfigParams(names=list(names)) if names else None
        return Request("config.get", params, ConfigResult, wait_s)

    @remote
    def config_set(
        self, values: Mapping[str, Any] | None = None, *, unset: Sequence[str] = (), wait_s: Wait = UNSET
    ) -> Request[ConfigChange]:
        """Change settings: all of them or, where one is wrong, none.

        Args:
            values: by name, or by `setting.key` for one entry of a table.
            unset: what is taken out of the file.

        Raises InvalidParams, InvalidSettings, PermissionDenied, InsufficientDisk.
        """
        return Request(
            "config.set", SetConfigParams(values=dict(values or {}), unset=list(unset)), ConfigChange, wait_s
        )

    @remote
    def config_reload(self, *, wait_s: Wait = UNSET) -> Request[ConfigChange]:
        """Have the daemon take over what its file says now. Raises InvalidSettings where that cannot be used."""
        return Request("config.reload", None, ConfigChange, wait_s)

    @remote
    def models(self, *, updates: bool = False, wait_s: Wait = UNSET) -> Request[list[Model]]:
        """Every model that the daemon knows, in whatever state.

        Args:
            updates: ask the hub for each model's newest revision first, see Model.latest_revision. Takes as long as
                the hub does, so that `wait_s` unset has no limit then.
        """
        params = ListParams(updates=True) if updates else None
        return Request("models.list", params, ModelsResult, wait_s, pick=_models, long=updates)

    @remote
    def model(self, model: str, *, wait_s: Wait = UNSET) -> Request[Model]:
        """One model, by id, alias or absolute folder. Raises ModelNotFound."""
        return Request("models.get", ModelParams(model=model), Model, wait_s)

    @remote
    def stories(self, model: str | None = None, *, wait_s: Wait = UNSET) -> Request[list[ModelStory]]:
        """The last changes of state of a model, or of all, each with its cause. Raises ModelNotFound."""
        params = None if model is None else OptionalModelParams(model=model)
        return Request("models.story", params, StoriesResult, wait_s, pick=_stories)

    @remote
    def load(
        self,
        model: str,
        *,
        keep_alive: float | None = None,
        adapter: str | None = None,
        draft_model: str | None = None,
        system: str | None = None,
        persona: str | None = None,
        wait_s: Wait = UNSET,
    ) -> Request[Model]:
        """Load a model and return it once it is Ready.

        Args:
            keep_alive: seconds until an idle model is unloaded; -1 never, 0 at once.
            adapter: what requests get that name none: an absolute folder, or an id of the hub; `none` takes it away.
            system: a system turn whose prompts are to begin at once; raises Unsupported where that cannot be.
            persona: the same with the system turn of one of the settings; raises InvalidParams where that has none.
            wait_s: the caller's patience in seconds; unset or None has no limit.

        Raises ModelNotFound, ModelInvalid, InsufficientMemory, LoadFailed.
        """
        params = LoadParams(
            model=model, keep_alive=_unset(keep_alive), adapter=_unset(adapter), draft_model=_unset(draft_model),
            system=_unset(system), persona=_unset(persona),
        )  # fmt: skip
        return Request("models.load", params, Model, wait_s, long=True)

    @remote
    def unload(self, model: str, *, wait_s: Wait = UNSET) -> Request[Model]:
        """Unload a model; its memory is free when this returns. Raises ModelBusy while it generates or is leased."""
        return Request("models.unload", ModelParams(model=model), Model, wait_s)

    @remote
    def download(
        self, model: str, *, revision: str | None = None, repair: bool = False, wait_s: Wait = UNSET
    ) -> Request[str]:
        """Have a model of the hub downloaded, or its newest revision. Returns the id of the job that does it, at once:
        a new one, or the one that does so already. `wait_job` returns when it has ended, `events` tell how far it is.

        Args:
            revision: a branch, tag or commit; makes it a model of its own, `org/name@revision`, that stays as it is.
            repair: also check the files that are there, and fetch bad ones anew.

        Raises ModelNotFound, InvalidParams, Unsupported.
        """
        params = DownloadParams(model=model, revision=_unset(revision), repair=repair)
        return Request("models.download", params, DownloadResult, wait_s, pick=_job)

    @remote
    def delete(self, model: str, *, wait_s: Wait = UNSET) -> Request[int]:
        """Delete a model of the hub from the disk. Returns the bytes that this freed.

        Raises ModelNotFound, ModelBusy while it is downloaded, loaded, or used.
        """
        return Request("models.delete", ModelParams(model=model), DeleteResult, wait_s, pick=_freed, long=True)

    @remote
    def verify(self, model: str, *, wait_s: Wait = UNSET) -> Request[VerifyResult]:
        """Read every file of a model and compare it with what the hub says of it. Names the bad ones; mends none."""
        return Request("models.verify", ModelParams(model=model), VerifyResult, wait_s, long=True)

    @remote
    def plan(
        self, model: str, *, revision: str | None = None, context_length: int | None = None, wait_s: Wait = UNSET
    ) -> Request[Plan]:
        """What having and running a model would take, before anything happens.

        Args:
            context_length: tokens to plan the KV cache for; None for what a load reserves.
        """
        params = PlanParams(model=model, revision=_unset(revision), context_length=_unset(context_length))
        return Request("models.plan", params, Plan, wait_s, long=True)

    @remote
    def catalog(self, *, wait_s: Wait = UNSET) -> Request[CatalogResult]:
        """The recommended models, each with whether it is here and whether it can run here."""
        return Request("models.catalog", None, CatalogResult, wait_s)

    @remote
    def cache(self, *, wait_s: Wait = UNSET) -> Request[CacheResult]:
        """What is kept of prompts, by model, in memory and on disk."""
        return Request("cache.list", None, CacheResult, wait_s)

    @remote
    def clear_cache(self, model: str | None = None, *, wait_s: Wait = UNSET) -> Request[ClearCacheResult]:
        """Forget what is kept of prompts, of one model or of all. Returns what that freed. Raises ModelNotFound."""
        return Request("cache.clear", ClearCacheParams(model=_unset(model)), ClearCacheResult, wait_s, long=True)

    @leased
    def acquire(self, model: str, *, wait_s: Wait = UNSET) -> Request[Lease]:
        """Keep a model loaded until the lease is released or this client's connection ends. Loads it if need be."""
        return Request("models.acquire", ModelParams(model=model), Lease, wait_s, long=True)

    @remote
    def jobs(self, *, wait_s: Wait = UNSET) -> Request[list[Job]]:
        """The jobs that the daemon remembers."""
        return Request("jobs.list", None, JobsResult, wait_s, pick=_jobs)

    @remote
    def job(self, job: str, *, wait_s: Wait = UNSET) -> Request[Job]:
        """One job, by id. Raises NotFound."""
        return Request("jobs.get", JobParams(job=job), Job, wait_s)

    @remote
    def wait_job(self, job: str, *, wait_s: Wait = UNSET) -> Request[Job]:
        """One job, once it has ended. `wait_s` unset or None has no limit; giving up does not cancel the job."""
        return Request("jobs.wait", JobParams(job=job), Job, wait_s, long=True)

    @remote
    def cancel_job(self, job: str, *, discard: bool = False, wait_s: Wait = UNSET) -> Request[Job]:
        """Cancel a job and return it.

        Args:
            discard: of a download, also remove what it has fetched so far; else a later one goes on from there.
        """
        return Request("jobs.cancel", CancelJobParams(job=job, discard=discard), Job, wait_s)

    @remote
    def submit_batch(
        self,
        items: Items,
        *,
        model: str | None = None,
        key: str | None = None,
        name: str | None = None,
        open: bool = False,
        wait_s: Wait = UNSET,
    ) -> Request[Job]:
        """Put in a batch job and return it, once it is on disk. It is worked off in idle slots and survives the daemon.

        Args:
            items: {method: `process` or `chat`, params, custom_id?}, at most 1,000 and 16 MiB; more are appended.
            model: for items that name none.
            key: makes it safe to ask again: the same items under the same key are one job.
            name: for people.
            open: further items will be appended, and none runs before `start_batch`.

        Raises InvalidParams and others, with `details["field"]`, for items that cannot be; QueueFull, InsufficientDisk.
        """
        params = BatchSubmitParams(
            items=_items(items), model=_unset(model), key=_unset(key), name=_unset(name), open=open
        )
        return Request("batch.submit", params, Job, wait_s, long=True)

    @remote
    def append_batch(self, job: str, items: Items, *, at: int | None = None, wait_s: Wait = UNSET) -> Request[Job]:
        """Add items to a batch job that was submitted `open`.

        Args:
            at: how many items the job has so far (`Job.total_items`); makes it safe to ask again.
        """
        params = BatchAppendParams(job=job, items=_items(items), at=_unset(at))
        return Request("batch.append", params, Job, wait_s, long=True)

    @remote
    def start_batch(self, job: str, *, wait_s: Wait = UNSET) -> Request[Job]:
        """Have an open batch job run, or one that has failed or was cancelled go on. Raises NotFound."""
        return Request("batch.start", JobParams(job=job), Job, wait_s, long=True)

    @remote
    def batches(self, *, wait_s: Wait = UNSET) -> Request[list[Job]]:
        """Every batch job. `wait_job` and `events` follow one as they do other jobs."""
        return Request("batch.list", None, JobsResult, wait_s, pick=_jobs)

    @remote
    def batch(self, job: str, *, wait_s: Wait = UNSET) -> Request[Job]:
        """One batch job. Raises NotFound."""
        return Request("batch.get", JobParams(job=job), Job, wait_s)

    @remote
    def batch_results(
        self, job: str, *, after: int | None = None, limit: int = 100, wait_s: Wait = UNSET
    ) -> Request[BatchResultsResult]:
        """Some of a batch job's results, in the order of its items. Raises NotFound.

        Args:
            after: the `index` of the last result that the caller has; None from the beginning.
            limit: at most so many, up to 1,000.
        """
        params = BatchResultsParams(job=job, after=_unset(after), limit=limit)
        return Request("batch.results", params, BatchResultsResult, wait_s, long=True)

    @remote
    def cancel_batch(self, job: str, *, wait_s: Wait = UNSET) -> Request[Job]:
        """End a batch job; the results that there are stay. Raises NotFound."""
        return Request("batch.cancel", JobParams(job=job), Job, wait_s, long=True)

    @remote
    def delete_batch(self, job: str, *, cancel: bool = False, wait_s: Wait = UNSET) -> Request[None]:
        """Remove a batch job with its prompts and results.

        Args:
            cancel: also where it has not ended, which otherwise raises InvalidParams.
        """
        params = BatchDeleteParams(job=job, cancel=cancel)
        return Request("batch.delete", params, Any, wait_s, pick=_nothing, long=True)

    @remote
    def process(self, prompt: str, *, wait_s: Wait = UNSET, **options: Unpack[ProcessOptions]) -> Request[Completion]:
        """One prompt in, one text out.

        Args:
            wait_s: the caller's patience in seconds; giving up cancels the request.
            options: see GenerateParams, `system`, `template` and `values`. Raises TypeError for names that are none.
        """
        return _generate("process", ProcessParams(prompt=prompt, **_set(options)), wait_s)

    @remote
    def chat(self, messages: Messages, *, wait_s: Wait = UNSET, **options: Unpack[ChatOptions]) -> Request[Completion]:
        """The next turn of a conversation.

        Args:
            messages: the turns so far, as Message or dict {role, content, …}; a str is one user turn. Content is a
                text, or a list of texts and images: see `mlxd_client.image`.
            wait_s: the caller's patience in seconds; giving up cancels the request.
            options: see GenerateParams, `tools` and `tool_choice`. Raises TypeError for names that are none.
        """
        return _generate("chat", ChatParams(messages=_turns(messages), **_set(options)), wait_s)

    @streamed
    def stream_process(
        self, prompt: str, *, wait_s: Wait = UNSET, **options: Unpack[ProcessOptions]
    ) -> Request[Completion]:
        """As `process`, but an iterator of the text's pieces. `wait_s` bounds the wait for each piece, in seconds."""
        return _generate("process", ProcessParams(prompt=prompt, stream=True, **_set(options)), wait_s)

    @streamed
    def stream_chat(
        self, messages: Messages, *, wait_s: Wait = UNSET, **options: Unpack[ChatOptions]
    ) -> Request[Completion]:
        """As `chat`, but an iterator of the text's pieces. `wait_s` bounds the wait for each piece, in seconds."""
        return _generate("chat", ChatParams(messages=_turns(messages), stream=True, **_set(options)), wait_s)

    @remote
    def count_tokens(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        tools: list[dict[str, Any]] | None = None,
        model: str | None = None,
        wait_s: Wait = UNSET,
    ) -> Request[int]:
        """How many tokens `text`, or `messages` and `tools` through the chat template, take for a model."""
        turns = UNSET if messages is None else _turns(messages)
        params = TokensParams(model=_unset(model), text=_unset(text), messages=turns, tools=_unset(tools))
        return Request("tokens.count", params, TokensResult, wait_s, pick=_tokens)

    @remote
    def encode_tokens(
        self,
        text: str,
        *,
        special: bool = False,
        pieces: bool = False,
        model: str | None = None,
        wait_s: Wait = UNSET,
    ) -> Request[EncodeResult]:
        """`text` as a model's tokens.

        Args:
            special: with what the tokenizer puts around a text.
            pieces: with each token's own text.
        """
        params = EncodeParams(text=text, special=special, pieces=pieces, model=_unset(model))
        return Request("tokens.encode", params, EncodeResult, wait_s)

    @remote
    def decode_tokens(self, tokens: Sequence[int], *, model: str | None = None, wait_s: Wait = UNSET) -> Request[str]:
        """The text that a model's tokens spell. Raises InvalidParams for ones that it does not have."""
        params = DecodeParams(tokens=list(tokens), model=_unset(model))
        return Request("tokens.decode", params, DecodeResult, wait_s, pick=_text)

    @remote
    def embed(
        self,
        input: str | Sequence[str],
        *,
        model: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
        keep_alive: float | None = None,
        timeout_s: float | None = None,
        wait_s: Wait = UNSET,
    ) -> Request[EmbedResult]:
        """Vectors for texts, in `EmbedResult.vectors`, one for each in their order.

        Args:
            input: one text or up to 2,048, with whatever instruction the model wants before them.
            dimensions: keep so many of the first numbers of each vector; None keeps all.
            normalize: scale vectors to length 1; None does as the model's folder says, else yes.
            truncate: cut off texts that are too long, which otherwise raise ContextExceeded.
            timeout_s: the daemon's deadline.
            wait_s: the caller's patience in seconds; giving up cancels the request.
        """
        params = EmbedParams(
            input=[input] if isinstance(input, str) else list(input), model=_unset(model),
            dimensions=_unset(dimensions), normalize=_unset(normalize), truncate=truncate, encoding="base64",
            keep_alive=_unset(keep_alive), timeout_s=_unset(timeout_s),
        )  # fmt: skip
        return Request("embed", params, EmbedResult, wait_s, pick=_vectors, long=True, deadline_s=timeout_s)

    @remote
    def cancel(self, request_id: int | str, *, wait_s: Wait = UNSET) -> Request[bool]:
        """Cancel a request of this client, e.g. a stream's `request_id`. Returns whether it was still running."""
        return Request("cancel", CancelParams(id=request_id), CancelResult, wait_s, pick=_cancelled)

    @remote
    def call(self, method: str, params: Any = None, result_type: Any = Any, *, wait_s: Wait = UNSET) -> Request[Any]:
        """Any method, for what has no name here.

        Args:
            params: a Params struct or a dict of plain values.
            result_type: a struct or other type that msgspec converts to; Any gives the plain result.
        """
        return Request(method, params, result_type, wait_s)


def _items(items: Items) -> list[BatchItem]:
    """Items as structs. Raises InvalidParams that names the first that is none."""
    try:
        return msgspec.convert(list(items), list[BatchItem])
    except msgspec.ValidationError as error:
        raise InvalidParams(f"items: {error}", field="items") from None


def _nothing(result: Any) -> None:
    return None


def _stories(result: StoriesResult) -> list[ModelStory]:
    return result.stories


def _exposition(result: MetricsResult) -> str:
    return result.text


def _models(result: ModelsResult) -> list[Model]:
    return result.models


def _job(result: DownloadResult) -> str:
    return result.job


def _freed(result: DeleteResult) -> int:
    return result.freed_bytes


def _jobs(result: JobsResult) -> list[Job]:
    return result.jobs


def _tokens(result: TokensResult) -> int:
    return result.tokens


def _text(result: DecodeResult) -> str:
    return result.text


def _vectors(result: EmbedResult) -> EmbedResult:
    """With the numbers of what came as base64, which takes a third of the room that lists take."""
    for text in result.base64:
        numbers = array("f", base64.b64decode(text))
        if sys.byteorder == "big":
            numbers.byteswap()
        result.vectors.append(numbers.tolist())
    result.base64 = []
    return result


def _cancelled(result: CancelResult) -> bool:
    return result.cancelled
