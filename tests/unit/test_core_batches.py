"""What becomes of items of batch jobs, case by case; any order of them is in tests/properties/test_batches.py."""

from __future__ import annotations

import pytest

from mlxd.core import actions as do
from mlxd.core import events as ev
from mlxd.core.batches import ENDED_BATCHES_KEPT, PROGRESS_S, verdict
from mlxd_client import errors
from support.core_bench import WALL, Bench


def job(bench: Bench, name: str = "j", items: int = 6, **facts: object) -> None:
    """A job whose items are all read."""
    bench.tell(ev.BatchFound(name, items, WALL + bench.now, **facts))  # type: ignore[arg-type]
    read = bench.one(do.ReadItems)
    bench.tell(ev.BatchItems(name, read.run, tuple((n, 0) for n in range(items)), (0, items - 1), False))


def ran(bench: Bench) -> list[tuple[str, int]]:
    return [(run.job, run.place) for run in bench.all(do.RunItem)]


def ended(bench: Bench, ticket: int, error: errors.RpcError | None = None, *, began: bool = True) -> None:
    bench.tell(ev.BatchItemEnded(ticket, error, began))


DIED = errors.WorkerDied("died", cause="signal")


@pytest.mark.parametrize(
    ("error", "began", "expected"),
    [
        (None, True, "record"),
        (errors.InvalidParams("no"), False, "record"),
        (errors.Unsupported("no"), True, "record"),
        (errors.ContextExceeded("long"), True, "record"),
        (errors.DeadlineExceeded("late"), False, "record"),
        (errors.ModelNotFound("no adapter", field="adapter"), False, "record"),
        (errors.ModelBusy("later", yielded=True), True, "again"),
        (errors.ModelBusy("it is deleted"), False, "wait"),
        (errors.QueueFull("full"), False, "wait"),
        (errors.InsufficientMemory("pressure"), False, "wait"),
        (errors.MemoryPressure("critical"), False, "wait"),
        (errors.ShuttingDown("bye"), True, "wait"),
        (errors.WorkerDied("loop", cause="crash_loop"), False, "wait"),
        (errors.WorkerDied("stopped", cause="stopped"), True, "wait"),
        (errors.ModelNotFound("gone"), False, "no_model"),
        (errors.LoadFailed("no"), False, "no_model"),
        (errors.WorkerDied("while loading", cause="signal"), False, "no_model"),
        (DIED, True, "suspect"),
        (errors.InternalError("a bug"), True, "suspect"),
        (errors.InsufficientMemory("for its KV cache"), True, "suspect"),
    ],
)
def test_what_becomes_of_an_item(error: errors.RpcError | None, began: bool, expected: str) -> None:
    assert verdict(error, began) == expected


def test_jobs_take_turns() -> None:
    bench = Bench(batch_slots=4)
    job(bench, "a", 6)
    assert ran(bench) == [("a", n) for n in range(4)]
    first = [run.ticket for run in bench.all(do.RunItem)]
    job(bench, "b", 6)
    turns = []
    for ticket in first:
        ended(bench, ticket)
        turns += ran(bench)
        bench.tell(ev.BatchRecorded("a", (ticket,), 1, 0))
    assert [name for name, _ in turns] == ["b", "a", "b", "a"]


def test_who_may_be_to_blame_runs_alone() -> None:
    bench = Bench(batch_slots=3, batch_retry_s=60.0)
    job(bench, items=5)
    tickets = [run.ticket for run in bench.all(do.RunItem)]
    for ticket in tickets:
        ended(bench, ticket, DIED)
        assert bench.one(do.CountTry).tries == 1
    assert ran(bench) == [("j", 0)], "alone, and before those that were never tried"
    ended(bench, bench.one(do.RunItem).ticket)
    assert ran(bench) == [("j", 1)]
    ended(bench, bench.one(do.RunItem).ticket, DIED)
    assert ran(bench) == [("j", 2)]
    ended(bench, bench.one(do.RunItem).ticket)
    assert ran(bench) == [("j", 3), ("j", 4)], "the last try of it is later"
    others = [run.ticket for run in bench.all(do.RunItem)]
    bench.tell(ev.BatchRecorded("j", tuple(bench.core._batches.unrecorded), 2, 0))
    bench.now += 60.0
    bench.tell(ev.Tick())
    assert ran(bench) == []
    for ticket in others:
        ended(bench, ticket)
    assert ran(bench) == [("j", 1)]
    ended(bench, bench.one(do.RunItem).ticket, DIED)
    assert bench.one(do.RecordItem).place == 1


