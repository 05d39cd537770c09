"""What the settings say of single models, in plain cases: who goes for whom, what is loaded by itself and again, and
what becomes of models when the settings change while they are loaded."""

from __future__ import annotations

import itertools

import pytest

from mlxd.core import actions as do
from mlxd.core import events as ev
from mlxd_client.errors import InsufficientMemory, LoadFailed, WorkerDied
from support.core_bench import MODEL, Bench

OTHER = "org/other"
DEATH = WorkerDied("died", cause="signal")


def bench_with(*models: str, need: int = 60, **limits: float) -> Bench:
    """A budget of 100, and models of which two do not fit."""
    bench = Bench(**limits)
    for model in models:
        bench.have(model, need=need)
    return bench


def load(bench: Bench, model: str, lease: str | None = None) -> int:
    """Returns the worker. Whoever has to go for it is gone at once."""
    bench.ask(lambda rid: ev.Ensure(rid, 1, model, lease))
    for stop in bench.all(do.StopWorker):
        bench.tell(ev.WorkerExited(stop.worker))
    worker = bench.one(do.StartWorker).worker
    bench.tell(ev.Loaded(worker, 12, 2048))
    return worker


def state(bench: Bench, model: str = MODEL) -> str:
    return bench.view(model).state


# --- pins ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pinned", "leased", "answer"),
    [
        ((), None, "goes"),
        ((MODEL,), None, "stays"),
        ((OTHER,), None, "goes"),
        ((MODEL, OTHER), None, "goes"),  # a pinned one takes the room of a pinned one
        ((MODEL, OTHER), "L", "stays"),
        ((), "L", "stays"),
    ],
)
def test_who_goes_for_whom(pinned: tuple[str, ...], leased: str | None, answer: str) -> None:
    bench = bench_with(MODEL, OTHER)
    bench.configure(pinned=pinned)
    worker = load(bench, MODEL, leased)
    rid = bench.ask(lambda rid: ev.Ensure(rid, 1, OTHER))
    if answer == "goes":
        assert bench.one(do.StopWorker).worker == worker
    else:
        error = bench.refused(rid)
        assert isinstance(error, InsufficientMemory)
        assert error.details["leased"] == ([MODEL] if leased else [])
        assert error.details["pinned"] == ([] if leased else [MODEL])
        assert error.details["available_bytes"] == 40
        assert MODEL in error.message
    assert bench.core.room_for(OTHER, 60)[1] is (answer == "goes"), "the plan says the same"


def test_those_that_are_not_pinned_go_first_however_recently_they_were_used() -> None:
    bench = bench_with("a/pinned", "b/plain", "c/wants", need=40)
    bench.configure(pinned=("a/pinned", "c/wants"))
    load(bench, "a/pinned")
    bench.now += 10
    plain = load(bench, "b/plain")
    bench.ask(lambda rid: ev.Ensure(rid, 1, "c/wants"))
    assert bench.one(do.StopWorker).worker == plain


def test_a_pinned_model_has_no_idle_time_whatever_a_request_wishes() -> None:
    bench = bench_with(MODEL, need=10)
    bench.configure(pinned=(MODEL,))
    worker = load(bench, MODEL)
    rid = bench.ask(lambda rid: ev.Submit(rid, 1, MODEL, keep_alive_s=0.0))
    bench.tell(ev.Done(rid))
    bench.now += 1e6
    bench.tell(ev.Tick())
    view = bench.view()
    assert (view.state, view.pinned, view.idle_unload_at) == ("Ready", True, None)
    bench.ask(lambda rid: ev.Unload(rid, 1, MODEL))
    assert bench.one(do.StopWorker).worker == worker, "by name it goes all the same"


def test_a_pin_that_is_taken_back_lets_the_model_go() -> None:
    bench = bench_with(MODEL, need=10)
    bench.configure(pinned=(MODEL,))
    load(bench, MODEL)
    bench.now += 1000
    bench.configure()
    assert bench.names() == ["model_changed", "unloading_started"], "it was idle for longer than keep_alive"


def test_a_pin_saves_a_model_that_was_about_to_make_room() -> None:
    bench = bench_with(MODEL, OTHER)
    load(bench, MODEL)
    running = bench.ask(lambda rid: ev.Submit(rid, 1, MODEL))
    waiting = bench.ask(lambda rid: ev.Ensure(rid, 2, OTHER))
    bench.configure(pinned=(MODEL,))
    assert bench.refused(waiting).kind == "insufficient_memory"
    bench.tell(ev.Done(running))
    assert state(bench) == "Ready"
    assert not bench.all(do.StopWorker)


# --- preloads -----------------------------------------------------------------------------------------------------


