"""The law of the event log: a subscriber's snapshot plus its events equals the state that it may see.

Random changes; readers with random filters that read now and then, lag, leave and resume. Small bounds, so that
overflow and forgotten revisions happen all the time.
"""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from mlxd.server.events import EventLog, Subscription
from mlxd.server.limits import ServerLimits
from mlxd_client import codec
from mlxd_client.codec import Encoding
from mlxd_client.mirror import Mirror
from mlxd_client.types import (
    UNSET,
    ErrorObject,
    Event,
    Job,
    Model,
    Since,
    Snapshot,
    SubscribeParams,
    SubscribeResult,
)
from support.mirrors import may_see

LIMITS = ServerLimits(subscriber_events=6, subscriber_bytes=4000, ring_events=12)
MODELS = ("a", "b", "c")
JOBS = ("j1", "j2")
# Topic sets whose events keep all the state true that they show.
TOPICS = st.sampled_from(
    [None, ["models"], ["models", "queue"], ["models", "jobs"], ["jobs"], ["system"], ["models", "queue", "generation"]]
)
FILTERS = st.one_of(st.none(), st.lists(st.sampled_from(MODELS), min_size=1, unique=True))
LIFECYCLE = st.sampled_from(
    [
        ("model_found", "Downloaded"),
        ("download_progress", "Downloading"),
        ("loading_started", "Loading"),
        ("loading_progress", "Loading"),
        ("loading_completed", "Ready"),
        ("unloaded", "Downloaded"),
        ("worker_died", "Downloaded"),
    ]
)


class Follower:
    """What a client does: applies its answer and its events to a mirror, and remembers where it is."""

    def __init__(self, topics: list[str] | None, models: list[str] | None, encoding: Encoding) -> None:
        self.topics = topics
        self.models = models
        self.encoding = encoding
        self.mirror = Mirror()
        self.since: Since | None = None
        self.sub: Subscription | None = None
        self.decoder = codec.Decoder(encoding)

    def params(self) -> SubscribeParams:
        return SubscribeParams(
            topics=self.topics if self.topics is not None else UNSET,
            models=self.models if self.models is not None else UNSET,
            since=self.since if self.since is not None else UNSET,
        )

    def answered(self, answer: SubscribeResult) -> None:
        if answer.snapshot is not None:
            self.mirror.replace(answer.snapshot)
        else:
            assert self.since is not None
            assert answer.rev == self.since.rev
        self.since = Since(epoch=answer.epoch, rev=answer.rev)

    def read(self, limit: int) -> None:
        assert self.sub is not None
        self.decoder.feed(self.sub.take(limit))
        for message in self.decoder:
            assert isinstance(message, dict)
            event = msgspec.convert(message["params"], Event)
            assert self.since is not None
            assert event.rev > self.since.rev
            self.since = Since(epoch=self.since.epoch, rev=event.rev)
            self.mirror.apply(event)

    def may_see(self, state: Snapshot) -> Snapshot:
        return may_see(state, self.topics, self.models)