def test_no_room_is_waited_for() -> None:
    bench = Bench(batch_slots=2)
    job(bench)
    first, second = (run.ticket for run in bench.all(do.RunItem))
    ended(bench, first, errors.QueueFull("full", retry_after_s=4.0), began=False)
    view = bench.job("j")
    assert (view.state, view.phase, view.error is not None and view.error.kind) == ("running", "waiting", "queue_full")
    ended(bench, second)
    assert ran(bench) == []
    assert bench.core.next_deadline() == bench.now + 4.0
    bench.now += 4.0
    bench.tell(ev.Tick())
    assert ran(bench) == [("j", 0), ("j", 2)]
    ended(bench, bench.all(do.RunItem)[0].ticket)
    assert bench.job("j").error is None


def test_a_model_that_cannot_be_had_fails_its_job_after_three_tries() -> None:
    bench = Bench(batch_slots=2, batch_retry_s=60.0)
    job(bench)
    for wait in (0.5, 60.0, None):
        for run in bench.all(do.RunItem):
            ended(bench, run.ticket, errors.LoadFailed("no"), began=False)
            if wait is None:
                break
        if wait is not None:
            bench.now += wait
            bench.tell(ev.Tick())
    end = bench.one(do.EndBatch)
    assert (end.state, end.error is not None and end.error.kind) == ("failed", "load_failed")
    bench.tell(ev.BatchRecorded("j", (), 0, 0, "failed", WALL + bench.now))
    assert bench.job("j").state == "failed"
    bench.tell(ev.BatchStarted("j", WALL + bench.now))
    assert (bench.job("j").state, bench.job("j").error) == ("running", None)
    assert bench.one(do.ReadItems).after == (0, -1)


