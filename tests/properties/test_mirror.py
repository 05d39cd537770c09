"""The mirror: a snapshot and the events after it equal the state that made them, whatever happened in between."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mlxd_client.mirror import Mirror
from mlxd_client.types import Event, Job, Model, Snapshot

IDS = st.sampled_from(["a/a", "b/b", "c/c"])
MODELS = st.builds(
    Model,
    id=IDS,
    state=st.sampled_from(["NotDownloaded", "Downloading", "Downloaded", "Loading", "Ready"]),
    source=st.just("hub"),
    active=st.integers(0, 3),
)
JOBS = st.builds(
    Job,
    job=st.sampled_from(["1", "2", "3"]),
    kind=st.just("download"),
    state=st.sampled_from(["queued", "running", "done", "failed", "cancelled"]),
)
CHANGES = st.one_of(
    st.tuples(st.sampled_from(["loading_started", "unloaded", "queue", "error", "deleted", "model_found"]), MODELS),
    st.tuples(st.just("model_lost"), IDS),
    st.tuples(st.just("job"), JOBS),
    st.tuples(st.sampled_from(["lagged", "resync", "daemon_stopping", "of_the_future"]), st.none()),
    st.tuples(st.just("memory_pressure"), st.sampled_from(["normal", "warning", "critical"])),
)


class Source:
    """The state as a daemon holds it, changed without the reducer's rules."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.jobs: dict[str, Job] = {}
        self.stopping = False
        self.pressure = "normal"
        self.rev = 0

    def snapshot(self) -> Snapshot:
        live = [job for job in self.jobs.values() if job.state in ("queued", "running")]
        return Snapshot(
            models=sorted(self.models.values(), key=lambda model: model.id),
            jobs=sorted(live, key=lambda job: job.job),
            stopping=self.stopping,
            memory_pressure=self.pressure,
        )

    def change(self, name: str, what: Any) -> Event:
        fields: dict[str, Any] = {}
        if isinstance(what, Model):
            self.models[what.id] = what
            fields = {"model": what, "model_id": what.id}
        elif isinstance(what, Job):
            self.jobs[what.job] = what
            fields = {"job": what}
        elif name == "model_lost":
            self.models.pop(what, None)
            fields = {"model_id": what}
        elif name == "daemon_stopping":
            self.stopping = True
        elif name == "memory_pressure":
            self.pressure = what
            fields = {"details": {"level": what}}
        elif name in ("lagged", "resync"):
            fields = {"snapshot": self.snapshot(), "dropped": 2}
        self.rev += 1
        return Event(subscription=1, rev=self.rev, name=name, at=0.0, **fields)


@given(st.lists(CHANGES, max_size=30), st.integers(0, 30))
def test_snapshot_plus_events_is_the_state(changes: list[tuple[str, Any]], joined: int) -> None:
    source, mirror = Source(), None
    for number, (name, what) in enumerate(changes):
        if number == min(joined, len(changes) - 1):
            mirror = Mirror(source.snapshot())
        event = source.change(name, what)
        if mirror is not None:
            mirror.apply(event)
            assert mirror.snapshot() == source.snapshot()


@given(st.lists(CHANGES, max_size=10), st.lists(CHANGES, max_size=10), st.lists(CHANGES, max_size=10))
def test_what_was_missed_is_made_good_by_a_snapshot(before: Any, missed: Any, after: Any) -> None:
    source, mirror = Source(), Mirror()
    for change in before:
        mirror.apply(source.change(*change))
    for change in missed:
        source.change(*change)
    mirror.apply(source.change("lagged", None))
    for change in after:
        mirror.apply(source.change(*change))
    assert mirror.snapshot() == source.snapshot()


@given(st.lists(CHANGES, min_size=1, max_size=20))
def test_what_was_taken_out_stays_as_it_was(changes: list[tuple[str, Any]]) -> None:
    source, mirror = Source(), Mirror()
    for change in changes:
        held = dict(mirror.models)
        before = copy.deepcopy(held)
        mirror.apply(source.change(*change))
        assert held == before


def test_a_lost_model_may_be_named_by_its_last_state() -> None:
    gone = Model(id="a/a", state="NotDownloaded", source="hub")
    mirror = Mirror(Snapshot(models=[gone]))
    mirror.apply(Event(subscription=1, rev=1, name="model_lost", at=0.0, model=gone))
    assert mirror.models == {}
    mirror.apply(Event(subscription=1, rev=2, name="daemon_stopping", at=0.0))
    assert mirror.stopping