class EventLaw(RuleBasedStateMachine):
    followers = Bundle("followers")
    left = Bundle("left")

    def __init__(self) -> None:
        super().__init__()
        self.models = {"a": Model(id="a", state="Downloaded", source="hub")}
        self.jobs: dict[str, Job] = {}
        self.stopping = False
        self.pressure: Any = "normal"
        self.log = EventLog("e", self.state, clock=lambda: 0.0, limits=LIMITS)
        self.connected: list[Follower] = []

    def state(self) -> Snapshot:
        return Snapshot(
            models=[self.models[id] for id in sorted(self.models)],
            jobs=[self.jobs[id] for id in sorted(self.jobs)],
            stopping=self.stopping,
            memory_pressure=self.pressure,
        )

    # --- the daemon -----------------------------------------------------------------------------------------------

    @rule(id=st.sampled_from(MODELS), step=LIFECYCLE, memory=st.integers(1, 9), progress=st.floats(0, 1))
    def a_model_changes(self, id: str, step: tuple[str, Any], memory: int, progress: float) -> None:
        name, state = step
        error = ErrorObject(kind="worker_died", message="x") if name == "worker_died" else None
        self.models[id] = Model(id=id, state=state, source="hub", error=error)
        self.models[id].memory_bytes = memory if state == "Ready" else None
        self.log.publish(name, model=self.models[id], progress=progress, error=error)
        # Activity fields changed too; that is what `queue` tells.
        self.log.publish("queue", model=self.models[id])

    @rule(id=st.sampled_from(MODELS), active=st.integers(0, 3), waiting=st.integers(0, 3))
    def a_queue_moves(self, id: str, active: int, waiting: int) -> None:
        if id in self.models:
            self.models[id] = msgspec.structs.replace(self.models[id], active=active, waiting=waiting)
            self.log.publish("queue", model=self.models[id])

    @rule(id=st.sampled_from(MODELS))
    def a_model_is_lost(self, id: str) -> None:
        if self.models.pop(id, None) is not None:
            self.log.publish("model_lost", model_id=id)

    @rule(id=st.sampled_from(JOBS), progress=st.floats(0, 1), with_progress=st.booleans())
    def a_job_moves(self, id: str, progress: float, with_progress: bool) -> None:
        self.jobs[id] = Job(job=id, kind="load", state="running", model=MODELS[int(id[1])], progress=progress)
        if with_progress:  # one event may tell of both
            model = Model(id=MODELS[int(id[1])], state="Loading", source="hub")
            self.models[model.id] = model
            self.log.publish("loading_progress", model=model, job=self.jobs[id])
            self.log.publish("queue", model=model)
        self.log.publish("job", job=self.jobs[id])

    @rule(id=st.sampled_from(JOBS), how=st.sampled_from(["done", "failed", "cancelled"]))
    def a_job_ends(self, id: str, how: Any) -> None:
        job = self.jobs.pop(id, None)
        if job is not None:
            self.log.publish("job", job=msgspec.structs.replace(job, state=how))

    @rule()
    def something_without_state_happens(self) -> None:
        self.log.publish("generation_finished", model_id="a", request="c1:1")

    @rule(pressure=st.sampled_from([None, "normal", "warning", "critical"]))
    def the_system_speaks(self, pressure: str | None) -> None:
        if pressure is None:
            self.stopping = True
            self.log.publish("daemon_stopping")
        else:
            self.pressure = pressure
            self.log.publish("memory_pressure", details={"level": pressure})

    # --- the clients ----------------------------------------------------------------------------------------------

    def _connect(self, follower: Follower) -> None:
        follower.decoder = codec.Decoder(follower.encoding)
        number = len(self.connected) % 2 + 1
        follower.sub, answer = self.log.subscribe(number, follower.encoding, follower.params(), lambda: None)
        follower.answered(answer)
        self.connected.append(follower)

    @rule(target=followers, topics=TOPICS, models=FILTERS, encoding=st.sampled_from(list(Encoding)))
    def one_subscribes(self, topics: Any, models: Any, encoding: Encoding) -> Any:
        if len(self.connected) >= 5:
            return multiple()
        follower = Follower(topics, models, encoding)
        self._connect(follower)
        return follower

    @rule(follower=followers, limit=st.sampled_from([1, 300, 2000]))
    def one_reads_a_little(self, follower: Follower, limit: int) -> None:
        follower.read(limit)

    @rule(follower=followers)
    def one_catches_up(self, follower: Follower) -> None:
        while follower.sub is not None and follower.sub.waiting:
            follower.read(500)
        assert follower.mirror.snapshot() == follower.may_see(self.state())

    @rule(target=left, follower=consumes(followers))
    def one_leaves(self, follower: Follower) -> Follower:
        assert follower.sub is not None
        self.log.unsubscribe(follower.sub)
        self.connected.remove(follower)
        return follower

    @rule(target=followers, follower=consumes(left), restarted=st.booleans())
    def one_comes_back(self, follower: Follower, restarted: bool) -> Follower:
        if restarted:
            follower.since = Since(epoch="another", rev=follower.since.rev if follower.since else 0)
        self._connect(follower)
        return follower

    # --- the bounds -----------------------------------------------------------------------------------------------

    @invariant()
    def queues_are_bounded(self) -> None:
        assert self.log.subscribers == len(self.connected)
        assert len(self.log._ring) <= LIMITS.ring_events
        for follower in self.connected:
            sub = follower.sub
            assert sub is not None
            assert len(sub._queue) <= LIMITS.subscriber_events
            assert sub._bytes == sum(len(entry.frame) for entry in sub._queue.values()) <= LIMITS.subscriber_bytes

    def teardown(self) -> None:
        for follower in self.connected:
            while follower.sub is not None and follower.sub.waiting:
                follower.read(10_000)
            assert follower.mirror.snapshot() == follower.may_see(self.state())


TestEventLaw = EventLaw.TestCase
TestEventLaw.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
