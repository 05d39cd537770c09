"""Who finds a place among those that wait, and what becomes of them when others give up."""

from __future__ import annotations

from mlxd.core import actions as do
from mlxd.core import events as ev
from support.core_bench import MODEL, Bench

OTHER = "org/other"


def request(bench: Bench, client: int = 1, model: str = MODEL) -> int:
    return bench.ask(lambda rid: ev.Submit(rid, client, model))


def test_a_client_alone_takes_half_the_line_and_the_next_finds_a_place() -> None:
    bench = Bench(queue=16, max_batch=1)
    bench.have()
    bench.load()
    request(bench)  # runs
    waits = {}
    for client in range(1, 6):
        waits[client] = 0
        request(bench, client)
        while not bench.all(do.Fail):
            waits[client] += 1
            request(bench, client)
        assert bench.one(do.Fail).error.kind == "queue_full"
    assert waits == {1: 8, 2: 4, 3: 2, 4: 1, 5: 1}
    assert bench.core.waiting == 16


def test_who_waits_for_a_model_that_was_to_go_is_answered_once_it_stays() -> None:
    bench = Bench(max_batch=2)
    bench.have(need=60)
    bench.have(OTHER, need=60)
    bench.load()
    request(bench)
    needs_room = request(bench, model=OTHER)
    waiting = bench.ask(lambda rid: ev.Ensure(rid, 2, MODEL))
    held_up = request(bench, 3)
    assert not bench.all(do.Answer)
    assert not bench.all(do.Dispatch)
    bench.tell(ev.Cancel(needs_room))
    assert bench.one(do.Answer).rid == waiting
    assert bench.one(do.Dispatch).rid == held_up


def test_what_a_client_waits_for_goes_with_it() -> None:
    bench = Bench()
    bench.have()
    loading = bench.ask(lambda rid: ev.Ensure(rid, 2, MODEL, lease="held"))
    queued = request(bench, 2)
    bench.tell(ev.ClientGone(2))
    assert {action.rid for action in bench.all(do.Fail)} == {loading, queued}
    assert bench.core.quiet


def test_a_load_that_nobody_waits_for_any_more_is_not_left_to_another_daemon() -> None:
    """One that was asked for by name outlives its caller, but not the daemon's time."""
    bench = Bench(max_batch=1)
    bench.have(need=60)
    bench.have(OTHER, need=60)
    worker = bench.load()
    running = request(bench)
    bench.ask(lambda rid: ev.Ensure(rid, 2, OTHER))
    bench.tell(ev.ClientGone(2))
    (job,) = (job for job in bench.core.jobs.values() if job.model == OTHER)
    assert job.state == "queued"
    bench.tell(ev.Hold())
    bench.tell(ev.Leave())
    assert job.state == "cancelled"
    bench.tell(ev.Done(running))
    assert bench.one(do.StopWorker).worker == worker
    bench.tell(ev.WorkerExited(worker))
    assert not bench.all(do.StartWorker)
