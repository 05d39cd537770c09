"""Memory as it is measured: who may load by it, what becomes of workers that take too much, and of pressure."""

from __future__ import annotations

from mlxd.core import actions as do
from mlxd.core import events as ev
from mlxd.core.limits import Rules
from mlxd.core.memory import GRACE_S, RECYCLE_S, RELIEF_S
from mlxd.core.pressure import Reading, Stall
from mlxd_client import errors
from support.core_bench import MODEL, Bench

OTHER, THIRD = "org/other", "org/third"


class Machine(Bench):
    """A core with a budget of 100 on a machine with 200, of which others take what a test says; 10 stay for them."""

    def __init__(self) -> None:
        super().__init__(slack_bytes=0, reserve_bytes=10, calm_s=10.0)
        self.others = 0
        self.footprints: dict[int, int] = {}
        self.measure()

    def measure(self, some: float = 0.0, full: float = 0.0) -> list[do.Action]:
        left = 200 - self.others - sum(self.footprints.values())
        reading = Reading(200, left, stalls=(Stall("psi", some, full),))
        return self.tell(ev.Measured(self.now, reading, dict(self.footprints)))

    def ensure(self, model: str = MODEL, lease: str | None = None) -> int:
        return self.ask(lambda rid: ev.Ensure(rid, 1, model, lease))

    def submit(self, model: str = MODEL, priority: ev.Priority = "interactive", *, yields: bool = False) -> int:
        return self.ask(lambda rid: ev.Submit(rid, 1, model, priority, yields=yields))

    def gone(self, worker: int) -> list[do.Action]:  # type: ignore[override]
        self.footprints.pop(worker, None)
        self.now += 0.01
        return self.tell(ev.WorkerExited(worker))

    def steps(self) -> list[str]:
        return [said.details["step"] for said in self.all(do.Publish) if said.name == "memory_exceeded"]  # type: ignore[index]

    def levels(self) -> list[str]:
        return [said.details["level"] for said in self.all(do.Publish) if said.name == "memory_pressure"]  # type: ignore[index]

    def after(self, seconds: float, some: float = 0.0, full: float = 0.0) -> list[do.Action]:
        self.now += seconds
        return self.measure(some, full)


def machine(*models: tuple[str, int]) -> Machine:
    made = Machine()
    for model, need in models:
        made.have(model, need=need)
    return made


# --- who may load -----------------------------------------------------------------------------------------------------


def test_a_load_wants_what_the_system_has() -> None:
    bench = machine((MODEL, 60))
    bench.others = 131
    bench.measure()
    rid = bench.ensure()
    error = bench.refused(rid)
    assert isinstance(error, errors.InsufficientMemory)
    told = {"needed_bytes": 60, "available_bytes": 59, "budget_bytes": 100, "system_bytes": 59}
    assert error.details.items() >= told.items()
    assert "others on this machine" in error.message
    bench.others = 130
    bench.measure()
    bench.ensure()
    assert bench.one(do.StartWorker)


def test_what_a_load_has_not_taken_yet_is_promised_all_the_same() -> None:
    bench = machine((MODEL, 40), (OTHER, 40))
    bench.others = 120
    bench.measure()
    worker = bench.load(MODEL, "held")
    rid = bench.ensure(OTHER)
    assert bench.refused(rid).details["system_bytes"] == 30
    bench.footprints[worker] = 15  # it has taken a part of it
    bench.measure()
    rid = bench.ensure(OTHER)
    assert bench.refused(rid).details["system_bytes"] == 30


def test_idle_models_go_for_what_the_system_lacks() -> None:
    bench = machine((MODEL, 40), (OTHER, 40))
    bench.others = 120
    bench.measure()
    worker = bench.load()
    bench.footprints[worker] = 40
    bench.now += 0.5
    bench.measure()
    bench.ensure(OTHER)
    assert bench.one(do.StopWorker).worker == worker
    bench.gone(worker)
    assert bench.one(do.Measure), "what was read before still counts the worker that has gone"
    bench.measure()
    assert bench.one(do.StartWorker).model == OTHER


def test_an_old_reading_is_taken_anew() -> None:
    bench = machine((MODEL, 40))
    bench.now += 60
    bench.ensure()
    assert bench.one(do.Measure)
    assert not bench.all(do.StartWorker)
    bench.tell(ev.Tick())
    assert not bench.all(do.Measure), "it is asked for once"
    bench.measure()
    assert bench.one(do.StartWorker)


