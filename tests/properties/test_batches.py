"""Batch jobs against any order of events: every item is recorded once, none is lost, whoever dies and whatever fails.

The machine plays the file, the models and the clock. When it ends, everything works again, and all jobs must come to
their end.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlxd.core import actions as do
from mlxd.core import events as ev
from mlxd.core.core import Core, Limits
from mlxd.core.invariants import check
from mlxd.core.jobs import BatchJob
from mlxd_client import errors
from mlxd_client.mirror import Mirror
from mlxd_client.types import Event

REFUSALS = {
    "its own": errors.InvalidParams("no"),
    "yields": errors.ModelBusy("later", yielded=True),
    "full": errors.QueueFull("later", retry_after_s=2.0),
    "memory": errors.InsufficientMemory("later"),
    "no model": errors.ModelNotFound("gone"),
    "died": errors.WorkerDied("died", cause="signal"),
    "loop": errors.WorkerDied("died", cause="crash_loop", retry_after_s=5.0),
    "bug": errors.InternalError("oh"),
}
SLOTS = 3
# So many events a daemon is told at least: what comes late in its life would hardly be met with otherwise.
LEAST_LIFE = 12


class World(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.jobs: dict[str, dict[str, Any]] = {}  # what the file holds
        self.made = 0
        self.begin()

    def begin(self) -> None:
        """A daemon starts: all it knows is in the file."""
        limits = Limits(budget_bytes=10, batch_slots=SLOTS, batch_retry_s=10.0, batch_keep_s=1000.0)
        self.core = Core(limits, wall=1000.0)
        self.flying: dict[int, tuple[str, int]] = {}
        self.reads: list[do.ReadItems] = []
        self.read_out: dict[str, set[int]] = {}  # what each job's items are that were read since it began
        self.outbox: list[tuple[int | None, Any]] = []
        self.broken = False
        self.told_broken = False
        self.events = 0  # that this daemon was told
        self.mirror = Mirror(self.core.snapshot())
        for name, kept in self.jobs.items():
            self.tell(
                ev.BatchFound(
                    name, kept["total"], 1000.0, open=kept["state"] == "open",
                    state="queued" if kept["state"] == "open" else kept["state"], done=len(kept["results"]),
                    failed=sum(not ok for ok in kept["results"].values()), ended_at=kept["ended_at"],
                )
            )  # fmt: skip

    def tell(self, event: ev.Event) -> None:
        self.events += 1
        for action in self.core.handle(event, self.now):
            self.perform(action)

    def perform(self, action: do.Action) -> None:
        match action:
            case do.Publish():
                self.mirror.apply(
                    Event(subscription=1, rev=1, name=action.name, at=0.0, model_id=action.model_id, job=action.job)
                )
            case do.ReadItems():
                self.reads.append(action)
            case do.RunItem(job, place, ticket):
                assert (job, place) not in self.flying.values(), "an item runs twice at a time"
                assert place not in self.jobs[job]["results"], "an item runs that is recorded"
                assert self.core._batches.fault is None, "an item runs while nothing can be recorded"
                self.flying[ticket] = (job, place)
            case do.CancelItem(ticket):
                del self.flying[ticket]
            case do.RecordItem(job, place, ticket):
                self.outbox.append((ticket, ("result", job, place)))
            case do.CountTry(job, place, tries):
                self.outbox.append((None, ("try", job, place, tries)))
            case do.EndBatch(job, state, _):
                self.outbox.append((None, ("end", job, state)))
            case do.WriteAgain():
                self.told_broken = False
            case do.DeleteBatch(job):
                del self.jobs[job]
                self.core.handle(ev.BatchGone(job), self.now)
            case _:
                raise AssertionError(f"nobody performs {action}")

    # --- callers ---

    @precondition(lambda self: len(self.jobs) < 4)
    @rule(total=st.integers(1, 8), opened=st.booleans())
    def submit(self, total: int, opened: bool) -> None:
        name = f"batch-{self.made}"
        self.made += 1
        state = "open" if opened else "running"
        self.jobs[name] = {"total": total, "results": {}, "tries": {}, "state": state, "ended_at": None}
        self.tell(ev.BatchFound(name, total, 1000.0, open=opened, state="queued" if opened else "running"))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        kept = self.jobs[name := data.draw(st.sampled_from(sorted(self.jobs)))]
        if kept["state"] in ("open", "failed", "cancelled"):
            kept["state"], kept["ended_at"] = "running", None
            self.read_out.pop(name, None)
            self.tell(ev.BatchStarted(name, 1001.0))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.tell(ev.CancelJob(data.draw(st.sampled_from(sorted(self.jobs)))))

    # --- the world ---

    @precondition(lambda self: self.reads)
    @rule()
    def read(self) -> None:
        action = self.reads.pop(0)
        if self.broken:
            self.told_broken = True
            self.tell(ev.BatchStoreFailed(errors.InternalError("a bad sector")))
            return
        kept = self.jobs[action.job]
        left = [n for n in range(kept["total"]) if n > action.after[1] and n not in kept["results"]]
        page = left[: min(action.count, 2)]
        items = tuple((n, kept["tries"].get(n, 0)) for n in page)
        cursor = (0, page[-1]) if page else action.after
        job = self.core.jobs[action.job]
        assert isinstance(job, BatchJob)
        if job.live and job.reading and action.run == job.run:
            self.read_out.setdefault(action.job, set()).update(page)
        self.tell(ev.BatchItems(action.job, action.run, items, cursor, len(left) > len(page)))

    @precondition(lambda self: self.flying or self.reads)
    @rule(data=st.data(), times=st.integers(1, 8), prompt=st.booleans())
    def ended(self, data: st.DataObject, times: int, prompt: bool) -> None:
        """Items end, one after the other; `prompt`: the file keeps up with them."""
        for _ in range(times):
            while prompt and self.reads and not self.broken:
                self.read()
            if not self.flying:
                return
            ticket = data.draw(st.sampled_from(sorted(self.flying)))
            how = data.draw(st.sampled_from(["ok", "ok", *REFUSALS]))
            began = how == "ok" or data.draw(st.booleans())
            del self.flying[ticket]
            self.tell(ev.BatchItemEnded(ticket, REFUSALS.get(how), began))
            if prompt and self.outbox and not self.told_broken:
                self.write()

    @precondition(lambda self: self.outbox and not self.told_broken)
    @rule()
    def write(self) -> None:
        if self.broken:
            self.told_broken = True
            self.tell(ev.BatchStoreFailed(errors.InsufficientDisk("full")))
            return
        if self.core._batches.fault is not None:
            self.tell(ev.BatchStoreWorks())
        done, self.outbox = self.outbox, []
        tickets: dict[str, list[int]] = {}
        for ticket, (what, job, *rest) in done:
            kept = self.jobs[job]
            tickets.setdefault(job, []).extend([] if ticket is None else [ticket])
            if what == "result" and kept["state"] == "running":
                assert rest[0] not in kept["results"], "recorded twice"
                kept["results"][rest[0]] = True
            elif what == "try":
                kept["tries"][rest[0]] = rest[1]
            elif what == "end" and kept["state"] in ("open", "running"):
                kept["state"], kept["ended_at"] = rest[0], self.now + 1000.0
            if kept["state"] == "running" and len(kept["results"]) == kept["total"]:
                kept["state"], kept["ended_at"] = "done", self.now + 1000.0
        for job, of in tickets.items():
            kept = self.jobs[job]
            ended = None if kept["ended_at"] is None else kept["state"]
            self.tell(ev.BatchRecorded(job, tuple(of), len(kept["results"]), 0, ended, kept["ended_at"]))

    @rule(broken=st.booleans())
    def disk(self, broken: bool) -> None:
        self.broken = broken

    @precondition(lambda self: self.told_broken is False and not self.outbox and self.core._batches.fault is not None)
    @rule()
    def nothing_to_write(self) -> None:
        self.tell(ev.BatchStoreWorks())

    @rule(step=st.sampled_from([0.1, 0.5, 3.0, 20.0]))
    def wait(self, step: float) -> None:
        self.now += step
        self.tell(ev.Tick())

    @precondition(lambda self: self.events >= LEAST_LIFE)
    @rule(how=st.sampled_from(["crash", "ok", "yields", "lost"]), written=st.booleans())
    def ends(self, how: str, written: bool) -> None:
        """The daemon crashes, or it stops: what runs steps aside or is answered just in time. Then the next begins. Or
        the file is found to be damaged."""
        if how == "lost":
            self.jobs.clear()
            self.read_out.clear()
            self.reads.clear()
            self.outbox.clear()
            self.told_broken, self.events = False, 0
            self.tell(ev.BatchLost(errors.InternalError("damaged")))
            assert not self.flying, "an item runs on for nobody"
            assert self.core._batches.let_go, "it waits for what will never be recorded"
            return
        if how != "crash":
            self.tell(ev.Drain())
            for ticket in sorted(self.flying):
                del self.flying[ticket]
                self.tell(ev.BatchItemEnded(ticket, REFUSALS.get(how)))
            assert not self.flying, "an item begins while the daemon stops"
            if written and self.outbox and not self.told_broken:
                self.write()
        self.begin()

    # --- what always holds ---

    @invariant()
    def sound(self) -> None:
        check(self.core)
        for name, read in self.read_out.items():
            job = self.core.jobs.get(name)
            if isinstance(job, BatchJob) and job.live:
                lost = read - self.jobs[name]["results"].keys() - set(self.core._batches.places(job))
                assert not lost, f"items {lost} of {name} are lost"
        assert self.mirror.snapshot() == Mirror(self.core.snapshot()).snapshot()
        due = self.core.next_deadline()
        assert due is None or due > self.now, "it would tick for ever"

    def teardown(self) -> None:
        self.broken = False
        for _ in range(400):
            open_jobs = [kept for kept in self.jobs.values() if kept["state"] == "running"]
            if not open_jobs and not self.outbox:
                break
            while self.reads:
                self.read()
            for ticket in sorted(self.flying):
                if ticket in self.flying:
                    del self.flying[ticket]
                    self.tell(ev.BatchItemEnded(ticket))
            if self.outbox:
                self.told_broken = False
                self.write()
            elif self.core._batches.fault is not None:
                self.nothing_to_write()
            self.now += 1.0
            self.tell(ev.Tick())
        for name, kept in self.jobs.items():
            assert kept["state"] != "running", f"{name} never ended"
            if kept["state"] == "done":
                assert sorted(kept["results"]) == list(range(kept["total"]))


World.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestBatches = World.TestCase
