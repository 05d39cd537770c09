"""A runtime for the server's tests: no models, no children; it does what the test tells it, when it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from mlxd.server.events import EventLog
from mlxd.server.limits import ServerLimits
from mlxd.server.runtime_api import Sink
from mlxd_client import errors, types
from mlxd_client.types import Job, Model, Snapshot, Timings, Usage

__all__ = ["FakeRuntime", "FakeTicket", "Lines", "completion"]


def completion(text: str = "", finish_reason: Any = "stop") -> types.Completion:
    usage = Usage(prompt_tokens=3, completion_tokens=len(text))
    return types.Completion(model="fake/model", text=text, finish_reason=finish_reason, usage=usage, timings=Timings())


class Lines:
    """A log that remembers: (level, event, facts)."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def debug(self, event: str, **facts: Any) -> None:
        self.lines.append(("debug", event, facts))

    def info(self, event: str, **facts: Any) -> None:
        self.lines.append(("info", event, facts))

    def warning(self, event: str, **facts: Any) -> None:
        self.lines.append(("warning", event, facts))

    def error(self, event: str, **facts: Any) -> None:
        self.lines.append(("error", event, facts))

    def named(self, event: str) -> list[dict[str, Any]]:
        return [facts for _, name, facts in self.lines if name == event]


class FakeTicket:
    """One generation; the test writes its answer with `sink`. Cancelling answers with the text so far, unless held."""

    def __init__(self, runtime: FakeRuntime, client: int, params: Any, sink: Sink) -> None:
        self.runtime = runtime
        self.client = client
        self.params = params
        self.sink = sink
        self.text = ""
        self.ended = False
        self.cancelled = asyncio.Event()

    def piece(self, text: str, reasoning: str = "") -> None:
        self.text += text
        self.sink.piece(text, reasoning)

    def calls(self, calls: list[types.ToolCall], malformed: list[types.MalformedToolCall]) -> None:
        self.sink.calls(calls, malformed)

    def done(self, finish_reason: Any = "stop") -> None:
        self.ended = True
        self.sink.done(completion(self.text, finish_reason))

    def fail(self, error: errors.RpcError) -> None:
        self.ended = True
        self.sink.fail(error)

    def cancel(self) -> None:
        self.cancelled.set()
        if not self.ended and not self.runtime.hold_cancels:
            self.done("cancelled")