def test_a_reading_that_took_long_is_good_all_the_same() -> None:
    bench = machine((MODEL, 40))
    bench.now += 60
    bench.ensure()
    reading = ev.Measured(bench.now, Reading(200, 150))
    bench.now += 4
    bench.tell(reading)
    assert bench.one(do.StartWorker)


def test_where_nothing_can_be_read_the_budget_decides() -> None:
    bench = machine((MODEL, 60), (OTHER, 60))
    bench.now += 60
    bench.ensure(MODEL, "held")
    bench.tell(ev.Measured(bench.now, None))
    bench.tell(ev.Loaded(bench.one(do.StartWorker).worker, 12, 2048))
    rid = bench.ensure(OTHER)
    assert "system_bytes" not in bench.refused(rid).details


def test_memory_may_take_a_while_to_come_back() -> None:
    """No load is refused for what the system lacks right after a worker went: it is measured again first."""
    bench = machine((MODEL, 40), (OTHER, 40))
    bench.others = 130
    bench.measure()
    worker = bench.load()
    bench.footprints[worker] = 40
    bench.measure()
    rid = bench.ensure(OTHER)
    bench.now += 0.01
    bench.tell(ev.WorkerExited(worker))
    bench.measure()  # the GPU still holds its buffers
    assert not bench.all(do.Fail)
    due = bench.core.next_deadline()
    assert due is not None
    bench.now = due
    bench.tell(ev.Tick())
    assert bench.one(do.Measure)
    bench.footprints.clear()
    bench.measure()
    assert bench.one(do.StartWorker).model == OTHER
    assert rid not in [fail.rid for fail in bench.all(do.Fail)]


def test_a_refusal_says_who_holds_what_and_who_would_have_to_go() -> None:
    bench = machine((MODEL, 40), (OTHER, 30), (THIRD, 50))
    bench.load(MODEL, "a")
    bench.after(0.1)
    bench.load(OTHER, "b")
    bench.after(0.1)
    details = bench.refused(bench.ensure(THIRD)).details
    assert {one["model"]: one["reserved_bytes"] for one in details["held"]} == {MODEL: 40, OTHER: 30}
    assert (details["leased"], details["unload"]) == ([MODEL, OTHER], [MODEL])


def test_a_plan_counts_what_the_system_has() -> None:
    bench = machine((MODEL, 40))
    bench.others = 150
    bench.measure()
    assert bench.core.room_for(OTHER, 50) == (40, False, [])
    bench.load()
    assert bench.core.room_for(OTHER, 40) == (40, True, [MODEL])
    assert bench.core.room_for(MODEL, 40) == (40, True, [])


# --- what workers take ------------------------------------------------------------------------------------------------


def grown(held: int = 130) -> tuple[Machine, int]:
    """A model that is Ready and holds more than the whole budget."""
    bench = machine((MODEL, 40), (OTHER, 40))
    worker = bench.load()
    bench.footprints[worker] = held
    bench.measure()
    return bench, worker


def test_what_free_memory_allows_is_no_excess() -> None:
    bench, worker = grown(100)
    assert not bench.steps()
    assert bench.core.shares() == {worker: 60}


def test_a_model_past_its_share_is_reported_then_trimmed_then_recycled() -> None:
    bench, worker = grown()
    (said,) = [said for said in bench.all(do.Publish) if said.name == "memory_exceeded"]
    assert said.details == {"step": "reported", "footprint_bytes": 130, "share_bytes": 100}
    rid = bench.submit()
    bench.after(GRACE_S - 1)
    assert not bench.steps()
    bench.after(1)
    assert bench.steps() == ["trimmed"]
    assert bench.one(do.Trim) == do.Trim(worker, 0.0)
    bench.after(GRACE_S)
    assert bench.steps() == ["recycled"]
    assert not bench.all(do.StopWorker), "it answers what it is at"
    later = bench.submit()
    assert not bench.all(do.Dispatch), "the next worker answers this"
    bench.tell(ev.Done(rid))
    assert bench.one(do.StopWorker).why == "recycled"
    bench.gone(worker)
    bench.measure()
    started = bench.one(do.StartWorker)
    bench.tell(ev.Loaded(started.worker, 12, 2048))
    assert bench.one(do.Dispatch) == do.Dispatch(later, started.worker)


def test_one_that_trims_itself_is_left_alone() -> None:
    bench, worker = grown()
    bench.after(GRACE_S)
    bench.footprints[worker] = 90
    for _ in range(5):
        bench.after(GRACE_S)
        assert not bench.steps()


def test_a_leased_model_comes_back_by_itself() -> None:
    bench, worker = grown()
    bench.ensure(MODEL, "held")
    bench.after(GRACE_S)
    bench.after(GRACE_S)
    assert bench.one(do.StopWorker).why == "recycled"
    bench.gone(worker)
    bench.measure()
    assert bench.one(do.StartWorker).model == MODEL
    assert bench.view().leases == 1


