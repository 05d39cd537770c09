"""Draft models: memory for one beside the model that it guesses for, in a worker that is Ready already.

Idle models go for it as they do for a load; busy and leased ones do not, and loads that wait in line come first.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxd_client import errors
from mlxd_client.errors import RpcError

from . import actions as do
from . import events as ev
from .book import Book
from .gauge import Gauge
from .lifecycle import Lifecycle
from .line import LoadLine
from .records import Goal, ModelRecord
from .room import plan_room


@dataclass(frozen=True, slots=True)
class Wish:
    """Memory that an Attach waits for: `promised` came with the load, `lacking` is to be found."""

    record: ModelRecord
    worker: int
    promised: int
    lacking: int


class Drafts:
    """Grants memory to draft models. `line` stops the workers that have to go."""

    def __init__(self, book: Book, line: LoadLine, gauge: Gauge) -> None:
        self._book = book
        self._gauge = gauge
        self._line = line
        self._wishes: dict[int, Wish] = {}  # by rid

    def attach(self, event: ev.Attach, now: float) -> None:
        record = self._book.by_worker.get(event.worker)
        if record is None or not record.serving:
            self._book.fail(event.rid, _gone())
            return
        promised = min(record.draft_promised, event.draft_bytes)
        record.draft_promised -= promised
        record.draft_granted += promised
        self._wishes[event.rid] = Wish(record, event.worker, promised, event.draft_bytes - promised)
        record.goals[event.rid] = Goal(event.rid, event.client, "attach")
        self._book.goals[event.rid] = record.id
        self._book.used(record, now)

    def settle(self, now: float) -> None:
        """Grant what fits; see to it that the rest will, or say why not."""
        for rid, wish in list(self._wishes.items()):
            if rid not in self._book.goals:  # nobody waits for it any more
                self._forget(rid)
            elif not wish.record.serving or wish.record.worker != wish.worker:
                self._refuse(rid, _gone())
            elif not self._book.pending and self._gauge.ready(now):
                self._make_room(rid, wish, now)

    def _make_room(self, rid: int, wish: Wish, now: float) -> None:
        """Idle models go, as for a load. Where that is not enough it is refused."""
        record, budget = wish.record, self._book.limits.budget_bytes
        others = [other for other in self._book.by_worker.values() if other is not record]
        draft = ModelRecord(f"the draft model of {record.id}", "path", Lifecycle(record.id), wish.lacking)
        spare = self._gauge.spare_bytes
        room = plan_room(others, draft, budget - record.reserved_bytes, spare_bytes=spare)
        if room.fits:
            del self._wishes[rid], record.goals[rid], self._book.goals[rid]
            record.draft_granted += wish.lacking
            self._book.reshare = True
            self._book.touch(record)
            self._book.out.append(do.Answer(rid, record.view(self._book.wall)))
        elif room.refusal is not None or room.serve_out:
            told = f"{draft.id} needs {wish.lacking / 1e9:.2f} GB, and models that are in use hold the memory"
            held = errors.InsufficientMemory(told, model=record.id, needed_bytes=wish.lacking, budget_bytes=budget)
            self._refuse(rid, room.refusal or held)
        else:
            for victim in room.stop:
                self._line.stop(victim, now, why="room")

    def _refuse(self, rid: int, why: RpcError) -> None:
        record = self._wishes[rid].record
        del record.goals[rid], self._book.goals[rid]
        self._forget(rid)
        self._book.fail(rid, why)

    def _forget(self, rid: int) -> None:
        wish = self._wishes.pop(rid)
        if wish.record.worker == wish.worker:
            wish.record.draft_granted -= wish.promised
            self._book.touch(wish.record)

    def attached(self, event: ev.Attached, now: float) -> None:
        record = self._book.by_worker.get(event.worker)
        if record is None:
            return
        record.draft_granted = max(0, record.draft_granted - event.draft_bytes)
        self._book.reshare = True
        self._book.touch(record)
        if event.draft is None:
            return
        news = record.draft != event.draft
        record.draft, record.draft_takes = event.draft, event.draft_bytes
        if news and record.lifecycle.state == "Ready":
            self._book.publish("draft_attached", record)


def _gone() -> RpcError:
    return errors.WorkerDied("the model was unloaded meanwhile", cause="stopped")
