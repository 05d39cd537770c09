"""The event log: numbers, filters, resuming, coalescing, overflow; alone and through a socket."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from mlxd.server.events import EventLog, Subscription
from mlxd.server.limits import ServerLimits
from mlxd_client import codec, errors
from mlxd_client.codec import Encoding
from mlxd_client.types import ErrorObject, Event, Job, Model, Since, Snapshot, SubscribeParams, SubscribeResult
from support.loops import run
from support.serving import serving

both = pytest.mark.parametrize("encoding", list(Encoding))
A = Model(id="a", state="Ready", source="hub", memory_bytes=5, active=2)
B = Model(id="b", state="Loading", source="hub")
JOB = Job(job="j1", kind="load", state="running", model="a")


class Reader:
    def __init__(self, log: EventLog, encoding: Encoding = Encoding.MSGPACK, **params: Any) -> None:
        self.wakes = 0
        self.decoder = codec.Decoder(encoding)
        self.sub: Subscription
        self.answer: SubscribeResult
        self.sub, self.answer = log.subscribe(1, encoding, SubscribeParams(**params), self._wake)

    def _wake(self) -> None:
        self.wakes += 1

    def events(self, limit: int = 1 << 20) -> list[Event]:
        self.decoder.feed(self.sub.take(limit))
        return [msgspec.convert(message["params"], Event) for message in self.decoder if isinstance(message, dict)]

    def names(self) -> list[str]:
        return [event.name for event in self.events()]


def _log(snapshot: Snapshot | None = None, **limits: Any) -> EventLog:
    state = snapshot or Snapshot(models=[A, B], jobs=[JOB])
    return EventLog("e1", lambda: state, clock=lambda: 7.0, limits=ServerLimits(**limits))


@both
def test_events_are_numbered_and_complete(encoding: Encoding) -> None:
    log = _log()
    assert log.publish("unloaded", model=B) == 1
    reader = Reader(log, encoding)
    assert (reader.answer.epoch, reader.answer.rev, reader.answer.resync) == ("e1", 1, False)
    assert reader.answer.snapshot == Snapshot(models=[A, B], jobs=[JOB])
    error = ErrorObject(kind="load_failed", message="no")
    log.publish("error", model=A, job=JOB, error=error, details={"x": 1})
    log.publish("generation_started", model_id="a", request="c1:2")
    first, second = reader.events()
    assert first == Event(
        subscription=1, rev=2, name="error", at=7.0, model_id="a", model=A, job=JOB, error=error, details={"x": 1}
    )
    assert (second.rev, second.model_id, second.request) == (3, "a", "c1:2")
    assert reader.wakes == 2
    with pytest.raises(KeyError):
        log.publish("nonsense")


def test_topics_names_and_models_filter() -> None:
    log = _log()
    readers = {
        "models": Reader(log, topics=["models"]),
        "one name": Reader(log, topics=["unloaded", "system"]),
        "model b": Reader(log, models=["b"]),
        "jobs of a": Reader(log, topics=["jobs"], models=["a"]),
    }
    log.publish("unloaded", model=A)
    log.publish("loading_completed", model=B)
    log.publish("queue", model=B)
    log.publish("job", job=JOB)
    log.publish("job", job=Job(job="j2", kind="batch", state="running"))
    log.publish("memory_pressure")
    assert {which: reader.names() for which, reader in readers.items()} == {
        "models": ["unloaded", "loading_completed"],
        "one name": ["unloaded", "memory_pressure"],
        "model b": ["loading_completed", "queue", "memory_pressure"],
        "jobs of a": ["job"],
    }
    with pytest.raises(errors.InvalidParams, match="no topic"):
        Reader(log, topics=["models", "moddels"])
    assert log.subscribers == 4
    for reader in readers.values():
        log.unsubscribe(reader.sub)
        log.unsubscribe(reader.sub)
    assert log.subscribers == 0


def test_only_state_that_the_topics_keep_true_is_shown() -> None:
    log = _log(Snapshot(models=[A], jobs=[JOB], stopping=True))
    idle = Model(id="a", state="Ready", source="hub")
    for topics, expected in [
        (["models"], Snapshot(models=[idle])),
        (["models", "queue"], Snapshot(models=[A])),
        (["jobs"], Snapshot(jobs=[JOB])),
        (["system"], Snapshot(stopping=True)),
        (["loading_completed"], Snapshot(models=[idle])),
    ]:
        assert Reader(log, topics=topics).answer.snapshot == expected
    models, jobs = Reader(log, topics=["models"]), Reader(log, topics=["jobs"])
    log.publish("loading_completed", model=A, job=JOB)
    log.publish("job", model=A, job=JOB)
    (seen,) = models.events()
    assert (seen.model, seen.job, seen.model_id) == (idle, None, "a")
    (seen,) = jobs.events()
    assert (seen.model, seen.job) == (None, JOB)


def test_resuming() -> None:
    log = _log(ring_events=3)
    for _ in range(5):
        log.publish("unloaded", model=A)
    resumed = Reader(log, since=Since(epoch="e1", rev=3))
    assert (resumed.answer.rev, resumed.answer.snapshot, resumed.answer.resync) == (3, None, False)
    assert [event.rev for event in resumed.events()] == [4, 5]
    now = Reader(log, since=Since(epoch="e1", rev=5))
    assert (now.answer.snapshot, now.events()) == (None, [])
    assert Reader(log, since=Since(epoch="e1", rev=2)).answer.snapshot is None
    for since in (Since(epoch="e1", rev=1), Since(epoch="e0", rev=4), Since(epoch="e1", rev=6)):
        reader = Reader(log, since=since)
        assert (reader.answer.resync, reader.answer.rev) == (True, 5)
        assert reader.answer.snapshot is not None
        assert reader.events() == []


def test_the_ring_is_bounded_in_bytes() -> None:
    log = _log(ring_bytes=100_000)
    for _ in range(100):
        log.publish("error", model=A, details={"words": "x" * 10_000})
    assert log._ring_bytes <= 100_000
    assert 5 <= len(log._ring) <= 10


def test_a_replay_too_large_to_queue_is_a_resync() -> None:
    log = _log(subscriber_events=5)
    for _ in range(6):
        log.publish("unloaded", model=A)
    reader = Reader(log, since=Since(epoch="e1", rev=0))
    assert reader.answer.resync
    assert reader.events() == []


def test_waiting_progress_is_replaced_by_newer() -> None:
    log = _log()
    reader = Reader(log)
    for step in range(100):
        log.publish("loading_progress", model=B, progress=step / 100)
        log.publish("queue", model=A)
    log.publish("loading_progress", model=A, progress=0.5)
    log.publish("unloaded", model=A)
    seen = reader.events()
    assert [(event.name, event.model_id, event.progress) for event in seen] == [
        ("loading_progress", "b", 0.99),
        ("queue", "a", None),
        ("loading_progress", "a", 0.5),
        ("unloaded", "a", None),
    ]
    assert [event.rev for event in seen] == sorted(event.rev for event in seen)


def test_progress_that_says_less_replaces_nothing() -> None:
    log = _log()
    reader = Reader(log)
    log.publish("download_progress", model=B, job=JOB)
    log.publish("download_progress", model=B)
    log.publish("download_progress", model_id="b")
    assert [event.rev for event in reader.events()] == [1, 2, 3]


def test_overflow_is_announced_with_a_fresh_snapshot() -> None:
    log = _log(subscriber_events=3)
    slow, quick = Reader(log), Reader(log)
    for _ in range(10):
        log.publish("unloaded", model=B)
        assert len(quick.events()) == 1
    (lagged,) = slow.events()
    assert (lagged.name, lagged.rev, lagged.dropped) == ("lagged", 10, 10)
    assert lagged.snapshot == Snapshot(models=[A, B], jobs=[JOB])
    assert (log.dropped, log.lagged) == (10, 1)  # as the statistics tell
    log.publish("unloaded", model=B)
    assert [event.rev for event in slow.events()] == [11]


def test_overflow_in_bytes() -> None:
    log = _log(subscriber_bytes=10_000)
    reader = Reader(log)
    for _ in range(30):
        log.publish("error", model=A, details={"words": "x" * 1000})
    (lagged,) = reader.events()
    assert lagged.dropped == 30


def test_taking_in_chunks() -> None:
    log = _log()
    reader = Reader(log)
    for _ in range(10):
        log.publish("unloaded", model=A)
    revs = [event.rev for event in reader.events(1)]
    assert revs == [1]
    while reader.sub.waiting:
        revs += [event.rev for event in reader.events(300)]
    assert revs == list(range(1, 11))
    assert reader.sub.take(1) == b""


# --- through a socket ---------------------------------------------------------------------------------------------


@both
def test_the_answer_precedes_the_first_event(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            served.runtime.change(A)
            client = await served.connect(encoding)
            client.request("events.subscribe", {"since": {"epoch": "epoch-1", "rev": 0}}, id="s")
            answer = await client.next()
            assert answer["result"] == {"subscription": 1, "epoch": "epoch-1", "rev": 0}
            event = await client.next()
            assert event["method"] == "event"
            assert (event["params"]["rev"], event["params"]["model"]["id"]) == (1, "a")
            assert await client.call("events.unsubscribe", subscription=1) == {}
            served.runtime.change(B)
            assert await client.call("ping") == {}
            assert client.parked == []

    run(main())


@both
def test_several_subscriptions_on_one_connection(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving(ServerLimits(subscriptions=2)) as served:
            client = await served.connect(encoding)
            assert (await client.call("events.subscribe", topics=["models"]))["subscription"] == 1
            assert (await client.call("events.subscribe", models=["a"]))["subscription"] == 2
            assert (await client.refused("events.subscribe"))["data"]["kind"] == "queue_full"
            served.runtime.change(A)
            assert [(await client.next())["params"]["subscription"] for _ in range(2)] == [1, 2]
            status = await client.call("status")
            assert status["subscribers"] == 2

    run(main())


@both
def test_a_subscriber_that_does_not_read_lags_and_slows_nobody(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving(ServerLimits(subscriber_events=64)) as served:
            slow, quick = await served.connect(encoding), await served.connect(encoding)
            await slow.call("events.subscribe")
            await quick.call("events.subscribe")
            slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
            padding = {"words": "x" * 5000}
            for number in range(600):
                served.runtime.change(B, "error", details=padding)
                event = await quick.next()
                assert event["params"]["rev"] == number + 1
            slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
            revs: list[int] = []
            while (event := (await slow.next())["params"])["name"] != "lagged":
                revs.append(event["rev"])
            assert revs == list(range(1, len(revs) + 1))
            assert len(revs) + event["dropped"] == 600
            assert event["rev"] == 600
            assert {model["id"] for model in event["snapshot"]["models"]} == {"fake/model", "b"}
            served.runtime.change(A)
            assert (await slow.next())["params"]["rev"] == 601

    run(main())


def test_a_subscriber_that_never_reads_is_closed() -> None:
    async def main() -> None:
        async with serving(ServerLimits(write_stall_s=0.2, subscriber_events=64)) as served:
            client = await served.connect()
            await client.call("events.subscribe")
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            for _ in range(600):
                served.runtime.change(B, "error", details={"words": "x" * 5000})
                await asyncio.sleep(0)
            assert await served.runtime.gone.get() == 1
            assert served.server.subscribers == 0

    run(main())


def test_who_finished_writing_still_hears_events() -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(Encoding.JSON)
            client.request("events.subscribe")
            client.writer.write_eof()
            await client.next()
            served.runtime.change(A)
            assert (await client.next())["params"]["name"] == "loading_completed"

    run(main())