def test_a_question_to_the_worker_is_answered_first() -> None:
    bench, worker = grown()
    bench.ask(lambda rid: ev.Ensure(rid, 1, MODEL, "question", asking=True))
    bench.after(GRACE_S)
    bench.after(GRACE_S)
    assert bench.steps() == ["recycled"]
    assert not bench.all(do.StopWorker)
    late = bench.ask(lambda rid: ev.Ensure(rid, 2, MODEL, "late", asking=True))
    assert not bench.all(do.Answer), "that one is for the next worker"
    bench.tell(ev.Release(1, "question"))
    assert bench.one(do.StopWorker).worker == worker
    bench.gone(worker)
    bench.measure()
    bench.tell(ev.Loaded(bench.one(do.StartWorker).worker, 12, 2048))
    assert bench.one(do.Answer).rid == late


def test_a_draft_model_that_is_being_loaded_is_waited_for() -> None:
    bench, worker = grown(130)
    bench.footprints[worker] = 95
    bench.after(1)
    rid = bench.ask(lambda rid: ev.Attach(rid, 1, worker, 2))
    assert bench.one(do.Answer).rid == rid
    bench.footprints[worker] = 130
    for _ in range(3):
        bench.after(GRACE_S)
    assert bench.core.models[MODEL].recycling
    assert not bench.all(do.StopWorker)
    bench.tell(ev.Attached(worker, "org/draft", 2))
    assert bench.one(do.StopWorker).why == "recycled"


def test_recycling_is_not_tried_again_and_again() -> None:
    bench, worker = grown()
    bench.ensure(MODEL, "held")
    bench.after(GRACE_S)
    bench.after(GRACE_S)
    assert bench.steps() == ["recycled"]
    bench.gone(worker)
    bench.measure()
    worker = bench.one(do.StartWorker).worker
    bench.tell(ev.Loaded(worker, 12, 2048))
    bench.footprints[worker] = 130
    for expected in (["reported"], ["trimmed"], [], []):
        bench.after(GRACE_S)
        assert bench.steps() == expected
    bench.after(RECYCLE_S)
    assert bench.steps() == ["recycled"]


def test_a_load_that_turns_out_larger_is_counted_as_it_is() -> None:
    bench = machine((MODEL, 40), (OTHER, 50))
    first = bench.load(OTHER)
    bench.after(0.1)
    bench.ensure(MODEL, "held")
    worker = bench.one(do.StartWorker).worker
    bench.tell(ev.Loaded(worker, 12, 2048, needs_bytes=70))
    assert bench.one(do.StopWorker).worker == first, "there is no room for both"
    bench.gone(first)
    assert bench.core.used_bytes == 70
    assert bench.core.room_for(OTHER, 50) == (30, False, [])
    bench.tell(ev.Release(1, "held"))
    bench.ask(lambda rid: ev.Unload(rid, 1, MODEL))
    bench.gone(worker)
    bench.measure()
    bench.load(OTHER, "held")
    assert bench.refused(bench.ensure(MODEL)).details["needed_bytes"] == 70, "the next load knows"


def test_one_that_can_never_fit_answers_and_goes() -> None:
    bench = machine((MODEL, 40))
    rid = bench.submit()
    worker = bench.one(do.StartWorker).worker
    bench.tell(ev.Loaded(worker, 12, 2048, needs_bytes=120))
    assert bench.one(do.Dispatch).rid == rid
    bench.tell(ev.Done(rid))
    assert bench.one(do.StopWorker).worker == worker
    bench.gone(worker)
    bench.measure()
    assert bench.refused(bench.submit()).details["needed_bytes"] == 120


def test_another_revision_is_another_matter() -> None:
    bench = machine((MODEL, 40))
    worker = bench.load()
    bench.core.models[MODEL].learned_bytes = 120
    bench.ask(lambda rid: ev.Unload(rid, 1, MODEL))
    bench.gone(worker)
    bench.measure()
    bench.have(revision="r1", need=45)
    bench.ensure()
    assert bench.one(do.StartWorker)


# --- pressure ---------------------------------------------------------------------------------------------------------


def three(bench: Machine) -> list[int]:
    """Models that are loaded: one leased, one that was used longest ago, one used since."""
    workers = []
    for model, lease in ((MODEL, "held"), (OTHER, None), (THIRD, None)):
        bench.now += 0.2
        bench.measure()
        workers.append(bench.load(model, lease))
    return workers


