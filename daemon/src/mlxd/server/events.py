"""The numbered event log, and the subscriptions that read it.

The law: a subscription's snapshot plus its deltas equals the state it may see, or it is told to start again (`resync`
in its answer, `lagged` with a fresh snapshot later). Every queue is bounded: the ring that `since` reads from forgets
its oldest; a subscription's queue keeps only the newest progress, and on overflow drops everything and says so.
Publishing never waits for anybody. All of it runs on the event loop's thread; nothing here does I/O.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec

from mlxd_client import codec, errors
from mlxd_client.types import (
    ACTIVITY_FIELDS,
    EVENT_TOPICS,
    TOPICS,
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

from .limits import ServerLimits

__all__ = ["EventLog", "Subscription"]

_ACTIVITY_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in msgspec.structs.fields(Model) if field.name in ACTIVITY_FIELDS
}
# Where the newest says all that the older ones said: they may replace each other while they wait.
_COALESCING = frozenset(name for name in EVENT_TOPICS if name.endswith("_progress") or name == "queue")
_MODEL_TOPICS = frozenset(("models", "queue", "generation"))
_RECORD_BYTES = 640  # what a record with a model and a job costs in memory, about


class _Record(msgspec.Struct, gc=False):
    """One event as it happened, for nobody in particular. Never changed once published."""

    rev: int
    name: str
    at: float
    model_id: str | None
    progress: float | None
    error: ErrorObject | None
    model: Model | None
    job: Job | None
    request: str | None
    details: dict[str, Any] | None
    size: int


class _View(NamedTuple):
    """Which state a subscription's topics can keep true, and so which it gets to see."""

    models: bool
    activity: bool
    jobs: bool
    stopping: bool
    pressure: bool

    @classmethod
    def of(cls, names: frozenset[str]) -> _View:
        return cls(
            models=any(EVENT_TOPICS[name] in _MODEL_TOPICS for name in names),
            activity="queue" in names,
            jobs="job" in names,
            stopping="daemon_stopping" in names,
            pressure="memory_pressure" in names,
        )

    def model(self, model: Model | None) -> Model | None:
        if model is None or not self.models:
            return None
        return model if self.activity else msgspec.structs.replace(model, **_ACTIVITY_DEFAULTS)


class _Waiting(NamedTuple):
    frame: bytes
    record: _Record


class Subscription:
    """One reader of the log. Its frames wait here until its connection takes them.

    Attributes:
        id: unique on its connection only, so that equal subscriptions of many connections share their encoded frames.
    """

    __slots__ = (
        "_bytes",
        "_dropped",
        "_lagging",
        "_log",
        "_newest",
        "_queue",
        "encoding",
        "id",
        "models",
        "names",
        "variant",
        "view",
        "wake",
    )

    def __init__(
        self,
        log: EventLog,
        number: int,
        encoding: codec.Encoding,
        names: frozenset[str],
        models: frozenset[str] | None,
        wake: Callable[[], None],
    ) -> None:
        self.id = number
        self.encoding = encoding
        self.names = names
        self.models = models
        self.view = _View.of(names)
        # What its frames depend on. By the encoding's name, whose hash is known: its own is a call into Python.
        self.variant = (number, encoding.value, self.view)
        self.wake = wake
        self._log = log
        self._queue: OrderedDict[int, _Waiting] = OrderedDict()
        self._newest: dict[tuple[str, str | None], int] = {}
        self._bytes = 0
        self._dropped = 0
        self._lagging = False

    @property
    def waiting(self) -> bool:
        """Whether `take` has something to give."""
        return self._lagging or bool(self._queue)

    def matches(self, record: _Record) -> bool:
        """Whether the model filter lets it through; the name was matched before. What concerns no model always does."""
        models = self.models
        if models is None:
            return True
        if record.model_id is None:
            return record.name != "job"
        return record.model_id in models

    def take(self, limit: int) -> bytes:
        """The next frames, joined, until they exceed `limit` bytes; empty where none waits."""
        if len(self._queue) == 1 and not self._lagging:  # nearly always
            _, (frame, _) = self._queue.popitem()
            self._newest.clear()
            self._bytes = 0
            return frame
        frames: list[bytes] = []
        size = 0
        if self._lagging:
            frames.append(self._log._lagged_frame(self, self._dropped))
            self._lagging, self._dropped = False, 0
            size = len(frames[0])
        while self._queue and size < limit:
            rev, entry = self._queue.popitem(last=False)
            key = (entry.record.name, entry.record.model_id)
            if self._newest.get(key) == rev:
                del self._newest[key]
            frames.append(entry.frame)
            size += len(entry.frame)
            self._bytes -= len(entry.frame)
        return b"".join(frames)

    def _put(self, entry: _Waiting, limits: ServerLimits) -> None:
        if self._lagging:
            self._dropped += 1
            return
        frame, record = entry
        if record.name in _COALESCING:
            self._replace(record)
        self._queue[record.rev] = entry
        self._bytes += len(frame)
        if len(self._queue) > limits.subscriber_events or self._bytes > limits.subscriber_bytes:
            self._dropped += len(self._queue)
            self._log.dropped += len(self._queue)
            self._log.lagged += 1
            self._clear()
            self._lagging = True

    def _replace(self, record: _Record) -> None:
        """Forget an older waiting event of the same name and model, unless it says what this one does not."""
        key = (record.name, record.model_id)
        older = self._newest.get(key)
        self._newest[key] = record.rev
        if older is None:
            return
        entry = self._queue[older]
        if entry.record.model is not None and record.model is None:
            return
        if entry.record.job is not None and (record.job is None or record.job.job != entry.record.job.job):
            return
        del self._queue[older]
        self._bytes -= len(entry.frame)

    def _clear(self) -> None:
        self._queue.clear()
        self._newest.clear()
        self._bytes = 0


