"""Requests: who may wait, who is next, and when it is too late. Which models are loaded for them is decided in line.py.

One of a batch job yields: it steps aside for whoever finds no free slot, and is asked for anew later.
"""

from __future__ import annotations

import heapq

from mlxd_client import errors
from mlxd_client.errors import RpcError

from . import actions as do
from . import events as ev
from .book import Book
from .line import LoadLine
from .memory import Memory
from .records import ModelRecord, Request

# Beside interactive requests, this part of the items that may run otherwise.
BESIDE = 4


class RequestLine:
    """The requests of the book's models. `line` says which models take any, `memory` which requests."""

    def __init__(self, book: Book, line: LoadLine, memory: Memory) -> None:
        self._book = book
        self._line = line
        self._memory = memory
        self._deadlines: list[tuple[float, int]] = []  # a heap of (when, rid), with dead entries

    # --- a place in line ------------------------------------------------------------------------------------------

    def submit(self, event: ev.Submit, now: float) -> None:
        record = self._line.admit(event.rid, event.model, now)
        if record is None:
            return
        refusal = self._memory.refusal(event.priority)
        if refusal is not None:
            self._book.fail(event.rid, refusal)
            return
        if not self._place_in_line(record, event.client):
            hint = self._retry_after(record)
            self._book.fail(event.rid, errors.QueueFull("too many requests wait already", retry_after_s=hint))
            return
        self._book.seq += 1
        deadline = None if event.timeout_s is None else now - event.waited_s + event.timeout_s
        request = Request(
            event.rid, event.client, record.id, self._book.seq, event.priority, event.timeout_s, deadline,
            yields=event.yields,
        )  # fmt: skip
        self._book.requests[event.rid] = request
        record.queue.put(request)
        if deadline is not None:
            if len(self._deadlines) > 2 * len(self._book.requests) + 64:  # most of it is requests that ended in time
                self._deadlines = [entry for entry in self._deadlines if self._deadline_live(entry)]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (deadline, event.rid))
        if event.keep_alive_s is not None:
            record.keep_alive_wish = event.keep_alive_s
        record.needed = record.needed or not event.yields
        self._book.used(record, now)

    def _place_in_line(self, record: ModelRecord, client: int) -> bool:
        """Whether one more request of this client may wait, or need not wait.

        A client may have as many waiting as there are places left: alone it may take half the line, and however many
        are greedy, the next client finds a place (dynamic thresholds, Choudhury and Hahne, 1998).
        """
        at_once = record.serving and record.last_seq is None and not record.recycling and not record.queue
        if at_once and len(record.running) < record.max_batch:
            return True
        free = self._book.limits.queue - self._book.waiting
        mine = sum(m.queue.of_client(client) for m in self._book.models.values() if m.queue)
        return mine < free

    def _retry_after(self, record: ModelRecord) -> float:
        """Seconds after which the line has probably moved by one batch; a hint for the caller."""
        batches = 1 + len(record.queue) / self._book.limits.max_batch
        return round(min(60.0, max(0.05, (record.service_s or 1.0) * batches)), 3)

    # --- a slot ---------------------------------------------------------------------------------------------------

    def dispatch(self, record: ModelRecord, now: float) -> None:
        if not record.serving or record.recycling:
            return
        assert record.worker is not None
        while len(record.running) < record.max_batch:
            yielding = not record.queue.of_priority("batch") or self._may_begin_items(record)
            request = record.queue.pop(record.running_by_client, record.last_seq, yielding=yielding)
            if request is None:
                return
            request.started_at = now
            record.running[request.rid] = request
            record.running_by_client[request.client] += 1
            record.idle_since = None
            self._book.out.append(do.Dispatch(request.rid, record.worker))
            self._book.out.append(do.Publish("generation_started", model_id=record.id, rid=request.rid))
        urgent = record.queue.of_priority("interactive") if record.queue else 0
        if urgent and record.last_seq is None:
            going = sum(request.ending is not None for request in record.running.values())
            self._book.step_aside(record, now, max(0, urgent - going))

    def _may_begin_items(self, record: ModelRecord) -> bool:
        """Beside an interactive request only few items of batch jobs begin: each row makes all others' steps longer."""
        if all(request.priority == "batch" for request in record.running.values()):
            return True
        items = sum(request.yields for request in record.running.values())
        return items < max(1, self._book.limits.batch_slots // BESIDE)

    def done(self, event: ev.Done, now: float) -> None:
        request = self._book.requests.get(event.rid)
        if request is None:
            return  # ended already: its worker was declared dead
        record = self._book.models[request.model]
        self._book.free_slot(record, request)
        if request.started_at is not None:
            took = now - request.started_at
            record.service_s = took if record.service_s is None else 0.8 * record.service_s + 0.2 * took
        self._line.breakers.succeeded(record.id, now)
        self._book.close(request, request.ending)
        self._book.used(record, now)
        self._book.rested(record, now)

    # --- time -----------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When the next request that has not ended is too late, on the clock of `now`."""
        while self._deadlines and not self._deadline_live(self._deadlines[0]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def tick(self, event: ev.Tick, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = heapq.heappop(self._deadlines)
            if self._deadline_live(entry):
                request = self._book.requests[entry[1]]
                self._book.end(request, self._too_late(request), now)

    def _deadline_live(self, entry: tuple[float, int]) -> bool:
        request = self._book.requests.get(entry[1])
        return request is not None and request.deadline == entry[0] and request.ending is None

    def _too_late(self, request: Request) -> RpcError:
        record = self._book.models[request.model]
        if request.started_at is not None:
            phase = "generating"
        else:
            phase = "queued" if record.lifecycle.state == "Ready" else "loading"
        limit = request.timeout_s or 0.0
        return errors.DeadlineExceeded(f"not done within {limit:g} s (still {phase})", phase=phase, timeout_s=limit)