def test_a_warning_trims_and_lets_go_one_by_one() -> None:
    bench = machine((MODEL, 20), (OTHER, 20), (THIRD, 20))
    workers = three(bench)
    bench.after(1, some=20)
    assert bench.levels() == ["warning"]
    assert [(trim.worker, trim.keep) for trim in bench.all(do.Trim)] == [(worker, 0.5) for worker in workers]
    assert not bench.all(do.StopWorker)
    bench.after(1, some=20)
    assert not bench.levels()
    assert not bench.all(do.Trim)
    bench.after(RELIEF_S, some=20)
    assert bench.one(do.StopWorker).worker == workers[1]
    bench.after(RELIEF_S, some=20)
    assert not bench.all(do.StopWorker), "one at a time"
    bench.gone(workers[1])
    bench.after(RELIEF_S, some=20)
    assert bench.one(do.StopWorker).worker == workers[2]
    bench.gone(workers[2])
    for _ in range(5):
        bench.after(RELIEF_S, some=20)
        assert not bench.all(do.StopWorker), "somebody holds it"


def test_critical_pressure_lets_all_go_that_nobody_uses() -> None:
    bench = machine((MODEL, 20), (OTHER, 20), (THIRD, 20))
    workers = three(bench)
    rid = bench.submit(THIRD)
    bench.after(1, full=30)
    assert bench.levels() == ["critical"]
    assert [stop.worker for stop in bench.all(do.StopWorker)] == [workers[1]]
    assert bench.one(do.StopWorker).why == "pressure"
    assert [(trim.worker, trim.keep) for trim in bench.all(do.Trim)] == [(workers[0], 0.0), (workers[2], 0.0)]
    bench.tell(ev.Done(rid))
    assert bench.one(do.Deliver)
    bench.after(RELIEF_S, full=30)
    assert bench.one(do.StopWorker).worker == workers[2]


def test_a_pinned_model_stays() -> None:
    bench = machine((MODEL, 20))
    bench.tell(ev.Configure(bench.core.limits, Rules(pinned=frozenset([MODEL]))))
    bench.load()
    bench.after(1, full=30)
    assert bench.one(do.Trim)
    assert not bench.all(do.StopWorker)


def test_batch_work_is_refused_until_it_is_over() -> None:
    bench = machine((MODEL, 20))
    bench.load()
    running = bench.submit(priority="batch")
    bench.after(1, full=30)
    assert not bench.all(do.CancelOnWorker), "what was accepted is answered"
    error = bench.refused(bench.submit(priority="batch"))
    assert isinstance(error, errors.MemoryPressure)
    assert error.details == {"level": "critical", "source": "psi", "retry_after_s": 10.0}
    assert bench.submit()
    assert bench.one(do.Dispatch)
    bench.tell(ev.Done(running))
    assert bench.one(do.Deliver)
    bench.after(1)
    assert bench.refused(bench.submit(priority="batch"))
    bench.after(10)
    assert bench.levels() == ["normal"]
    assert bench.one(do.Trim).keep == 1.0, "the worker hears of it, too"
    bench.submit(priority="batch")
    assert bench.one(do.Dispatch)


def test_batch_jobs_step_aside() -> None:
    bench = machine((MODEL, 20))
    worker = bench.load()
    rid = bench.submit(priority="batch", yields=True)
    bench.after(1, full=30)
    assert bench.one(do.CancelOnWorker) == do.CancelOnWorker(rid, worker)


def test_a_load_under_way_goes_on() -> None:
    bench = machine((MODEL, 20))
    rid = bench.submit()
    worker = bench.one(do.StartWorker).worker
    bench.after(1, full=30)
    assert not bench.all(do.StopWorker)
    bench.tell(ev.Loaded(worker, 12, 2048))
    assert bench.one(do.Dispatch).rid == rid


def test_subscribers_hear_of_it_with_the_numbers() -> None:
    bench = machine((MODEL, 20))
    bench.others = 197
    bench.measure()
    (said,) = [said for said in bench.all(do.Publish) if said.name == "memory_pressure"]
    assert said.details == {
        "level": "warning", "before": "normal", "source": "available", "available_bytes": 3,
        "capacity_bytes": 200, "reserve_bytes": 10, "footprint_bytes": 0,
        "stalls": [{"source": "psi", "some": 0.0, "full": 0.0}],
    }  # fmt: skip
    assert bench.core.snapshot().memory_pressure == "warning"
    view = bench.core.memory()
    assert (view.pressure.level, view.pressure.source, view.available_bytes) == ("warning", "available", 3)
    assert bench.core.watchful
