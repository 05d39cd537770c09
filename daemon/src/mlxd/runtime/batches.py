"""Batch jobs between callers, the file that keeps them and the models that answer: checked, put in, run, read out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from mlxd_client import errors, types
from mlxd_client.types import UNSET

from ..batch.header import FILE
from ..core import actions as do
from ..core import events as ev
from ..core.core import Core
from ..core.jobs import BatchJob
from ..generation import Generation, refuse_unsupported
from ..personas import completed
from .generations import Generations
from .jobs import Jobs
from .ledger import Ledger, found
from .supply import NO_ADAPTER, Supply

if TYPE_CHECKING:
    from ..batch.store import Item, Outcome
    from ..server.runtime_api import Log
    from ..settings import Settings

T = TypeVar("T")

# Jobs that have not ended, and models that one frame of items may name.
MOST_OPEN, MOST_MODELS = 256, 100
# Items that are read ahead of their turn take so much memory at most; beyond it they are read when it has come.
AHEAD_BYTES = 1024 * 1024
# So many items are checked before others get their turn.
CHECKED_AT_ONCE = 100
# How long a caller waits for the end of a job to be recorded that is about to end, in seconds.
ENDED_S = 5.0

_KINDS: dict[str, type[types.ProcessParams] | type[types.ChatParams]] = {
    "process": types.ProcessParams, "chat": types.ChatParams,
}  # fmt: skip


class Batches:
    """All batch jobs of one daemon.

    Args:
        epoch: makes the ids of jobs unique across runs of the daemon.
    """

    def __init__(
        self, settings: Settings, core: Core, generations: Generations, supply: Supply, jobs: Jobs,
        tell: Callable[[ev.Event], None], log: Log, loop: asyncio.AbstractEventLoop, *, epoch: str,
    ) -> None:  # fmt: skip
        self.ledger = Ledger(Path(settings.home) / FILE, settings.batch_disk_bytes, core, tell, log, loop)
        self._settings = settings
        self._core = core
        self._generations = generations
        self._supply = supply
        self._jobs = jobs
        self._tell = tell
        self._log = log
        self._loop = loop
        self._epoch = epoch[:6]
        self._made = 0
        self._coming = 0  # jobs that are being put in
        self._flights: dict[int, Flight] = {}
        self._ahead: dict[tuple[str, int], tuple[str, bytes]] = {}
        self._ahead_bytes = 0

    @property
    def busy(self) -> bool:
        return self.ledger.busy

    # --- for callers ----------------------------------------------------------------------------------------------

    async def submit(self, params: types.BatchSubmitParams) -> types.Job:
        """Raises InvalidParams, Unsupported and others for items that cannot be; `details.field` names the culprit."""
        if not params.items and not params.open:
            raise errors.InvalidParams("items: there are none", field="items")
        asked = None if params.model is UNSET else params.model
        items, model = await self._prepared(params.items, asked)
        if self._full and not await self._submitted(params.key):
            raise errors.QueueFull(f"{MOST_OPEN} batch jobs have not ended yet", limit=MOST_OPEN)
        self._coming += 1
        return await self._surely(self._submit(params, items, model, asked))

    @property
    def _full(self) -> bool:
        return self._coming + sum(_open(job) for job in self._core.jobs.values()) >= MOST_OPEN

    async def _submitted(self, key: str | msgspec.UnsetType) -> bool:
        """Whether what is asked for is there already: whoever asks again under its key takes no more room."""
        return isinstance(key, str) and await self.ledger.ask(lambda store: store.knows(key))

    async def _submit(
        self, params: types.BatchSubmitParams, items: list[Item], model: str | None, asked: str | None
    ) -> types.Job:
        self._made += 1
        job = f"batch-{self._epoch}-{self._made}"
        key = None if params.key is UNSET else params.key
        name = None if params.name is UNSET else params.name
        try:
            kept, new = await self.ledger.roomy(
                lambda store: store.submit(job, items, key=key, name=name, model=model, asked=asked, opened=params.open)
            )
        finally:
            self._coming -= 1
        if new:
            self._log.info("batch job", job=job, items=len(items), open=params.open)
            self._tell(found(kept))
        return self._jobs.get(kept.job)

    async def _surely(self, work: Coroutine[Any, Any, T]) -> T:
        """What is on disk by then is told to the core, too, whether or not the caller is still there."""
        return await asyncio.shield(self.ledger.later(work))

    async def append(self, params: types.BatchAppendParams) -> types.Job:
        job = params.job
        known = await self.ledger.ask(lambda store: store.job(job))
        if known.total + len(params.items) > types.MAX_BATCH_ITEMS:
            told = f"items: a job has {types.MAX_BATCH_ITEMS} at most"
            raise errors.InvalidParams(told, field="items", limit=types.MAX_BATCH_ITEMS)
        at = None if params.at is UNSET else params.at
        items, model = await self._prepared(params.items, known.asked)
        return await self._surely(self._append(job, items, at, model))

    async def _append(self, job: str, items: list[Item], at: int | None, model: str | None) -> types.Job:
        grown = await self.ledger.roomy(lambda store: store.append(job, items, at, model))
        if grown is not None:
            self._tell(ev.BatchGrew(job, grown.total, grown.model))
        return self._jobs.get(job)

    async def start(self, job: str) -> types.Job:
        """Raises ModelBusy where the job is about to end, and that cannot be recorded."""
        if self._closing(job) and (await self._ended(job)).ended_at is None:
            raise errors.ModelBusy(f"{job} is about to end; that could not be recorded yet", job=job)
        return await self._surely(self._start(job))

    async def _start(self, job: str) -> types.Job:
        kept, changed = await self.ledger.roomy(lambda store: store.start(job))
        if changed:
            assert kept.started_at is not None
            self._tell(ev.BatchStarted(job, kept.started_at))
        return self._jobs.get(job)

    def jobs(self) -> list[types.Job]:
        return [job for job in self._jobs.list() if job.kind == "batch"]

    def get(self, job: str) -> types.Job:
        """Raises NotFound."""
        known = self._jobs.get(job)
        if known.kind != "batch":
            raise errors.NotFound(f"{job} is no batch job", job=job)
        return known

    async def cancel(self, job: str) -> types.Job:
        """The job, once it is recorded that it is cancelled; where that takes long, as it stands."""
        self.get(job)
        self._jobs.cancel(job)
        return await self._ended(job)

    def _closing(self, job: str) -> bool:
        """It is decided that the job ends, and not recorded yet."""
        known = self._core.jobs.get(job)
        return isinstance(known, BatchJob) and known.closing is not None

    async def _ended(self, job: str) -> types.Job:
        """The job, once it is recorded that it has ended; where that takes long, as it stands."""
        try:
            async with asyncio.timeout(ENDED_S):
                return await self._jobs.wait(job)
        except TimeoutError:
            return self.get(job)

    async def delete(self, params: types.BatchDeleteParams) -> None:
        job = self.get(params.job)
        if job.ended_at is None:
            if not params.cancel:
                told = f"job: {job.job} has not ended; cancel it first, or say `cancel`"
                raise errors.InvalidParams(told, field="job")
            job = await self.cancel(job.job)
            if job.ended_at is None:
                raise errors.ModelBusy(f"{job.job} could not be cancelled yet", job=job.job)
        await self._surely(self._delete(job.job))

    async def _delete(self, job: str) -> None:
        await self.ledger.delete(job)
        await self.ledger.sweep()

    async def results(self, params: types.BatchResultsParams) -> types.BatchResultsResult:
        after = -1 if params.after is UNSET else params.after
        return await self.ledger.ask(lambda store: store.results(params.job, after, params.limit))

    # --- items that are to be -------------------------------------------------------------------------------------

    async def _prepared(self, items: list[types.BatchItem], asked: str | None) -> tuple[list[Item], str | None]:
        """Items as they are kept, each with its model, and the id of the model where all have one. Raises RpcError for
        the first that cannot be."""
        from ..batch.store import Item

        default = self._settings.default_model if asked is None else asked
        models: dict[str, int] = {}
        adapters: dict[str, int] = {}
        made = []
        for index, item in enumerate(items):
            if index % CHECKED_AT_ONCE == CHECKED_AT_ONCE - 1:
                await asyncio.sleep(0)
            try:
                params = completed(item.params, self._settings.personas, self._settings.templates)
                _check(params)
            except errors.RpcError as error:
                raise _of_item(error, index) from None
            if params.model is UNSET:
                params.model = default
            models.setdefault(params.model, index)
            if params.adapter is not UNSET and params.adapter != NO_ADAPTER:
                adapters.setdefault(params.adapter, index)
            kind = "process" if isinstance(item, types.ProcessItem) else "chat"
            custom_id = None if item.custom_id is UNSET else item.custom_id
            made.append(Item(kind, msgspec.msgpack.encode(params), params.model, custom_id))
        if len(models) + len(adapters) > MOST_MODELS:
            raise errors.InvalidParams(f"items: they name more than {MOST_MODELS} models", field="items")
        found = {await self._there(self._supply.expect(ref), index, "model") for ref, index in models.items()}
        for ref, index in adapters.items():
            await self._there(self._supply.expect_adapter(ref), index, "adapter")
        return made, found.pop() if len(found) == 1 else None

    async def _there(self, looking: Coroutine[Any, Any, T], index: int, field: str) -> T:
        try:
            return await looking
        except errors.RpcError as error:
            error.details["field"] = field
            raise _of_item(error, index) from None

    # --- what the core wants --------------------------------------------------------------------------------------

    def read(self, action: do.ReadItems) -> None:
        self.ledger.later(self._read(action))

    async def _read(self, action: do.ReadItems) -> None:
        try:
            found = await self.ledger.ask(lambda store: store.waiting(action.job, action.after, action.count))
        except errors.NotFound:
            return  # deleted meanwhile
        except errors.RpcError as error:
            self.ledger.failed(error)
            return
        job = self._core.jobs.get(action.job)
        if not isinstance(job, BatchJob) or not job.live or action.run != job.run:
            return  # it was cancelled meanwhile, or began anew
        for place, _, method, params in found.items:
            self._ahead_bytes -= len(self._ahead.pop((action.job, place), ("", b""))[1])
            if self._ahead_bytes + len(params) <= AHEAD_BYTES:
                self._ahead[action.job, place] = (method, params)
                self._ahead_bytes += len(params)
        places = tuple((place, tries) for place, tries, _, _ in found.items)
        self._tell(ev.BatchItems(action.job, action.run, places, found.cursor, found.more))

    def run(self, action: do.RunItem) -> None:
        flight = self._flights[action.ticket] = Flight(self, action)
        kept = self._ahead.pop((action.job, action.place), None)
        if kept is None:
            self.ledger.later(self._fetch_and_run(flight))
        else:
            self._ahead_bytes -= len(kept[1])
            self._ask(flight, *kept)

    async def _fetch_and_run(self, flight: Flight) -> None:
        try:
            method, params = await self.ledger.ask(lambda store: store.item(flight.job, flight.place))
        except errors.RpcError as error:
            flight.fail(errors.InsufficientDisk(f"the item could not be read: {error.message}"))
        else:
            if not flight.dropped:
                self._ask(flight, method, params)

    def _ask(self, flight: Flight, method: str, kept: bytes) -> None:
        """Hand an item to its model."""
        try:
            params = msgspec.msgpack.decode(kept, type=_KINDS[method])
        except (msgspec.DecodeError, KeyError) as error:  # an option that this version has no more
            flight.fail(errors.InvalidParams(f"the item is none to this version of mlxd: {error}", field="params"))
            return
        params.priority, params.stream = "batch", False
        kind: Any = method
        try:
            flight.generation = self._generations.generate(flight.client, kind, params, flight, yields=True)
        except errors.RpcError as error:
            flight.fail(error)

    def cancel_item(self, action: do.CancelItem) -> None:
        flight = self._flights.pop(action.ticket, None)
        if flight is not None:
            flight.dropped = True
            if flight.generation is not None:
                flight.generation.cancel()

    def put_back(self) -> None:
        """Have items go back that no model has yet: those that wait for a download could do so for ever."""
        for flight in list(self._flights.values()):
            if flight.generation is not None and flight.generation.waiting is not None:
                flight.generation.cancel()

    def flight_ended(self, flight: Flight, error: errors.RpcError | None) -> None:
        generation = flight.generation
        began = generation is not None and generation.dispatched_at is not None
        self._tell(ev.BatchItemEnded(flight.ticket, error, began))
        # By then the core has said whether that is to be recorded.
        self._loop.call_soon(self._flights.pop, flight.ticket, None)

    def record(self, action: do.RecordItem) -> None:
        outcome = self._flights[action.ticket].outcome
        assert outcome is not None
        self.ledger.record(outcome, action.ticket)

    def count_try(self, action: do.CountTry) -> None:
        from ..batch.store import Try

        self.ledger.record(Try(action.job, action.place, action.tries))

    def end(self, action: do.EndBatch) -> None:
        from ..batch.store import End

        for key in [key for key in self._ahead if key[0] == action.job]:
            self._ahead_bytes -= len(self._ahead.pop(key)[1])
        self.ledger.record(End(action.job, action.state, action.error))

    def delete_ended(self, action: do.DeleteBatch) -> None:
        self.ledger.later(self._delete_ended(action.job))

    async def _delete_ended(self, job: str) -> None:
        try:
            await self._delete(job)
        except errors.RpcError as error:  # it is tried again when the next daemon starts
            self._log.warning("an old batch job could not be deleted", job=job, reason=error.message)

    def write_again(self, action: do.WriteAgain) -> None:
        self.ledger.again()


class Flight:
    """One item under way; its generation's sink.

    Attributes:
        outcome: what is to be recorded of it.
        dropped: nobody waits for it any more.
    """

    __slots__ = ("_batches", "client", "dropped", "generation", "job", "outcome", "place", "ticket")

    def __init__(self, batches: Batches, action: do.RunItem) -> None:
        self._batches = batches
        self.ticket, self.job, self.place = action.ticket, action.job, action.place
        self.client = action.client
        self.generation: Generation | None = None
        self.outcome: Outcome | None = None
        self.dropped = False

    @property
    def request_name(self) -> str:
        return f"{self.job}:{self.place}"

    def piece(self, text: str, reasoning: str = "", index: int = 0) -> None:
        """Nobody reads along."""

    def calls(self, calls: list[types.ToolCall], malformed: list[types.MalformedToolCall]) -> None:
        """Nobody reads along."""

    def phase(self, phase: str, progress: float | None = None) -> None:
        """Nobody reads along."""

    def done(self, completion: types.Completion) -> None:
        self._end(True, completion, None)

    def fail(self, error: errors.RpcError) -> None:
        told = types.ErrorObject(kind=error.kind, message=error.message, details=error.details)
        self._end(False, told, error)

    def _end(self, ok: bool, made: types.Completion | types.ErrorObject, error: errors.RpcError | None) -> None:
        from ..batch.store import Outcome

        if not self.dropped:
            self.outcome = Outcome(self.job, self.place, ok, msgspec.msgpack.encode(made))
            self._batches.flight_ended(self, error)


def _open(job: object) -> bool:
    return isinstance(job, BatchJob) and job.ended_at is None


def _check(params: types.GenerateParams) -> None:
    """Raises RpcError for what an item cannot ask."""
    if params.stream:
        raise errors.Unsupported("items of a batch are not streamed", option="stream")
    refuse_unsupported(params)


def _of_item(error: errors.RpcError, index: int) -> errors.RpcError:
    """The error of one item's params, as the caller of all has to see it."""
    field = error.details.get("field") or error.details.get("option")
    place = f"items[{index}]"
    error.details["field"] = f"{place}.params.{field}" if field else place
    return type(error)(f"{place}: {error.message}", **error.details)
