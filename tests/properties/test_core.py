"""The core against any order of events: its invariants hold, every request gets one last word, nobody is forgotten.

The machine plays the world (clients, workers, the clock) by the rules that the runtime keeps, and no others.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlxd.core import actions as do
from mlxd.core import events as ev
from mlxd.core.core import Core, Limits
from mlxd.core.invariants import check
from mlxd_client.errors import LoadFailed, WorkerDied
from mlxd_client.mirror import Mirror
from mlxd_client.types import Event, Snapshot

MODELS = {"a/small": 2, "b/medium": 4, "c/large": 7, "d/huge": 50, "e/never-found": 1}
CLIENTS = st.integers(1, 4)
KEEP_ALIVE = st.sampled_from([None, None, 0.0, 5.0, -1.0])


def as_event(said: do.Publish) -> Event:
    return Event(
        subscription=1, rev=1, name=said.name, at=0.0, model_id=said.model_id, model=said.model, job=said.job,
        progress=said.progress, error=said.error,
    )  # fmt: skip


def by_id(state: Snapshot) -> Snapshot:
    return Mirror(state).snapshot()


class World(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.core = Core(Limits(budget_bytes=10, queue=12, max_batch=3, keep_alive_s=30))
        self.now = 100.0
        self.rids = 0
        self.leases = 0
        self.open: set[int] = set()  # accepted, without a last word yet
        self.loading: dict[int, str] = {}
        self.ready: dict[int, str] = {}
        self.stopping: set[int] = set()
        self.slots: dict[int, set[int]] = {}  # worker → requests it holds
        self.cancelled_on_worker: set[int] = set()
        self.gone: set[int] = set()
        self.mirror = Mirror(self.core.snapshot())
        for name in list(MODELS)[:2]:
            self.tell(ev.Found(name, "hub", MODELS[name]))

    def tell(self, event: ev.Event) -> list[do.Action]:
        actions = self.core.handle(event, self.now)
        for action in actions:
            self.perform(action)
        return actions

    def perform(self, action: do.Action) -> None:
        match action:
            case do.Publish():
                self.mirror.apply(as_event(action))
                if action.name == "generation_finished":
                    assert action.rid in self.open, "told after the last word, when nobody knows its request any more"
            case do.StartWorker(worker, model):
                assert worker not in self.slots
                self.loading[worker] = model
                self.slots[worker] = set()
            case do.StopWorker(worker):
                assert worker in self.slots, "never started"
                assert worker not in self.stopping, "stopped twice"
                self.stopping.add(worker)
            case do.Dispatch(rid, worker):
                assert rid in self.open
                assert worker in self.ready
                assert worker not in self.stopping
                self.slots[worker].add(rid)
            case do.CancelOnWorker(rid, worker):
                assert rid in self.slots[worker]
                assert rid not in self.cancelled_on_worker, "cancelled twice"
                self.cancelled_on_worker.add(rid)
            case do.Deliver(rid) | do.Answer(rid) | do.Fail(rid):
                assert rid in self.open, "a second last word"
                self.open.remove(rid)

    def new_rid(self) -> int:
        self.rids += 1
        self.open.add(self.rids)
        return self.rids

    @rule(model=st.sampled_from(sorted(MODELS)))
    def found(self, model: str) -> None:
        if model != "e/never-found":
            self.tell(ev.Found(model, "hub", MODELS[model]))

    @rule(model=st.sampled_from(sorted(MODELS)))
    def lost(self, model: str) -> None:
        self.tell(ev.Lost(model))

    @rule(
        client=CLIENTS,
        model=st.sampled_from(sorted(MODELS)),
        priority=st.sampled_from(["interactive", "batch"]),
        timeout=st.sampled_from([None, None, 1.0, 20.0]),
        keep_alive=KEEP_ALIVE,
        times=st.integers(1, 6),
    )
    def submit(self, client, model, priority, timeout, keep_alive, times) -> None:
        for _ in range(times):
            self.tell(ev.Submit(self.new_rid(), client, model, priority, timeout, keep_alive))

    @rule(client=CLIENTS, model=st.sampled_from(sorted(MODELS)), lease=st.booleans(), keep_alive=KEEP_ALIVE)
    def ensure(self, client: int, model: str, lease: bool, keep_alive: float | None) -> None:
        self.leases += lease
        self.tell(ev.Ensure(self.new_rid(), client, model, f"lease-{self.leases}" if lease else None, keep_alive))

    @rule(data=st.data(), client=CLIENTS)
    def release(self, data: st.DataObject, client: int) -> None:
        held = sorted(k for m in self.core.models.values() for k in m.leases)
        if held:
            self.tell(ev.Release(client, data.draw(st.sampled_from(held))))

    @rule(client=CLIENTS, model=st.sampled_from(sorted(MODELS)))
    def unload(self, client: int, model: str) -> None:
        self.tell(ev.Unload(self.new_rid(), client, model))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.rids:
            self.tell(ev.Cancel(data.draw(st.integers(1, self.rids))))

    @rule(data=st.data())
    def cancel_job(self, data: st.DataObject) -> None:
        if self.core.jobs:
            self.tell(ev.CancelJob(data.draw(st.sampled_from(sorted(self.core.jobs)))))

    @rule(client=CLIENTS)
    def client_gone(self, client: int) -> None:
        self.tell(ev.ClientGone(client))
        assert all(client not in m.leases.values() for m in self.core.models.values())

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), progress=st.floats(0, 1))
    def progress(self, data: st.DataObject, progress: float) -> None:
        self.tell(ev.LoadProgress(data.draw(st.sampled_from(sorted(self.loading))), progress))

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), well=st.sampled_from([True, True, True, False]))
    def load_ends(self, data: st.DataObject, well: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.loading)))
        model = self.loading.pop(worker)
        if well:
            self.ready[worker] = model
            self.tell(ev.Loaded(worker, MODELS[model], 4096))
        else:
            self.tell(ev.LoadFailed(worker, LoadFailed("broken")))

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def dies(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.slots)))
        self.exit(worker, WorkerDied("died", cause="signal"))

    @precondition(lambda self: self.stopping)
    @rule(data=st.data())
    def stops(self, data: st.DataObject) -> None:
        self.exit(data.draw(st.sampled_from(sorted(self.stopping))), None)

    def exit(self, worker: int, error: WorkerDied | None) -> None:
        held = self.slots.pop(worker)
        self.loading.pop(worker, None)
        self.ready.pop(worker, None)
        self.stopping.discard(worker)
        self.tell(ev.WorkerExited(worker, error))
        assert not held & self.open, "a dead worker's request was forgotten"

    @precondition(lambda self: any(self.slots.values()))
    @rule(data=st.data(), times=st.integers(1, 4))
    def done(self, data: st.DataObject, times: int) -> None:
        for _ in range(times):
            held = sorted((rid, worker) for worker, rids in self.slots.items() for rid in rids)
            if held:
                rid, worker = data.draw(st.sampled_from(held))
                self.slots[worker].remove(rid)
                self.tell(ev.Done(rid))

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), size=st.integers(0, 8))
    def memory(self, data: st.DataObject, size: int) -> None:
        self.tell(ev.MemoryReport(data.draw(st.sampled_from(sorted(self.ready))), size))

    @rule(seconds=st.sampled_from([0.0, 0.5, 5.0, 31.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.tell(ev.Tick())
        due = self.core.next_deadline()
        assert due is None or due > self.now, "something was due and was not done"

    @invariant()
    def holds(self) -> None:
        check(self.core)
        assert by_id(self.mirror.snapshot()) == by_id(self.core.snapshot()), "subscribers see another state"
        assert set(self.core.requests) | set(self.core.goals) == self.open

    def teardown(self) -> None:
        """However it stands: workers that do their part bring every open request to its end."""
        self.tell(ev.Drain())
        for _ in range(10_000):
            check(self.core)
            held = [(w, rid) for w, rids in self.slots.items() for rid in rids]
            if held:
                self.slots[held[0][0]].remove(held[0][1])
                self.tell(ev.Done(held[0][1]))
            elif self.stopping:
                self.exit(min(self.stopping), None)
            elif self.loading:
                worker, model = min(self.loading.items())
                del self.loading[worker]
                self.ready[worker] = model
                self.tell(ev.Loaded(worker, MODELS[model], 4096))
            else:
                break
        assert not self.open, "requests were never answered although every worker did its part"


World.TestCase.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCore = World.TestCase


class Aborts(World):
    """The same, but each run ends by an abort: whatever is open gets its last word at once."""

    def teardown(self) -> None:
        self.tell(ev.Abort())
        check(self.core)
        assert self.open == set(self.core.goals), "only who waits for a worker's exit may still wait"
        for worker in sorted(self.slots):
            assert worker in self.stopping, "a worker was left behind"
            self.exit(worker, None)
        assert self.core.quiet
        assert not self.open


Aborts.TestCase.settings = World.TestCase.settings
TestAborts = Aborts.TestCase
