"""Memory for draft models: with a load, beside what runs, at the expense of what is idle; and given back."""

from __future__ import annotations

from mlxd.core import actions as do
from mlxd.core import events as ev
from support.core_bench import MODEL, Bench

OTHER = "org/other"


def attach(bench: Bench, worker: int, size: int) -> int:
    return bench.ask(lambda rid: ev.Attach(rid, 1, worker, size))


def loaded(need: int = 40) -> tuple[Bench, int]:
    bench = Bench()
    bench.have(need=need)
    return bench, bench.load()


def test_a_draft_model_counts_while_it_is_there() -> None:
    bench, worker = loaded()
    attach(bench, worker, 20)
    assert bench.one(do.Answer)
    assert bench.core.used_bytes == 60
    bench.tell(ev.Attached(worker, "org/draft", 20))
    assert bench.names() == ["draft_attached"]
    assert (bench.view().draft_model, bench.core.used_bytes) == ("org/draft", 60)
    attach(bench, worker, 30)
    assert bench.core.used_bytes == 90, "both are there while one is replaced"
    bench.tell(ev.Attached(worker, "org/larger", 30))
    assert (bench.view().draft_model, bench.core.used_bytes) == ("org/larger", 70)
    bench.ask(lambda rid: ev.Unload(rid, 1, MODEL))
    bench.tell(ev.WorkerExited(worker))
    assert (bench.view().draft_model, bench.core.used_bytes) == (None, 0)


def test_one_that_is_refused_gives_its_memory_back() -> None:
    bench, worker = loaded()
    attach(bench, worker, 20)
    bench.tell(ev.Attached(worker, None, 20))
    assert (bench.view().draft_model, bench.core.used_bytes) == (None, 40)


def test_a_load_makes_room_for_both() -> None:
    bench = Bench()
    bench.have(OTHER, need=50)
    other = bench.load(OTHER)
    bench.have(need=40)
    bench.ask(lambda rid: ev.Ensure(rid, 1, MODEL, draft_bytes=30))
    assert bench.one(do.StopWorker).worker == other
    bench.tell(ev.WorkerExited(other))
    worker = bench.one(do.StartWorker).worker
    bench.tell(ev.Loaded(worker, 40, 2048))
    assert bench.core.used_bytes == 70
    attach(bench, worker, 30)
    assert bench.one(do.Answer)
    assert bench.core.used_bytes == 70, "that was promised"


def test_idle_models_go_for_it_and_leased_ones_do_not() -> None:
    bench, worker = loaded()
    bench.have(OTHER, need=50)
    other = bench.load(OTHER)
    attach(bench, worker, 30)
    assert bench.one(do.StopWorker).worker == other
    assert not bench.all(do.Answer)
    bench.tell(ev.WorkerExited(other))
    assert bench.one(do.Answer)
    bench.tell(ev.Attached(worker, "org/draft", 30))
    bench.have(OTHER, need=20)
    bench.load(OTHER, lease="held")
    assert bench.refused(attach(bench, worker, 30)).kind == "insufficient_memory"
    assert bench.core.used_bytes == 90


def test_what_was_promised_and_is_not_wanted_any_more_is_free_again() -> None:
    bench = Bench()
    bench.have(need=40)
    bench.ask(lambda rid: ev.Ensure(rid, 1, MODEL, draft_bytes=20))
    worker = bench.one(do.StartWorker).worker
    bench.tell(ev.Loaded(worker, 40, 2048))
    bench.have(OTHER, need=30)
    other = bench.load(OTHER)
    waiting = attach(bench, worker, 40)  # 20 of it are to be found
    assert bench.one(do.StopWorker).worker == other
    bench.tell(ev.Cancel(waiting))
    bench.tell(ev.WorkerExited(other))
    assert bench.core.used_bytes == 40


def test_nobody_waits_for_a_model_that_goes() -> None:
    bench, worker = loaded()
    bench.have(OTHER, need=50)
    other = bench.load(OTHER)
    waiting = attach(bench, worker, 30)
    bench.tell(ev.WorkerExited(worker))
    assert bench.refused(waiting).kind == "worker_died"
    assert bench.refused(attach(bench, worker, 30)).kind == "worker_died"
    bench.tell(ev.WorkerExited(other))
    again = bench.load()
    gave_up = attach(bench, again, 30)
    assert bench.one(do.Answer).rid == gave_up


def test_who_gives_up_waiting_holds_nothing() -> None:
    bench, worker = loaded()
    bench.have(OTHER, need=50)
    other = bench.load(OTHER)
    waiting = attach(bench, worker, 30)
    bench.tell(ev.Cancel(waiting))
    bench.tell(ev.WorkerExited(other))
    assert not bench.all(do.Answer)
    assert bench.core.used_bytes == 40
