"""What the server asks of the rest of the daemon, and what it offers in return. Interfaces only."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Literal, Protocol

from mlxd_client import errors, types

__all__ = ["Batches", "Configuration", "Log", "Runtime", "Sink", "Ticket"]


class Log(Protocol):
    """The part of structlog's bound logger that the server uses: an event's name, then facts."""

    def debug(self, event: str, **facts: Any) -> Any: ...
    def info(self, event: str, **facts: Any) -> Any: ...
    def warning(self, event: str, **facts: Any) -> Any: ...
    def error(self, event: str, **facts: Any) -> Any: ...


class Sink(Protocol):
    """Where the runtime puts the answer to one generation. Ends with exactly one of `done` and `fail`.

    All of it may be called from within `Runtime.generate`, and after the client is gone; then it goes nowhere.
    """

    @property
    def request_name(self) -> str:
        """Connection and request, e.g. `c12:7`; for logs and events."""

    def piece(self, text: str, reasoning: str = "", index: int = 0) -> None:
        """The next text of the answer of this index. Does nothing unless the request streams."""

    def calls(self, calls: list[types.ToolCall], malformed: list[types.MalformedToolCall]) -> None:
        """Tool calls that were completed just now. Does nothing unless the request streams."""

    def phase(
        self, phase: Literal["queued", "downloading", "loading", "prompt"], progress: float | None = None
    ) -> None:
        """What happens before the first text; `progress` 0 to 1. Does nothing unless the request streams."""

    def done(self, completion: types.Completion) -> None:
        """The whole answer. One whose finish_reason is `cancelled` reaches the client as a Cancelled error."""

    def fail(self, error: errors.RpcError) -> None: ...


class Ticket(Protocol):
    """A generation under way."""

    def cancel(self) -> None:
        """End it as soon as possible; its sink still gets `done` or `fail`. May be called more than once."""


class Batches(Protocol):
    """Batch jobs. Every method raises errors.RpcError for what it refuses."""

    async def submit(self, params: types.BatchSubmitParams) -> types.Job: ...
    async def append(self, params: types.BatchAppendParams) -> types.Job: ...
    async def start(self, job: str) -> types.Job: ...
    def jobs(self) -> list[types.Job]: ...
    def get(self, job: str) -> types.Job: ...
    async def cancel(self, job: str) -> types.Job: ...
    async def delete(self, params: types.BatchDeleteParams) -> None: ...
    async def results(self, params: types.BatchResultsParams) -> types.BatchResultsResult: ...


class Configuration(Protocol):
    """The daemon's settings. Every method raises errors.RpcError for what it refuses."""

    @property
    def error(self) -> types.ErrorObject | None:
        """Why the file cannot be used as it is, where it cannot."""

    def view(self, names: Sequence[str] | None = None) -> types.ConfigResult: ...
    async def set(self, values: Mapping[str, Any], unset: Sequence[str] = ()) -> types.ConfigChange: ...
    async def reload(self) -> types.ConfigChange: ...


class Runtime(Protocol):
    """Models, jobs and generation. Every method raises errors.RpcError for what it refuses.

    `client` numbers a connection; it is never used twice. A coroutine of this interface is cancelled when its caller
    gave up: what it waits for goes on or not as the runtime decides, but the coroutine ends.
    """

    @property
    def epoch(self) -> str:
        """Names this run of the daemon."""

    @property
    def version(self) -> str: ...

    def status(self, *, clients: int, subscribers: int) -> types.Status: ...

    async def stats(self, ref: str | None, clients: types.ClientTotals) -> types.Stats:
        """What was counted and measured, of one model or of all; `clients` is for the server to say."""

    def metrics(self, clients: types.ClientTotals) -> types.MetricsResult: ...

    def snapshot(self) -> types.Snapshot:
        """The state that the events published so far have led to: neither older nor newer."""

    def models(self, *, updates: bool = False) -> list[types.Model] | Awaitable[list[types.Model]]: ...
    async def model(self, ref: str) -> types.Model: ...
    async def stories(self, ref: str | None) -> types.StoriesResult: ...
    async def load(self, client: int, params: types.LoadParams) -> types.Model: ...
    async def unload(self, ref: str) -> types.Model: ...
    async def acquire(self, client: int, ref: str) -> types.Lease: ...
    def release(self, client: int, lease: str) -> None: ...

    def jobs(self) -> list[types.Job]: ...
    def job(self, job: str) -> types.Job: ...
    async def wait_job(self, job: str) -> types.Job: ...
    async def cancel_job(self, job: str, *, discard: bool = False) -> types.Job: ...

    @property
    def batches(self) -> Batches: ...

    async def plan(self, params: types.PlanParams) -> types.Plan: ...

    async def download(self, client: int, params: types.DownloadParams) -> str:
        """The id of the job that fetches the model; it does not end with the connection."""

    async def delete(self, client: int, ref: str) -> int:
        """Bytes that were freed."""

    async def verify(self, ref: str) -> types.VerifyResult: ...
    async def catalog(self) -> types.CatalogResult: ...

    def personas(self) -> types.PersonasResult: ...

    async def caches(self) -> types.CacheResult: ...
    async def clear_caches(self, ref: str | None) -> types.ClearCacheResult: ...

    async def count_tokens(self, client: int, params: types.TokensParams) -> types.TokensResult: ...
    async def encode(self, client: int, params: types.EncodeParams) -> types.EncodeResult: ...
    async def decode(self, client: int, params: types.DecodeParams) -> types.DecodeResult: ...
    async def embed(self, client: int, params: types.EmbedParams) -> types.EmbedResult: ...

    def generate(
        self,
        client: int,
        kind: Literal["process", "chat"],
        params: types.ProcessParams | types.ChatParams,
        sink: Sink,
    ) -> Ticket:
        """Admit a generation and return at once; the answer goes to `sink`. Raising means that `sink` is not used."""

    def client_gone(self, client: int) -> None:
        """The connection ended: its leases end too. Its calls were cancelled before. Called once per connection."""

    def request_shutdown(self) -> None:
        """Begin to end the daemon; returns at once, and may be called more than once."""

    def make_room(self, working: int) -> None:
        """The same, for another daemon to be started in its place, if this one is idle. Raises DaemonBusy, Unsupported.

        Args:
            working: requests under way, as the server counts them.
        """

    async def restart(self) -> types.RestartResult:
        """Have a new daemon take over; returns once that one serves. Raises RestartFailed, Unsupported."""
