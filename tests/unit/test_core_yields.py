"""Requests of batch jobs step aside: for a slot, for room, for the end; and their models wait for room nobody uses."""

from __future__ import annotations

from mlxd.core import actions as do
from mlxd.core import events as ev
from support.core_bench import MODEL, Bench

OTHER = "org/other"


def item(bench: Bench, model: str = MODEL) -> int:
    return bench.ask(lambda rid: ev.Submit(rid, -1, model, "batch", yields=True))


def request(bench: Bench, model: str = MODEL) -> int:
    return bench.ask(lambda rid: ev.Submit(rid, 1, model))


def started(bench: Bench, model: str = MODEL) -> int:
    worker = bench.one(do.StartWorker)
    assert worker.model == model
    bench.tell(ev.Loaded(worker.worker, 40, 2048))
    return worker.worker


def two_models(bench: Bench) -> None:
    bench.have(MODEL, need=60)
    bench.have(OTHER, need=60)


def test_the_latest_item_gives_its_slot_to_an_interactive_request():
    bench = Bench(max_batch=2)
    bench.have()
    bench.load()
    first, second = item(bench), item(bench)
    urgent = request(bench)
    assert bench.one(do.CancelOnWorker).rid == second
    assert bench.one(do.Publish).name == "queue"
    bench.tell(ev.Done(second))
    error = bench.refused(second)
    assert (error.kind, error.details["yielded"]) == ("model_busy", True)
    assert bench.one(do.Dispatch).rid == urgent
    assert first in bench.core.models[MODEL].running


def test_one_item_steps_aside_for_each_request_and_none_for_batch_requests():
    bench = Bench(max_batch=3)
    bench.have()
    bench.load()
    items = [item(bench) for _ in range(3)]
    bench.ask(lambda rid: ev.Submit(rid, 2, MODEL, "batch"))
    assert not bench.all(do.CancelOnWorker)
    request(bench)
    assert bench.one(do.CancelOnWorker).rid == items[2]
    bench.tell(ev.Tick())
    assert not bench.all(do.CancelOnWorker)
    request(bench)
    assert bench.one(do.CancelOnWorker).rid == items[1]


def test_items_step_aside_for_a_model_that_needs_the_room():
    bench = Bench(max_batch=1)
    two_models(bench)
    running = item(bench)
    worker = started(bench)
    waiting = item(bench)
    request(bench, OTHER)
    assert bench.one(do.CancelOnWorker).rid == running
    assert bench.one(do.Fail).rid == waiting
    bench.tell(ev.Done(running))
    assert bench.one(do.StopWorker).worker == worker
    bench.tell(ev.WorkerExited(worker))
    assert bench.one(do.StartWorker).model == OTHER


def test_items_wait_until_a_model_that_others_used_goes_by_itself():
    bench = Bench(keep_alive_s=30.0)
    two_models(bench)
    request(bench, OTHER)
    worker = started(bench, OTHER)
    bench.tell(ev.Done(bench.one(do.Dispatch).rid))
    item(bench)
    assert not bench.all(do.StopWorker)
    assert bench.view().phase == "queued"
    bench.now += 30.0
    bench.tell(ev.Tick())
    assert bench.one(do.StopWorker).worker == worker
    bench.tell(ev.WorkerExited(worker))
    assert bench.one(do.StartWorker).model == MODEL


def test_items_take_the_room_of_an_idle_model_that_only_items_used():
    bench = Bench()
    two_models(bench)
    item(bench, OTHER)
    worker = started(bench, OTHER)
    item(bench)
    assert not bench.all(do.StopWorker), "it is busy"
    bench.tell(ev.Done(1))
    assert bench.one(do.StopWorker).worker == worker


def test_a_request_overtakes_items_in_the_line_of_loads():
    bench = Bench()
    two_models(bench)
    bench.have("org/third", need=60)
    item(bench, OTHER)
    worker = started(bench, OTHER)
    item(bench)
    bench.tell(ev.Tick())
    request(bench, "org/third")
    bench.tell(ev.Done(1))
    bench.tell(ev.WorkerExited(worker))
    assert bench.one(do.StartWorker).model == "org/third"


def test_items_that_nothing_has_room_for_are_refused():
    bench = Bench()
    bench.have(need=1000)
    rid = item(bench)
    assert bench.refused(rid).kind == "insufficient_memory"


def test_items_do_not_hold_up_a_drain():
    bench = Bench(max_batch=1)
    bench.have()
    bench.load()
    running, waiting = item(bench), item(bench)
    bench.tell(ev.Drain())
    assert (bench.one(do.CancelOnWorker).rid, bench.one(do.Fail).rid) == (running, waiting)
    bench.tell(ev.Done(running))
    assert bench.core.quiet


def test_items_go_back_while_another_daemon_may_take_over():
    bench = Bench(max_batch=1)
    bench.have()
    bench.load()
    running = item(bench)
    bench.tell(ev.Hold())
    assert bench.one(do.CancelOnWorker).rid == running
    late = item(bench)
    assert bench.refused(late).details["yielded"]
    urgent = request(bench)
    bench.tell(ev.Done(running))
    assert bench.one(do.Dispatch).rid == urgent
    bench.tell(ev.GoOn())
    assert item(bench) in {waiting.rid for waiting in bench.core.models[MODEL].queue}


def test_few_items_begin_beside_an_interactive_request():
    bench = Bench(max_batch=8, batch_slots=8)
    bench.have()
    bench.load()
    urgent = request(bench)
    items = [item(bench) for _ in range(5)]
    assert [rid for rid in items if rid in bench.core.models[MODEL].running] == items[:2]
    bench.ask(lambda rid: ev.Submit(rid, 2, MODEL, "batch"))
    assert bench.all(do.Dispatch), "one that does not yield has a free slot"
    bench.tell(ev.Done(items[0]))
    assert bench.one(do.Dispatch).rid == items[2]
    bench.tell(ev.Done(urgent))
    assert [action.rid for action in bench.all(do.Dispatch)] == items[3:]
