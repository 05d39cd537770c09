"""The core against any order of events: its invariants hold, every request gets one last word, nobody is forgotten.

The machine plays the world (clients, workers, fetchers, the disk, the clock) by the rules that the runtime keeps, and
no others.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlxd.core import actions as do
from mlxd.core import events as ev
from mlxd.core.book import ELSEWHERE
from mlxd.core.core import Core, Limits
from mlxd.core.invariants import check
from mlxd.core.limits import Rules
from mlxd.core.pressure import Reading, Stall
from mlxd_client.errors import DownloadFailed, LoadFailed, PermissionDenied, WorkerDied
from mlxd_client.mirror import Mirror
from mlxd_client.types import EVENT_TOPICS, Event, Snapshot

MODELS = {"a/small": 2, "b/medium": 4, "c/large": 7, "d/huge": 50, "e/never-found": 1, "a/small@v1": 2}
NAMES = st.sampled_from(sorted(MODELS))
REVISIONS = st.sampled_from(["r0", "r1", "r2"])
MIB = 1024 * 1024
CAPACITY = 14
CLIENTS = st.integers(1, 4)
KEEP_ALIVE = st.sampled_from([None, None, 0.0, 5.0, -1.0])


def as_event(said: do.Publish) -> Event:
    return Event(
        subscription=1, rev=1, name=said.name, at=0.0, model_id=said.model_id, model=said.model, job=said.job,
        progress=said.progress, error=said.error, details=said.details,
    )  # fmt: skip


def repo(model: str) -> str:
    return model.split("@")[0]


def by_id(state: Snapshot) -> Snapshot:
    return Mirror(state).snapshot()


class World(RuleBasedStateMachine):
    elsewhere = 0  # what a daemon that this one took over from still holds

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(
            Limits(budget_bytes=10, queue=12, max_batch=3, keep_alive_s=30, downloads=2, reserve_bytes=1, slack_bytes=0)
        )
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
        self.fetchers: dict[int, str] = {}
        self.speechless: set[int] = set()  # fetchers that have said how it went
        self.stopped: set[int] = set()  # fetchers that were told to go
        self.deletes: set[str] = set()
        self.attaches: list[tuple[int, int, int]] = []  # rid, worker, bytes, as far as nothing came of them
        self.granted: set[int] = set()
        self.revisions: dict[str, str] = {}  # what the disk holds of each model, and what old ones lie beside
        self.old: dict[str, set[str]] = {}
        self.used: dict[int, str | None] = {}  # worker → the revision that it runs on
        self.held = False
        self.others = 0  # memory that is none of ours, of CAPACITY
        self.taken: dict[int, int] = {}  # what each worker really holds
        self.last_exit = 0.0
        self.told_at = 0.0
        self.asked: set[float] = set()  # when the core has asked for one
        self.readings: list[ev.Measured] = []  # begun, and not told yet
        self.last: ev.Measured | None = None
        self.mirror = Mirror(self.core.snapshot())
        for name in list(MODELS)[:2]:
            self.tell(self.seen(name))
            self.revisions[name] = "r0"

    def tell(self, event: ev.Event) -> list[do.Action]:
        actions = self.core.handle(event, self.now)
        for action in actions:
            self.perform(action)
        for model in list(self.revisions):
            known = self.core.models.get(model)
            if known is None or known.lifecycle.state == "NotDownloaded":  # nobody here answers for its files
                del self.revisions[model]
                self.old.pop(model, None)
        return actions

    def perform(self, action: do.Action) -> None:
        match action:
            case do.Publish():
                assert action.name in EVENT_TOPICS
                self.mirror.apply(as_event(action))
                if action.name == "generation_finished":
                    assert action.rid in self.open, "told after the last word, when nobody knows its request any more"
            case do.StartWorker(worker, model):
                assert worker not in self.slots
                self.check_overshoot()
                self.loading[worker] = model
                self.slots[worker] = set()
                assert model not in self.deletes
                self.used[worker] = self.revisions.get(model)
            case do.StopWorker(worker):
                assert worker in self.slots, "never started"
                assert worker not in self.stopping, "stopped twice"
                self.stopping.add(worker)
                self.check_pin(worker)
            case do.Dispatch(rid, worker):
                assert rid in self.open
                assert worker in self.ready
                assert worker not in self.stopping
                self.slots[worker].add(rid)
            case do.Trim(worker, keep):
                assert worker in self.ready
                assert worker not in self.stopping
                if keep < 1:
                    self.taken[worker] = min(self.taken.get(worker, 0), self.needs(worker))
            case do.Measure():
                self.asked.add(self.now)
                self.begin_reading()
            case do.CancelOnWorker(rid, worker):
                assert rid in self.slots[worker]
                assert rid not in self.cancelled_on_worker, "cancelled twice"
                self.cancelled_on_worker.add(rid)
            case do.Deliver(rid) | do.Answer(rid) | do.Fail(rid) | do.Deleted(rid) | do.Started(rid):
                assert rid in self.open, "a second last word"
                if isinstance(action, do.Answer):
                    self.granted.add(rid)
                self.open.remove(rid)
                if isinstance(action, do.Started):
                    assert self.core.jobs[action.job].ended_at is None
            case _:
                self.perform_on_disk(action)

    def needs(self, worker: int) -> int:
        return self.core._book.by_worker[worker].wanted_bytes

    def check_overshoot(self) -> None:
        """All that is promised to workers is there, as far as anybody could know: by a reading that is fresh and counts
        nobody who has gone."""
        if self.last is None or self.last.reading is None or self.last.reading.available_bytes is None:
            return
        began_at = self.last.began_at
        assert self.now - began_at <= 1.0 or (began_at in self.asked and self.now - self.told_at <= 1.0)
        assert self.last.began_at >= self.last_exit
        others = CAPACITY - self.last.reading.available_bytes - sum(self.last.footprints.values())
        # What another daemon holds is taken already, and among the others here.
        promised = sum(m.reserved_bytes for worker, m in self.core._book.by_worker.items() if worker != ELSEWHERE)
        assert promised + others + 1 <= CAPACITY, "two loads overshoot together"
        needs = sum(m.wanted_bytes for m in self.core._book.by_worker.values())
        assert needs <= self.core.limits.budget_bytes

    def begin_reading(self, stall: float = 0.0, known: bool = True) -> None:
        left = max(0, CAPACITY - self.others - self.elsewhere - sum(self.taken.values())) if known else None
        reading = Reading(CAPACITY, left, stalls=(Stall("psi", 2 * stall, stall),))
        self.readings.append(ev.Measured(self.now, reading, dict(self.taken)))

    def check_pin(self, worker: int) -> None:
        """A pinned model goes where somebody says so, for another pinned one, and where the budget was lowered."""
        book = self.core._book
        record = book.by_worker[worker]
        if not record.pinned or record.stopping != "unloaded" or book.draining:
            return
        said = record.deleting or any(goal.kind == "unload" for goal in record.goals.values())
        for_another = any(self.core.models[name].pinned for name in book.pending)
        lowered = sum(m.wanted_bytes for m in book.by_worker.values()) > self.core.limits.budget_bytes
        assert said or for_another or lowered, "a pin did not hold"

    def perform_on_disk(self, action: do.Action) -> None:
        match action:
            case do.StartFetcher(fetcher, job, model):
                assert fetcher not in self.fetchers
                assert not self.core.draining
                assert not self.held, "another daemon may be at the files"
                assert not self.works_on(model), "two work on the same files"
                assert repo(model) not in {repo(name) for name in self.deletes}
                assert self.core.jobs[job].model == model
                self.fetchers[fetcher] = model
                assert len(self.fetchers) <= 2
            case do.StopFetcher(fetcher):
                assert fetcher in self.fetchers, "never started"
                assert fetcher not in self.stopped, "stopped twice"
                self.stopped.add(fetcher)
            case do.DeleteFiles(model):
                assert not self.works_on(model)
                assert model not in self.loading.values()
                assert model not in self.ready.values()
                assert model not in self.deletes
                self.deletes.add(model)
            case do.DiscardPartial(model):
                assert not self.works_on(model)
            case do.Prune(model, revisions):
                assert "@" not in model
                assert not self.held
                assert revisions
                assert self.revisions.get(model) not in revisions, "the newest is removed"
                assert model not in self.loading.values(), "what is loaded is removed"
                assert model not in self.ready.values(), "what runs is removed"
                if model in self.old:
                    self.old[model] -= set(revisions)
            case _:
                raise AssertionError(f"nobody performs {action}")

    def works_on(self, model: str) -> list[int]:
        return [fetcher for fetcher, name in self.fetchers.items() if repo(name) == repo(model)]

    def new_rid(self) -> int:
        self.rids += 1
        self.open.add(self.rids)
        return self.rids

    @rule(model=NAMES)
    def found(self, model: str) -> None:
        if model != "e/never-found":
            self.tell(self.seen(model))
            if self.core.models[model].lifecycle.state == "Downloaded":
                self.revisions.setdefault(model, "r0")

    def seen(self, model: str) -> ev.Found:
        revision = self.revisions.get(model, "r0")
        return ev.Found(model, "hub", MODELS[model] + int(revision[1]), revision)

    @rule(model=NAMES)
    def lost(self, model: str) -> None:
        self.tell(ev.Lost(model))

    @rule(
        client=CLIENTS,
        model=NAMES,
        priority=st.sampled_from(["interactive", "batch"]),
        timeout=st.sampled_from([None, None, 1.0, 20.0]),
        waited=st.sampled_from([0.0, 0.0, 0.5, 30.0]),
        keep_alive=KEEP_ALIVE,
        yields=st.booleans(),
        times=st.integers(1, 6),
    )
    def submit(self, client, model, priority, timeout, waited, keep_alive, yields, times) -> None:
        yields = yields and priority == "batch"
        for _ in range(times):
            self.tell(ev.Submit(self.new_rid(), client, model, priority, timeout, keep_alive, waited, yields))

    @rule(
        client=CLIENTS, model=NAMES, lease=st.booleans(), keep_alive=KEEP_ALIVE, draft=st.sampled_from([0, 0, 5, 40]),
        asking=st.booleans(),
    )  # fmt: skip
    def ensure(self, client: int, model: str, lease: bool, keep_alive: float | None, draft: int, asking: bool) -> None:
        self.leases += lease
        held = f"lease-{self.leases}" if lease else None
        self.tell(ev.Ensure(self.new_rid(), client, model, held, keep_alive, draft, asking and lease))

    @rule(data=st.data(), client=CLIENTS, size=st.sampled_from([1, 5, 40, 200]))
    def attach(self, data: st.DataObject, client: int, size: int) -> None:
        if self.slots:
            worker = data.draw(st.sampled_from(sorted(self.slots)))
            self.attaches.append((self.rids + 1, worker, size))
            self.tell(ev.Attach(self.new_rid(), client, worker, size))

    @rule(draft=st.sampled_from([None, "org/draft", "org/other"]))
    def attached(self, draft: str | None) -> None:
        """A worker says what became of a draft model that it was told to load: one that was granted."""
        for rid, worker, size in self.attaches:
            if rid not in self.open:
                self.attaches.remove((rid, worker, size))
                if rid in self.granted and worker in self.slots:
                    self.tell(ev.Attached(worker, draft, size))
                return

    @rule(data=st.data(), client=CLIENTS)
    def release(self, data: st.DataObject, client: int) -> None:
        held = sorted(k for m in self.core.models.values() for k in m.leases)
        if held:
            self.tell(ev.Release(client, data.draw(st.sampled_from(held))))

    @rule(client=CLIENTS, model=NAMES)
    def unload(self, client: int, model: str) -> None:
        self.tell(ev.Unload(self.new_rid(), client, model))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.rids:
            self.tell(ev.Cancel(data.draw(st.integers(1, self.rids))))

    @rule(data=st.data())
    def cancel_job(self, data: st.DataObject) -> None:
        if self.core.jobs:
            job = data.draw(st.sampled_from(sorted(self.core.jobs)))
            self.tell(ev.CancelJob(job, data.draw(st.booleans())))
            if not self.core.draining:
                assert self.core.jobs[job].ended_at is not None or not job.startswith("download"), "still open"

    @rule(client=CLIENTS)
    def client_gone(self, client: int) -> None:
        self.tell(ev.ClientGone(client))
        assert all(client not in m.leases.values() for m in self.core.models.values())
        assert all(goal.client != client for m in self.core.models.values() for goal in m.goals.values())
        assert all(r.client != client or r.ending is not None for r in self.core.requests.values())

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
            more = data.draw(st.sampled_from([None, None, 0, 3]))
            self.tell(
                ev.Loaded(worker, MODELS[model], 4096, needs_bytes=None if more is None else MODELS[model] + more)
            )
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
        self.taken.pop(worker, None)
        self.last_exit = self.now
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

    @rule(stall=st.sampled_from([0.0, 0.0, 6.0, 50.0]), known=st.sampled_from([True, True, True, False]))
    def measures(self, stall: float, known: bool) -> None:
        self.begin_reading(stall, known)

    @precondition(lambda self: self.readings)
    @rule(lost=st.sampled_from([False, False, False, True]))
    def a_reading_comes(self, lost: bool) -> None:
        """Readings come in the order they were begun, or not at all."""
        self.measured(lost)

    def measured(self, lost: bool) -> None:
        event = self.readings.pop(0)
        self.last = ev.Measured(event.began_at, None) if lost else event
        self.told_at = self.now
        self.tell(self.last)

    @rule(others=st.integers(0, 14))
    def others_take(self, others: int) -> None:
        self.others = others

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), size=st.integers(0, 12))
    def worker_takes(self, data: st.DataObject, size: int) -> None:
        """Whatever it was allowed, or more."""
        self.taken[data.draw(st.sampled_from(sorted(self.slots)))] = size

    @rule(client=CLIENTS, model=NAMES, repair=st.booleans())
    def download(self, client: int, model: str, repair: bool) -> None:
        self.tell(ev.Download(self.new_rid(), client, model, repair))

    @rule(model=NAMES, job=st.sampled_from(["download-old-1", "download-old-2"]))
    def download_again(self, model: str, job: str) -> None:
        self.tell(ev.Download(self.new_rid(), 0, model, job=job, started_at=50.0))

    @precondition(lambda self: self.fetchers)
    @rule(data=st.data(), done=st.sampled_from([0, 1, 9, 20, 64]), phase=st.sampled_from(["planning", "verifying"]))
    def fetch_progress(self, data: st.DataObject, done: int, phase) -> None:
        fetcher = data.draw(st.sampled_from(sorted(self.fetchers)))
        self.tell(ev.FetchProgress(fetcher, phase, done * MIB, 64 * MIB, 1e6, 1))

    @precondition(lambda self: self.fetchers.keys() - self.speechless)
    @rule(data=st.data(), well=st.sampled_from([True, True, False]), revision=REVISIONS)
    def fetch_ends(self, data: st.DataObject, well: bool, revision: str) -> None:
        fetcher = data.draw(st.sampled_from(sorted(self.fetchers.keys() - self.speechless)))
        if well:
            self.fetched(fetcher, revision)
        else:
            self.speechless.add(fetcher)
            self.tell(ev.FetchFailed(fetcher, DownloadFailed("gone")))

    def fetched(self, fetcher: int, revision: str) -> None:
        self.speechless.add(fetcher)
        model = self.fetchers[fetcher]
        if fetcher not in self.stopped:  # else nobody cares any more
            before = self.revisions.get(model, revision)
            if before != revision and "@" not in model:
                self.old.setdefault(model, set()).add(before)
            self.old.get(model, set()).discard(revision)
            self.revisions[model] = revision
        found = ev.Found(model, "hub", MODELS[model] + int(revision[1]), revision)
        self.tell(ev.Fetched(fetcher, found))

    @precondition(lambda self: self.fetchers)
    @rule(data=st.data())
    def fetcher_dies(self, data: st.DataObject) -> None:
        self.fetcher_exits(data.draw(st.sampled_from(sorted(self.fetchers))), WorkerDied("died", cause="signal"))

    @precondition(lambda self: self.stopped)
    @rule(data=st.data())
    def fetcher_stops(self, data: st.DataObject) -> None:
        self.fetcher_exits(data.draw(st.sampled_from(sorted(self.stopped))), None)

    def fetcher_exits(self, fetcher: int, error: WorkerDied | None) -> None:
        del self.fetchers[fetcher]
        self.stopped.discard(fetcher)
        self.speechless.discard(fetcher)
        self.tell(ev.FetcherExited(fetcher, error))

    @rule(client=CLIENTS, model=NAMES)
    def delete(self, client: int, model: str) -> None:
        self.tell(ev.Delete(self.new_rid(), client, model))

    @precondition(lambda self: self.deletes)
    @rule(data=st.data(), well=st.sampled_from([True, True, False]))
    def files_deleted(self, data: st.DataObject, well: bool) -> None:
        self.end_delete(data.draw(st.sampled_from(sorted(self.deletes))), well)

    def end_delete(self, model: str, well: bool) -> None:
        self.deletes.remove(model)
        if well:
            self.revisions.pop(model, None)
            self.old.pop(model, None)
        self.tell(ev.FilesDeleted(model, 7, None if well else PermissionDenied("no")))
        assert not well or model not in self.core.models

    @rule(model=NAMES, revision=REVISIONS)
    def newest(self, model: str, revision: str) -> None:
        self.tell(ev.Newest(model, revision))
        known = self.core.models.get(model)
        assert known is None or known.latest_revision is None or known.latest_revision != known.revision

    @rule(
        bounds=st.builds(
            Limits, budget_bytes=st.sampled_from([10, 10, 12, 7, 3]), queue=st.sampled_from([12, 2]),
            max_batch=st.sampled_from([3, 1]), keep_alive_s=st.sampled_from([30.0, 0.0, -1.0]),
            downloads=st.sampled_from([2, 1]), reserve_bytes=st.just(1), slack_bytes=st.just(0),
        ),
        keep_alive=st.dictionaries(NAMES, st.sampled_from([0.0, 5.0, -1.0]), max_size=2),
        pinned=st.frozensets(NAMES, max_size=2),
        preload=st.lists(NAMES, max_size=3, unique=True),
    )  # fmt: skip
    def configure(
        self, bounds: Limits, keep_alive: dict[str, float], pinned: frozenset[str], preload: list[str]
    ) -> None:
        self.tell(ev.Configure(bounds, Rules(keep_alive, pinned, tuple(preload))))

    @rule(model=NAMES)
    def preload(self, model: str) -> None:
        """Nobody goes for it, unless it is pinned."""
        idle = self.core._book.pending == {}
        actions = self.tell(ev.Preload(model))
        known = self.core.models.get(model)
        if idle and known is not None and known.preload and not known.pinned:
            assert not [action for action in actions if isinstance(action, do.StopWorker)]

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), adapter=st.sampled_from([None, "org/adapter"]))
    def adapted(self, data: st.DataObject, adapter: str | None) -> None:
        self.tell(ev.Adapted(data.draw(st.sampled_from(sorted(self.ready))), adapter))
        self.tell(ev.Prewarmed(data.draw(st.sampled_from(sorted(self.ready))), data.draw(st.integers(0, 2))))

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
        """However it stands: workers that do their part bring every open request to its end, and downloads go on."""
        self.tell(ev.Drain())
        self.serve_out()

    def serve_out(self) -> None:
        for _ in range(10_000):
            check(self.core)
            held = [(w, rid) for w, rids in self.slots.items() for rid in rids]
            due = self.core.next_deadline()
            if held:
                self.slots[held[0][0]].remove(held[0][1])
                self.tell(ev.Done(held[0][1]))
            elif self.stopping:
                self.exit(min(self.stopping), None)
            elif self.stopped:
                self.fetcher_exits(min(self.stopped), None)
            elif self.deletes:
                self.end_delete(min(self.deletes), True)
            elif self.loading:
                worker, model = min(self.loading.items())
                del self.loading[worker]
                self.ready[worker] = model
                self.tell(ev.Loaded(worker, MODELS[model], 4096))
            elif self.open and (questions := [(m.leases[k], k) for m in self.core.models.values() for k in m.asking]):
                self.tell(ev.Release(*questions[0]))  # the worker has answered it
            elif self.readings:
                self.measured(lost=False)
            elif self.open and due is not None:
                self.now = max(self.now, due)
                self.tell(ev.Tick())
            else:
                break
        assert not self.open, "requests were never answered although every worker did its part"


World.TestCase.settings = settings(
    max_examples=120, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
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
        left = {job.job for job in self.core.jobs.values() if job.ended_at is None}
        for fetcher in sorted(self.fetchers):
            assert fetcher in self.stopped, "a fetcher was left behind"
            self.fetcher_exits(fetcher, None)
        for model in sorted(self.deletes):
            self.end_delete(model, True)
        check(self.core)
        assert left == {job.job for job in self.core.jobs.values() if job.ended_at is None}, "the next daemon's jobs"
        assert self.core.quiet
        assert not self.open


Aborts.TestCase.settings = World.TestCase.settings
TestAborts = Aborts.TestCase


class Finishes(World):
    """The same, but each run ends with fetchers that do their part: every download ends, and no old files are left."""

    def teardown(self) -> None:
        for _ in range(1_000):
            check(self.core)
            due = self.core.next_deadline()
            if self.stopped:
                self.fetcher_exits(min(self.stopped), None)
            elif self.fetchers:
                self.fetched(min(self.fetchers), "r2")
            elif self.deletes:
                self.end_delete(min(self.deletes), True)
            elif self.stopping:
                self.exit(min(self.stopping), None)
            elif self.core._book.downloads and due is not None:
                self.now = max(self.now, due)
                self.tell(ev.Tick())
            else:
                break
        assert not self.core._book.downloads, "downloads never ended although every fetcher did its part"
        self.tell(ev.Drain())
        self.serve_out()
        for worker in sorted(self.slots):
            self.exit(worker, None)
        assert not any(self.old.values()), "files that nobody uses are left"


Finishes.TestCase.settings = World.TestCase.settings
TestFinishes = Finishes.TestCase


class Moves(World):
    """The same, beside a daemon that it took over from and that lets go of memory bit by bit; another may take over
    from this one, or not after all. Each run ends with that: what was accepted is served, then no process is left."""

    elsewhere = 9

    def __init__(self) -> None:
        super().__init__()
        self.tell(ev.Elsewhere(9))

    def perform(self, action: do.Action) -> None:
        super().perform(action)
        if isinstance(action, do.StartWorker):
            mine = sum(m.wanted_bytes for worker, m in self.core._book.by_worker.items() if worker != ELSEWHERE)
            assert mine + self.elsewhere <= self.core.limits.budget_bytes, "two daemons take more than there is"

    @rule(size=st.sampled_from([0, 2, 5, 9]))
    def other_lets_go(self, size: int) -> None:
        self.elsewhere = min(self.elsewhere, size)
        self.tell(ev.Elsewhere(self.elsewhere))

    @rule(held=st.booleans())
    def hold(self, held: bool) -> None:
        if not self.core.draining:
            self.held = held
            self.tell(ev.Hold() if held else ev.GoOn())

    def teardown(self) -> None:
        self.other_lets_go(0)
        self.held = True
        self.tell(ev.Hold())
        while not self.core.let_go:
            if self.stopped:
                self.fetcher_exits(min(self.stopped), None)
            elif self.deletes:
                self.end_delete(min(self.deletes), True)
            else:
                assert self.stopping, "it never lets go"
                self.exit(min(self.stopping), None)
        self.tell(ev.Leave())
        for client in range(1, 5):
            for lease in [k for m in self.core.models.values() for k, held in m.leases.items() if held == client]:
                self.tell(ev.Release(client, lease))
        self.serve_out()
        assert not self.slots, "a worker stays with nothing to do"
        assert self.core.held_bytes == 0


Moves.TestCase.settings = World.TestCase.settings
TestMoves = Moves.TestCase


class Short(World):
    """The same, with all models here and memory short: readings, workers that take what they like, little else."""

    found = lost = delete = files_deleted = download = download_again = fetch_progress = fetch_ends = None
    fetcher_dies = fetcher_stops = newest = attach = attached = cancel_job = memory = progress = unload = None

    def __init__(self) -> None:
        super().__init__()
        self.tell(self.seen("a/small@v1"))
        self.tell(self.seen("c/large"))
        self.begin_reading()
        self.measured(lost=False)

    @rule(data=st.data(), times=st.integers(2, 4), rogue=st.booleans())
    def goes_on(self, data: st.DataObject, times: int, rogue: bool) -> None:
        """Seconds in which everybody does their part, but for a worker that grows and grows."""
        for _ in range(times):
            for worker in sorted(self.stopping):
                self.exit(worker, None)
            for worker, model in sorted(self.loading.items()):
                del self.loading[worker]
                self.ready[worker] = model
                self.tell(ev.Loaded(worker, MODELS[model], 4096))
            if rogue and self.ready:
                grown = data.draw(st.sampled_from(sorted(self.ready)))
                self.taken[grown] = self.taken.get(grown, 0) + 6
            self.now += 3.0
            self.tell(ev.Tick())
            self.begin_reading()
            while self.readings:
                self.measured(lost=False)


Short.TestCase.settings = settings(World.TestCase.settings, max_examples=80, stateful_step_count=40)
TestShort = Short.TestCase