def test_a_preload_loads_and_stays_by_its_keep_alive() -> None:
    bench = bench_with(MODEL, need=10)
    bench.configure(preload=(MODEL,))
    bench.tell(ev.Preload(MODEL))
    bench.tell(ev.Loaded(bench.one(do.StartWorker).worker, 12, 2048))
    view = bench.view()
    assert (view.state, view.preload) == ("Ready", True)
    bench.now += 301
    bench.tell(ev.Tick())
    (stop,) = bench.all(do.StopWorker)
    bench.tell(ev.WorkerExited(stop.worker))
    assert bench.core.next_deadline() is None, "it had its time"


def test_preloads_take_what_is_free_and_push_nobody_out() -> None:
    bench = bench_with("a/first", "b/second", "c/third", need=40)
    bench.configure(preload=("a/first", "b/second", "c/third"))
    for model in ("a/first", "b/second"):
        bench.tell(ev.Preload(model))
        bench.tell(ev.Loaded(bench.one(do.StartWorker).worker, 12, 2048))
    bench.tell(ev.Preload("c/third"))
    assert bench.names() == ["error"]
    error = bench.view("c/third").error
    assert error is not None
    assert "nothing goes for a preload" in error.message
    bench.now += 100
    bench.tell(ev.Tick())
    assert not bench.all(do.StartWorker), "it is not tried again and again"
    load(bench, "c/third")  # whoever asks for it gets it


def test_a_pinned_preload_pushes_out_what_is_not() -> None:
    bench = bench_with(MODEL, OTHER)
    load(bench, OTHER)
    bench.configure(pinned=(MODEL,), preload=(MODEL,))
    bench.tell(ev.Preload(MODEL))
    assert len(bench.all(do.StopWorker)) == 1


def test_a_preload_whose_worker_dies_is_loaded_again_as_its_breaker_allows() -> None:
    bench = bench_with(MODEL, need=10)
    bench.configure(preload=(MODEL,))
    bench.tell(ev.Preload(MODEL))
    starts = []
    for _ in range(6):
        (start,) = bench.all(do.StartWorker)
        starts.append(bench.now)
        bench.tell(ev.WorkerExited(start.worker, DEATH))
        if not bench.all(do.StartWorker):
            due = bench.core.next_deadline()
            assert due is not None
            bench.now = due
            bench.tell(ev.Tick())
    assert [later - before for before, later in itertools.pairwise(starts)] == [0, 0, 5, 10, 20]


def test_a_preload_that_was_not_here_is_loaded_once_it_is() -> None:
    bench = Bench()
    bench.configure(preload=(MODEL,))
    bench.tell(ev.Preload(MODEL))
    assert not bench.said
    bench.fetched(bench.fetch())
    assert bench.one(do.StartWorker).model == MODEL


def test_a_preload_that_cannot_be_loaded_is_said_once() -> None:
    bench = bench_with(MODEL, need=10)
    bench.configure(preload=(MODEL,))
    bench.tell(ev.Preload(MODEL))
    worker = bench.one(do.StartWorker).worker
    bench.tell(ev.LoadFailed(worker, LoadFailed("broken")))
    bench.tell(ev.WorkerExited(worker))
    assert bench.names() == ["error"]
    assert state(bench) == "Downloaded"
    assert bench.core.next_deadline() is None


@pytest.mark.parametrize("how", ["unload", "cancel", "settings"])
def test_a_preload_is_given_up(how: str) -> None:
    bench = bench_with(MODEL, OTHER)
    load(bench, OTHER)
    bench.configure(pinned=(MODEL,), preload=(MODEL,))
    bench.tell(ev.Preload(MODEL))  # it waits for the other one to go
    if how == "unload":
        bench.ask(lambda rid: ev.Unload(rid, 1, MODEL))
        assert len(bench.all(do.Answer)) == 1
    elif how == "cancel":
        bench.tell(ev.CancelJob("load-abc123-2"))
    else:
        bench.configure(pinned=(MODEL,))
    assert bench.job("load-abc123-2").state == "cancelled"
    assert not bench.core._book.pending


def test_no_preload_begins_while_the_daemon_drains() -> None:
    bench = bench_with(MODEL, need=10)
    bench.configure(preload=(MODEL,))
    bench.tell(ev.Drain())
    bench.tell(ev.Preload(MODEL))
    assert not bench.all(do.StartWorker)
    assert bench.core.next_deadline() is None


# --- settings that change -----------------------------------------------------------------------------------------