def test_no_item_begins_as_long_as_many_are_not_recorded() -> None:
    bench = Bench(batch_slots=2)
    bench.tell(ev.BatchFound("j", 6, WALL + bench.now))
    read = bench.one(do.ReadItems)
    bench.tell(ev.BatchItems("j", read.run, tuple((n, n // 3) for n in range(6)), (0, 5), False))
    tickets = []
    while begun := bench.all(do.RunItem):
        tickets.append(begun[0].ticket)
        ended(bench, tickets[-1])
    assert len(tickets) == 2
    bench.tell(ev.BatchRecorded("j", (tickets[0],), 1, 0))
    assert bench.one(do.RunItem)


def test_the_answer_to_a_read_that_was_given_up_counts_for_nothing() -> None:
    """It may come beside that to the read after it, with the same items."""
    bench = Bench(batch_slots=2)
    bench.tell(ev.BatchFound("j", 6, WALL + bench.now))
    slow = bench.one(do.ReadItems)
    bench.tell(ev.BatchStoreFailed(errors.InternalError("a bad sector")))
    bench.tell(ev.BatchStoreWorks())
    read = bench.one(do.ReadItems)
    page = tuple((n, 0) for n in range(4))
    bench.tell(ev.BatchItems("j", slow.run, page, (0, 3), True))
    assert ran(bench) == []
    bench.tell(ev.BatchItems("j", read.run, page, (0, 3), True))
    assert ran(bench) == [("j", 0), ("j", 1)]


def test_only_failures_in_a_row_count() -> None:
    """Each wait is twice the one before, until something went well."""
    bench = Bench(batch_slots=1, batch_retry_s=0.0)
    job(bench)
    for waits in ((0.5, 1.0), (0.5, 1.0)):
        for wait in waits:
            ended(bench, bench.one(do.RunItem).ticket, errors.ModelNotFound("gone"), began=False)
            assert bench.core.next_deadline() == bench.now + wait
            bench.now += wait
            bench.tell(ev.Tick())
        ticket = bench.one(do.RunItem).ticket
        ended(bench, ticket)
        bench.tell(ev.BatchRecorded("j", (ticket,), 1, 0))
    assert bench.job("j").state == "running"


def test_nothing_begins_while_another_daemon_may_have_the_file() -> None:
    bench = Bench(batch_slots=1)
    job(bench)
    (ticket,) = (run.ticket for run in bench.all(do.RunItem))
    bench.tell(ev.Hold())
    ended(bench, ticket, errors.ModelBusy("later", yielded=True))
    assert not bench.all(do.RunItem)
    assert bench.core.let_go
    bench.tell(ev.GoOn())
    assert ran(bench) == [("j", 0)]


def test_the_file_is_let_go_once_all_is_recorded() -> None:
    bench = Bench(batch_slots=1)
    job(bench)
    ticket = bench.one(do.RunItem).ticket
    bench.tell(ev.Hold())
    ended(bench, ticket)
    assert not bench.core.let_go
    bench.tell(ev.BatchRecorded("j", (ticket,), 1, 0))
    assert bench.core.let_go


def test_jobs_whose_file_is_lost_have_failed() -> None:
    bench = Bench(batch_slots=2)
    bench.tell(ev.BatchFound("old", 1, WALL, state="done", done=1, ended_at=WALL + bench.now))
    job(bench)
    tickets = [run.ticket for run in bench.all(do.RunItem)]
    bench.tell(ev.BatchLost(errors.InternalError("damaged")))
    assert [action.ticket for action in bench.all(do.CancelItem)] == tickets
    lost = bench.job("j")
    assert (lost.state, lost.ended_at, lost.error is not None and lost.error.kind) == (
        "failed", WALL + bench.now, "internal_error",
    )  # fmt: skip
    assert list(bench.core.jobs) == ["j"]
    bench.tell(ev.BatchGone("j"))
    assert not bench.core.jobs


def test_what_is_about_to_end_does_not_begin() -> None:
    """It was recorded as started, and its end comes after that: it would run on with nobody to record it."""
    bench = Bench(batch_slots=2)
    bench.tell(ev.BatchFound("j", 2, WALL + bench.now, open=True, state="queued"))
    bench.tell(ev.CancelJob("j"))
    assert bench.one(do.EndBatch).state == "cancelled"
    bench.tell(ev.BatchStarted("j", WALL + bench.now))
    assert not bench.all(do.ReadItems)
    bench.tell(ev.BatchRecorded("j", (), 0, 0, "cancelled", WALL + bench.now))
    assert bench.job("j").state == "cancelled"
    bench.tell(ev.BatchStarted("j", WALL + bench.now))
    assert bench.one(do.ReadItems).after == (0, -1)


def test_progress_is_told_now_and_then() -> None:
    bench = Bench(batch_slots=1)
    job(bench, items=50)
    told: list[do.Publish] = []
    for done in range(1, 21):
        ticket = bench.one(do.RunItem).ticket
        bench.now += PROGRESS_S / 5
        ended(bench, ticket)
        run = bench.all(do.RunItem)
        told += bench.all(do.Publish)
        bench.tell(ev.BatchRecorded("j", (ticket,), done, 0))
        told += bench.all(do.Publish)
        bench.said = [*run, *bench.said]
    assert 3 <= len(told) <= 5
    bench.now += PROGRESS_S
    bench.tell(ev.Tick())
    assert bench.job("j").done_items == 20


def test_what_has_ended_is_kept_for_a_while() -> None:
    bench = Bench(batch_keep_s=100.0)
    facts = {"state": "done", "done": 1, "ended_at": WALL + bench.now}
    bench.tell(ev.BatchFound("old", 1, WALL, **facts))  # type: ignore[arg-type]
    assert bench.core.next_deadline() == bench.now + 100.0
    bench.now += 100.0
    bench.tell(ev.Tick())
    assert bench.one(do.DeleteBatch).job == "old"
    bench.tell(ev.BatchGone("old"))
    assert "old" not in bench.core.jobs


def test_so_many_that_have_ended_are_kept() -> None:
    """The first of them goes, and none while another daemon may have the file."""
    bench = Bench()
    bench.tell(ev.Hold())
    for number in range(ENDED_BATCHES_KEPT + 1):
        facts = {"state": "done", "done": 1, "ended_at": WALL + bench.now}
        bench.tell(ev.BatchFound(f"old-{number}", 1, WALL, **facts))  # type: ignore[arg-type]
        assert not bench.all(do.DeleteBatch)
    bench.tell(ev.GoOn())
    assert bench.one(do.DeleteBatch).job == "old-0"


def test_what_works_and_fails_in_turn_is_tried_less_and_less() -> None:
    """Where there is nothing to record, only the next reading shows whether it works."""
    bench = Bench(batch_slots=1)
    bench.tell(ev.BatchFound("j", 2, WALL + bench.now))
    for wait in (0.5, 1.0, 2.0):
        assert bench.one(do.ReadItems)
        bench.tell(ev.BatchStoreFailed(errors.InternalError("a bad sector")))
        assert bench.core.next_deadline() == bench.now + wait
        bench.now += wait
        bench.tell(ev.Tick())
        assert bench.all(do.WriteAgain)
        bench.tell(ev.BatchStoreWorks())
    bench.tell(ev.BatchItems("j", bench.one(do.ReadItems).run, ((0, 0),), (0, 0), True))
    bench.tell(ev.BatchStoreFailed(errors.InternalError("another")))
    assert bench.core.next_deadline() == bench.now + 0.5


def test_nothing_begins_while_nothing_can_be_recorded() -> None:
    bench = Bench(batch_slots=1)
    job(bench)
    ticket = bench.one(do.RunItem).ticket
    ended(bench, ticket)
    full = errors.InsufficientDisk("full")
    bench.tell(ev.BatchStoreFailed(full))
    view = bench.job("j")
    assert (view.phase, view.error is not None and view.error.kind) == ("waiting", "insufficient_disk")
    for wait in (0.5, 1.0, 2.0):
        bench.now += wait
        bench.tell(ev.Tick())
        assert bench.all(do.WriteAgain)
        bench.tell(ev.BatchStoreFailed(full))
    bench.tell(ev.BatchStoreWorks())
    bench.tell(ev.BatchRecorded("j", (ticket,), 1, 0))
    assert bench.job("j").error is None