class EventLog:
    """Numbers events and hands them to whom they concern.

    Args:
        epoch: names this run of the daemon; a `since` of another epoch is a resync.
        snapshot: the state that all events published so far have led to. The runtime changes its state and publishes
            what changed without awaiting in between.
        clock: wall clock, Unix seconds.
    """

    def __init__(
        self,
        epoch: str,
        snapshot: Callable[[], Snapshot],
        *,
        clock: Callable[[], float] = time.time,
        limits: ServerLimits | None = None,
    ) -> None:
        self.epoch = epoch
        self.rev = 0
        self._snapshot = snapshot
        self._clock = clock
        self.limits = limits or ServerLimits()
        self._ring: deque[_Record] = deque()
        self._ring_bytes = 0
        self._readers: dict[str, list[Subscription]] = {name: [] for name in EVENT_TOPICS}
        self._count = 0
        self.dropped = self.lagged = 0  # events that were lost to full queues, and how often one was full

    @property
    def subscribers(self) -> int:
        return self._count

    def publish(
        self,
        name: str,
        *,
        model: Model | None = None,
        job: Job | None = None,
        model_id: str | None = None,
        progress: float | None = None,
        error: ErrorObject | None = None,
        request: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> int:
        """Append one event. `model` and `job` are the whole state after the change and must not be changed afterwards.

        Args:
            model_id: by default that of `model`, else that of `job`.
            request: the request's name (`c12:7`) for events of topic `generation`.

        Returns: the event's revision.
        Raises: KeyError for a name that EVENT_TOPICS does not hold.
        """
        readers = self._readers[name]
        if model_id is None:
            model_id = model.id if model is not None else job.model if job is not None else None
        self.rev = rev = self.rev + 1
        size = _RECORD_BYTES
        if error is not None or details is not None:
            size += len(msgspec.msgpack.encode((error, details)))
        record = _Record(rev, name, self._clock(), model_id, progress, error, model, job, request, details, size)
        self._remember(record)
        if readers:
            self._deliver(record, readers)
        return rev

    def subscribe(
        self,
        number: int,
        encoding: codec.Encoding,
        params: SubscribeParams,
        wake: Callable[[], None],
    ) -> tuple[Subscription, SubscribeResult]:
        """Start to collect events for one reader.

        Args:
            number: the subscription's id on its connection.
            wake: called when something waits; it must not call back into the log.

        Raises: errors.InvalidParams for a topic that does not exist.
        """
        names = _names(params.topics if params.topics is not UNSET else TOPICS)
        models = frozenset(params.models) if params.models is not UNSET else None
        sub = Subscription(self, number, encoding, names, models, wake)
        for name in names:
            self._readers[name].append(sub)
        self._count += 1
        since = params.since if params.since is not UNSET else None
        if since is not None and self._replay(sub, since):
            return sub, SubscribeResult(subscription=number, epoch=self.epoch, rev=since.rev)
        snapshot = self._visible(sub)
        return sub, SubscribeResult(
            subscription=number, epoch=self.epoch, rev=self.rev, snapshot=snapshot, resync=since is not None
        )

    def unsubscribe(self, sub: Subscription) -> None:
        """Stop; what waits is dropped. Idempotent."""
        found = False
        for name in sub.names:
            readers = self._readers[name]
            if sub in readers:
                readers.remove(sub)
                found = True
        self._count -= found
        sub._clear()
        sub._lagging = False

    # --- inside ---------------------------------------------------------------------------------------------------

    def _remember(self, record: _Record) -> None:
        ring, limits = self._ring, self.limits
        ring.append(record)
        self._ring_bytes += record.size
        while len(ring) > limits.ring_events or (self._ring_bytes > limits.ring_bytes and ring):
            self._ring_bytes -= ring.popleft().size

    def _deliver(self, record: _Record, readers: list[Subscription]) -> None:
        """Each variant is encoded once, however many subscriptions share it."""
        entries: dict[tuple[int, str, _View], _Waiting] = {}
        limits = self.limits
        for sub in readers:
            if sub.models is not None and not sub.matches(record):
                continue
            if sub._lagging:
                sub._dropped += 1
                self.dropped += 1
                continue
            entry = entries.get(sub.variant)
            if entry is None:
                entry = entries[sub.variant] = _Waiting(_encoded(record, sub), record)
            sub._put(entry, limits)
            sub.wake()

    def _replay(self, sub: Subscription, since: Since) -> bool:
        """Queue what happened after `since`. False where that is not known any more, or is too much to queue."""
        oldest = self._ring[0].rev if self._ring else self.rev + 1
        if since.epoch != self.epoch or not oldest - 1 <= since.rev <= self.rev:
            return False
        known = self.dropped, self.lagged
        for record in itertools.islice(self._ring, since.rev + 1 - oldest, None):
            if record.name in sub.names and sub.matches(record):
                sub._put(_Waiting(_encoded(record, sub), record), self.limits)
        if sub._lagging:
            sub._lagging, sub._dropped = False, 0
            self.dropped, self.lagged = known  # a resync loses nothing
            return False
        return True

    def _visible(self, sub: Subscription) -> Snapshot:
        """The state, cut down to what the subscription's filter lets through."""
        view, models, whole = sub.view, sub.models, self._snapshot()
        return Snapshot(
            models=[
                seen
                for model in whole.models
                if (models is None or model.id in models) and (seen := view.model(model)) is not None
            ],
            jobs=[job for job in whole.jobs if view.jobs and (models is None or job.model in models)],
            stopping=view.stopping and whole.stopping,
            memory_pressure=whole.memory_pressure if view.pressure else "normal",
        )

    def _lagged_frame(self, sub: Subscription, dropped: int) -> bytes:
        event = Event(
            subscription=sub.id,
            rev=self.rev,
            name="lagged",
            at=self._clock(),
            dropped=dropped,
            snapshot=self._visible(sub),
        )
        return _notification(event, sub.encoding)


def _names(topics: Iterable[str]) -> frozenset[str]:
    """Event names that topics and single names stand for."""
    names: set[str] = set()
    for topic in topics:
        if topic in EVENT_TOPICS:
            names.add(topic)
        if topic in TOPICS:
            names.update(name for name, of in EVENT_TOPICS.items() if of == topic)
        elif topic not in EVENT_TOPICS:
            known = ", ".join(sorted(TOPICS))
            raise errors.InvalidParams(
                f"there is no topic or event named {topic!r}; topics are {known}", field="topics", value=topic
            )
    return frozenset(names)


def _encoded(record: _Record, sub: Subscription) -> bytes:
    view = sub.view
    event = Event(
        subscription=sub.id,
        rev=record.rev,
        name=record.name,
        at=record.at,
        model_id=record.model_id,
        progress=record.progress,
        error=record.error,
        model=view.model(record.model),
        job=record.job if view.jobs else None,
        request=record.request,
        details=record.details,
    )
    return _notification(event, sub.encoding)


def _notification(event: Event, encoding: codec.Encoding) -> bytes:
    return codec.encode({"jsonrpc": "2.0", "method": "event", "params": event}, encoding)