class FakeRuntime:
    """Prompts are scripts: `echo X` answers X at once, `words A B` streams A and B and answers, `bug` raises,
    `busy` is refused; any other waits for the test, in `tickets`.

    Attributes:
        tickets: every generation that was asked for and not answered at once, oldest first.
        waits: futures that `load`, `wait_job` and `acquire` wait on, by model or job; absent ones answer at once.
        gone: clients that left, in order.
    """

    epoch = "epoch-1"
    version = "0.0.test"

    def __init__(self, limits: ServerLimits | None = None) -> None:
        self.model_states: dict[str, Model] = {"fake/model": Model(id="fake/model", state="Downloaded", source="hub")}
        self.job_states: dict[str, Job] = {}
        self.stopping = False
        self.now = 1000.0
        self.events = EventLog(self.epoch, self.snapshot, clock=lambda: self.now, limits=limits)
        self.tickets: list[FakeTicket] = []
        self.waits: dict[str, asyncio.Future[None]] = {}
        self.waiting: asyncio.Queue[str] = asyncio.Queue()
        self.gave_up: asyncio.Queue[str] = asyncio.Queue()
        self.gone: asyncio.Queue[int] = asyncio.Queue()
        self.asked: asyncio.Queue[FakeTicket] = asyncio.Queue()
        self.leases: dict[str, int] = {}
        self.hold_cancels = False
        self.shutdowns = 0
        self.rooms: list[int] = []
        self.idle = True
        self.on_settled: Callable[[], None] = lambda: None

    # --- what the test does ---------------------------------------------------------------------------------------

    def change(self, model: Model, name: str = "loading_completed", **facts: Any) -> int:
        self.model_states[model.id] = model
        return self.events.publish(name, model=model, **facts)

    # --- Runtime --------------------------------------------------------------------------------------------------

    async def stats(self, ref: str | None, clients: types.ClientTotals) -> types.Stats:
        figures = types.Distribution(
            count=1, mean=1.0, stddev=0.0, least=1.0, most=1.0, p50=1.0, p90=1.0, p95=1.0, p99=1.0
        )
        made = types.ModelStats(model=ref or "", requests={"chat": {"stop": 1}}, total_s=figures, deaths={"SIGABRT": 1})
        events = types.EventTotals(published=0, dropped=0, lagged=0)
        downloads = types.DownloadTotals(ended={"done": 1})
        return types.Stats(since_at=1.0, models=[made], clients=clients, events=events, downloads=downloads)

    async def stories(self, ref: str | None) -> types.StoriesResult:
        step = types.StoryStep(at=1.0, cause="found", source="NotDownloaded", target="Downloaded")
        return types.StoriesResult(stories=[types.ModelStory(model=ref or "m", steps=[step])])

    def metrics(self, clients: types.ClientTotals) -> types.MetricsResult:
        return types.MetricsResult(content_type="text/plain", text=f"mlxd_clients {clients.open}\n")

    def status(self, *, clients: int, subscribers: int) -> types.Status:
        return types.Status(
            version=self.version,
            pid=1,
            uptime_s=1.0,
            rss_bytes=1,
            models=types.StatusModels(known=len(self.model_states), loaded=0),
            queue=types.StatusQueue(waiting=0, running=len(self.tickets)),
            clients=clients,
            subscribers=subscribers,
            memory=types.Memory(budget_bytes=1, used_bytes=0),
            workers=[],
        )

    def snapshot(self) -> Snapshot:
        return Snapshot(
            models=list(self.model_states.values()), jobs=list(self.job_states.values()), stopping=self.stopping
        )

    def models(self, *, updates: bool = False) -> list[Model]:
        return list(self.model_states.values())

    async def model(self, ref: str) -> Model:
        if ref not in self.model_states:
            raise errors.ModelNotFound(f"there is no model {ref}", model=ref)
        return self.model_states[ref]

    async def _wait(self, key: str) -> None:
        if key in self.waits:
            self.waiting.put_nowait(key)
            try:
                await self.waits[key]
            except asyncio.CancelledError:
                self.gave_up.put_nowait(key)
                raise

    async def load(self, client: int, params: types.LoadParams) -> Model:
        await self._wait(params.model)
        return await self.model(params.model)

    async def unload(self, ref: str) -> Model:
        return await self.model(ref)

    async def acquire(self, client: int, ref: str) -> types.Lease:
        await self._wait(ref)
        lease = f"lease-{len(self.leases)}"
        self.leases[lease] = client
        return types.Lease(lease=lease, model=await self.model(ref))

    def release(self, client: int, lease: str) -> None:
        if self.leases.get(lease) != client:
            raise errors.NotFound("there is no such lease on this connection", lease=lease)
        del self.leases[lease]

    def jobs(self) -> list[Job]:
        return list(self.job_states.values())

    def job(self, job: str) -> Job:
        if job not in self.job_states:
            raise errors.NotFound(f"there is no job {job}", job=job)
        return self.job_states[job]

    async def wait_job(self, job: str) -> Job:
        await self._wait(job)
        return self.job(job)

    async def cancel_job(self, job: str, *, discard: bool = False) -> Job:
        return self.job(job)

    async def plan(self, params: types.PlanParams) -> types.Plan:
        await self.model(params.model)
        return types.Plan(
            model=params.model, download_bytes=0, disk_free_bytes=1, weights_bytes=1, kv_bytes=1, memory_bytes=2,
            memory_available_bytes=3, fits=True,
        )  # fmt: skip

    async def download(self, client: int, params: types.DownloadParams) -> str:
        self.job_states["download-1"] = Job(job="download-1", kind="download", state="running", model=params.model)
        return "download-1"

    async def delete(self, client: int, ref: str) -> int:
        await self.model(ref)
        return 1

    async def verify(self, ref: str) -> types.VerifyResult:
        await self._wait(ref)
        return types.VerifyResult(ok=True)

    async def catalog(self) -> types.CatalogResult:
        return types.CatalogResult(entries=[], memory_bytes=1)

    async def caches(self) -> types.CacheResult:
        return types.CacheResult(models=[], disk_bytes=0, memory_budget_bytes=1, disk_budget_bytes=1)

    async def clear_caches(self, ref: str | None) -> types.ClearCacheResult:
        if ref is not None:
            await self.model(ref)
        return types.ClearCacheResult(memory_bytes=1, disk_bytes=2)

    async def count_tokens(self, client: int, params: types.TokensParams) -> types.TokensResult:
        if params.text == "bug":
            raise ValueError("a secret path /home/x")
        return types.TokensResult(tokens=len(params.text) if isinstance(params.text, str) else 0)

    async def encode(self, client: int, params: types.EncodeParams) -> types.EncodeResult:
        return types.EncodeResult(tokens=[ord(letter) for letter in params.text])

    async def decode(self, client: int, params: types.DecodeParams) -> types.DecodeResult:
        return types.DecodeResult(text="".join(map(chr, params.tokens)))

    async def embed(self, client: int, params: types.EmbedParams) -> types.EmbedResult:
        usage = types.EmbedUsage(prompt_tokens=len(params.input))
        return types.EmbedResult(
            model="fake/model", dimensions=1, usage=usage, vectors=[[float(len(text))] for text in params.input]
        )

    def generate(self, client: int, kind: str, params: Any, sink: Sink) -> FakeTicket:
        prompt = params.prompt if kind == "process" else params.messages[-1].content
        ticket = FakeTicket(self, client, params, sink)
        if prompt == "bug":
            raise ValueError("a secret path /home/x")
        if prompt == "busy":
            raise errors.QueueFull("the queue is full", retry_after_s=1.5)
        if prompt.startswith("echo "):
            ticket.text = prompt[5:]
            ticket.done()
        elif prompt.startswith("words "):
            for word in prompt.split()[1:]:
                ticket.piece(word)
            ticket.done()
        else:
            self.tickets.append(ticket)
            self.asked.put_nowait(ticket)
        return ticket

    def client_gone(self, client: int) -> None:
        self.leases = {lease: holder for lease, holder in self.leases.items() if holder != client}
        self.gone.put_nowait(client)

    def make_room(self, working: int) -> None:
        self.rooms.append(working)

    async def restart(self) -> types.RestartResult:
        raise errors.RestartFailed("there is no other")

    def request_shutdown(self) -> None:
        self.shutdowns += 1