def test_a_lower_budget_takes_effect_at_once() -> None:
    bench = bench_with("a/old", "b/pinned", "c/leased", need=30)
    bench.configure(pinned=("b/pinned",))
    old, pinned = load(bench, "a/old"), load(bench, "b/pinned")
    load(bench, "c/leased", "L")
    bench.configure(pinned=("b/pinned",), budget_bytes=60)
    assert bench.one(do.StopWorker).worker == old
    bench.configure(pinned=("b/pinned",), budget_bytes=30)
    assert bench.one(do.StopWorker).worker == pinned, "not even a pin outlasts it"
    bench.configure(pinned=("b/pinned",), budget_bytes=10)
    assert not bench.all(do.StopWorker), "a lease does, for as long as it lasts"
    bench.tell(ev.WorkerExited(old))
    bench.tell(ev.WorkerExited(pinned))
    bench.tell(ev.Release(1, "L"))
    assert len(bench.all(do.StopWorker)) == 1


def test_a_busy_model_that_is_over_the_budget_serves_what_it_had_accepted() -> None:
    bench = bench_with(MODEL, max_batch=1)
    worker = load(bench, MODEL)
    first = bench.ask(lambda rid: ev.Submit(rid, 1, MODEL))
    second = bench.ask(lambda rid: ev.Submit(rid, 1, MODEL))
    bench.configure(budget_bytes=50)
    late = bench.ask(lambda rid: ev.Submit(rid, 1, MODEL))
    bench.tell(ev.Done(first))
    assert bench.one(do.Dispatch).rid == second
    bench.tell(ev.Done(second))
    assert bench.one(do.StopWorker).worker == worker
    bench.tell(ev.WorkerExited(worker))
    assert bench.refused(late).kind == "insufficient_memory"


def test_a_budget_that_is_raised_again_in_time_spares_the_model() -> None:
    bench = bench_with(MODEL)
    load(bench, MODEL)
    running = bench.ask(lambda rid: ev.Submit(rid, 1, MODEL))
    bench.configure(budget_bytes=50)
    bench.configure(budget_bytes=100)
    bench.tell(ev.Done(running))
    assert not bench.all(do.StopWorker)


def test_keep_alive_follows_the_settings_but_for_what_a_request_wished() -> None:
    bench = bench_with(MODEL, OTHER, need=10)
    load(bench, MODEL)
    load(bench, OTHER)
    bench.ask(lambda rid: ev.Ensure(rid, 1, OTHER, keep_alive_s=70.0))
    bench.configure(keep_alive_s=50.0, keep_alive={MODEL: 60.0, OTHER: 80.0})
    after = {model: bench.view(model).idle_unload_at for model in (MODEL, OTHER)}
    assert after == {MODEL: bench.core.wall + bench.now + 60, OTHER: bench.core.wall + bench.now + 70}


def test_a_worker_keeps_the_batch_that_it_was_started_with() -> None:
    bench = bench_with(MODEL, OTHER, need=10, max_batch=1)
    load(bench, MODEL)
    bench.configure(max_batch=2)
    load(bench, OTHER)
    for model, dispatched in ((MODEL, 1), (OTHER, 2)):
        rids = [bench.ask(lambda rid, model=model: ev.Submit(rid, 1, model)) for _ in range(3)]  # type: ignore[misc]
        assert sum(rid in bench.core.models[model].running for rid in rids) == dispatched


def test_a_shorter_line_turns_nobody_away_that_waits() -> None:
    bench = bench_with(MODEL, need=10, max_batch=1)
    load(bench, MODEL)
    rids = [bench.ask(lambda rid: ev.Submit(rid, 1, MODEL)) for _ in range(4)]
    bench.configure(queue=1)
    assert not bench.all(do.Fail)
    assert bench.refused(bench.ask(lambda rid: ev.Submit(rid, 2, MODEL))).kind == "queue_full"
    bench.tell(ev.Done(rids[0]))
    assert bench.one(do.Dispatch).rid == rids[1]


def test_what_was_prewarmed_shows_until_the_model_goes() -> None:
    bench = bench_with(MODEL, need=10)
    worker = load(bench, MODEL)
    bench.tell(ev.Prewarmed(worker, 2))
    assert (bench.names(), bench.view().prewarmed) == (["model_changed"], 2)
    bench.ask(lambda rid: ev.Unload(rid, 1, MODEL))
    bench.tell(ev.WorkerExited(worker))
    assert bench.view().prewarmed == 0


def test_an_adapter_shows_until_the_model_goes() -> None:
    bench = bench_with(MODEL, need=10)
    worker = load(bench, MODEL)
    bench.tell(ev.Adapted(worker, "org/adapter"))
    assert bench.names() == ["model_changed"]
    assert bench.view().adapter == "org/adapter"
    bench.ask(lambda rid: ev.Unload(rid, 1, MODEL))
    bench.tell(ev.WorkerExited(worker))
    assert bench.view().adapter is None
