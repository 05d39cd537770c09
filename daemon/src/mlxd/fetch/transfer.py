"""All files of one download at once: who fetches what, what is tried again and when, and when it is enough.

Connections take segments, in the files' order; hashing threads follow each file's front. One lock guards all of it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from mlxd_client.errors import RpcError, VerificationFailed

from ..childwire import Fetch, Fetching
from ..store.layout import RepoCache
from .connection import receive
from .disk import disk_error
from .hashing import judge, read_front
from .http import Failure, Http, Unranged
from .hub import Hub
from .listing import File
from .pace import Failures, Flow, Limiter, delay_s
from .parts import Closed, Part, held
from .report import internal
from .segments import Segment
from .targets import State, Target

RATE_WINDOW_S = 3.0
BUSY_WAIT_S = 0.2  # until a part that another process holds is looked at again
HASHERS = 2
# A limited rate is shared by fewer connections, each of which gets at least this much.
RATE_PER_CONNECTION = 256 * 1024


class Transfer:
    """
    Args:
        order: what to fetch, and how.
        files: each oid once, in the order in which they are fetched.
        force: oids of files that are fetched although something of that name is there.
        known: contents that are in memory already, verified, by oid.
    """

    def __init__(
        self, order: Fetch, hub: Hub, http: Http, cache: RepoCache, commit: str, files: Sequence[File],
        force: Iterable[str] = (),
        known: Mapping[str, bytes] | None = None,
    ) -> None:  # fmt: skip
        self.order, self.cache, self.http = order, cache, http
        self._hub = hub
        self._repo = order.where.repo
        forced = frozenset(force)
        self._targets = [
            Target(
                file, hub.route(self._repo, file.name, commit), Failures(order.attempts), force=file.oid in forced,
                have=held(cache, file.oid, file.size),
            )
            for file in files
        ]  # fmt: skip
        self._known = known or {}
        self._live = list(self._targets)
        self._hashing: deque[Target] = deque()
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._error: RpcError | None = None
        self._connections = max(1, order.connections)
        if order.rate_bytes_s:
            self._connections = min(self._connections, max(1, order.rate_bytes_s // RATE_PER_CONNECTION))
        self._allowed = self._connections  # fewer where the line is too slow for all
        self._lowered = 0  # how often that was found
        self._busy = 0
        self.limiter = Limiter(order.rate_bytes_s)
        now = time.monotonic()
        self._rate, self._line = Flow(RATE_WINDOW_S, now), Flow(order.stall_s, now)
        self._fetched = 0

    # --- from outside

    def run(self) -> int:
        """Fetch everything. Returns how many bytes came over the network; raises what the wire knows."""
        for work, count in ((self._connect, self._connections), (self._hash, HASHERS)):
            for _ in range(count):
                threading.Thread(target=self._guarded, args=(work,), daemon=True).start()
        with self._changed:
            self._end_if_done()
        self._ended.wait()
        for target in self._targets:
            if target.part is not None:
                target.part.close()  # from here on nobody writes, and another process may
        if self._error is not None:
            raise self._error
        return self._fetched

    def progress(self) -> Fetching:
        with self._changed:
            now = time.monotonic()
            fetching = any(target.active or target.pending or target.state is State.WAITING for target in self._live)
            waiting = all(target.not_before > now for target in self._live if target.pending)
            phase = "downloading" if fetching else "verifying"
            if fetching and not self._busy and waiting and any(target.failures.count for target in self._live):
                phase = "retrying"
            return Fetching(
                phase=phase,
                done_bytes=sum(min(target.have, target.file.size) for target in self._targets),
                total_bytes=sum(target.file.size for target in self._targets),
                rate_bytes_s=self._rate.rate(now),
                fetched_bytes=self._fetched,
                attempts=1 + max((target.failures.count for target in self._targets), default=0),
            )

    # --- what connections do

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Closed:
            pass
        except RpcError as error:
            self._end(error)
        except OSError as error:  # the network's are Failures
            self._end(disk_error(error, self.cache, [target.file for target in self._live]))
        except BaseException as error:
            self._end(internal(error))

    def _connect(self) -> None:
        while (job := self._next()) is not None:
            target, segment = job
            if segment is None:
                self._open(target)
            else:
                self._fetch(target, segment)

    def _next(self) -> tuple[Target, Segment | None] | None:
        """What to do next, once there is something; None at the end."""
        with self._changed:
            while not self._ended.is_set():
                now = time.monotonic()
                if self._busy < self._allowed and (job := self._choose(now)) is not None:
                    self._busy += 1
                    return job
                due = [target.not_before - now for target in self._live if target.not_before > now]
                self._changed.wait(min(due) if due else None)
        return None

    def _choose(self, now: float) -> tuple[Target, Segment | None] | None:
        """1. a file that nobody has opened, unless enough are open; 2. a pending segment; 3. half of a large one."""
        opened = sum(target.part is not None for target in self._live)
        for target in self._live:
            if target.not_before > now:
                continue
            if target.state is State.WAITING and opened < 2 * self._connections:
                target.state = State.OPENING
                return target, None
            if target.state is State.OPEN and (segment := target.next_segment()) is not None:
                target.active.add(segment)
                return target, segment
        running = [(segment, target) for target in self._live if not target.serial for segment in target.active]
        if running and not any(target.pending for target in self._live):
            largest, target = max(running, key=lambda pair: pair[0].left)
            if (segment := largest.split()) is not None:
                target.active.add(segment)
                return target, segment
        return None

    def _open(self, target: Target) -> None:
        file, part = target.file, None
        there = not target.force and self.cache.has_blob(file.oid, file.size)
        if not there:
            part = Part.open(self.cache, file.oid, file.size)
            if part is not None and not target.force and self.cache.has_blob(file.oid, file.size):
                there = True  # another process was faster
                part.discard()
                part.close()
            elif part is not None and file.oid in self._known and 1 not in part.chunks:
                part.write([self._known[file.oid]], 0)
                part.mark(range(len(part.chunks)))
        with self._changed:
            self._busy -= 1
            if there:
                self._done(target)
            elif part is None:
                target.state, target.not_before = State.WAITING, time.monotonic() + BUSY_WAIT_S
                target.have = held(self.cache, file.oid, file.size)
            else:
                target.begin(part, self._connections)
                self.offer(target)
            self._changed.notify_all()

    def _fetch(self, target: Target, segment: Segment) -> None:
        epochs, failure, unranged = (target.epoch, self._lowered), None, False
        try:
            receive(self, target, segment)
        except Failure as error:
            failure = error
        except Unranged:
            unranged = True
        with self._changed:
            self._busy -= 1
            if failure is not None:
                self._failed(target, segment, epochs, failure)
            elif unranged:
                target.serial = True
                target.give_back(segment)
            else:
                target.active.discard(segment)
                self._allowed = min(self._connections, self._allowed + 1)
            if not target.active and not target.pending:
                target.state = State.WHOLE
                self.offer(target)
            self._changed.notify_all()

    def _failed(self, target: Target, segment: Segment, epochs: tuple[int, int], failure: Failure) -> None:
        """Count it, unless it began before another failure of the same cause: then it has been counted."""
        epoch, lowered = epochs
        target.give_back(segment)
        if not failure.retry:
            self._end(self._hub.explain(failure, target.file.name, self._repo, target.failures.count + 1))
        if failure.slow and lowered != self._lowered:
            return
        if failure.slow and self._is_shared():
            self._allowed = max(1, self._allowed // 2)
            self._lowered += 1
        elif epoch == target.epoch:
            target.epoch += 1
            target.failures.network()
            if target.failures.exhausted:
                self._end(self._hub.explain(failure, target.file.name, self._repo, target.failures.count))
            target.not_before = time.monotonic() + delay_s(target.failures.count, failure.retry_after_s)

    def _is_shared(self) -> bool:
        """Whether connections are slow only because there are so many: together they bring enough."""
        rate = self._line.rate(time.monotonic())
        return self._busy > 0 and self.order.floor_bytes_s <= rate < self.order.floor_bytes_s * (self._busy + 1)

    # --- what `receive` tells

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def wait(self, seconds: float) -> None:
        """Returns early at the end."""
        self._ended.wait(seconds)

    def came(self, count: int) -> None:
        """Bytes came over the network."""
        with self._changed:
            now = time.monotonic()
            self._rate.add(now, count)
            self._line.add(now, count)
            self._fetched += count

    def stored(self, target: Target, segment: Segment, count: int, fresh: int) -> range:
        """`count` bytes of the segment have been dealt with, `fresh` of which were missing. Returns the chunks that are
        complete with them."""
        with self._changed:
            target.have += fresh
            target.failures.brought(fresh)
            return segment.advance(count, target.file.size)

    def offer(self, target: Target) -> None:
        """There may be more to hash."""
        with self._changed:
            if not target.queued and (target.front > target.hashed or target.state is State.WHOLE):
                target.queued = True
                self._hashing.append(target)
                self._changed.notify_all()

    # --- what hashing threads do

    def _hash(self) -> None:
        buffer = memoryview(bytearray(1024 * 1024))
        while True:
            with self._changed:
                while not self._hashing and not self.ended:
                    self._changed.wait()
                if self.ended:
                    return
                target = self._hashing.popleft()
            read_front(target, buffer)
            whole = target.state is State.WHOLE and target.hashed == target.file.size
            if whole:
                self._judge(target)
            with self._changed:
                target.queued = False
                if target.state is not State.DONE:
                    self.offer(target)

    def _judge(self, target: Target) -> None:
        part, _ = target.opened
        if judge(target, self.cache):
            part.close()
            with self._changed:
                self._done(target)
            return
        part.reset()
        with self._changed:
            target.failures.hash()
            target.epoch += 1
            target.route.target = None
            target.begin(part, self._connections)
            target.not_before = time.monotonic() + delay_s(target.failures.count)
            if target.failures.exhausted:
                name, count = target.file.name, target.failures.count
                raise VerificationFailed(
                    f"{name}: other bytes came than the hub has (tried {count} times)",
                    file=name, attempts=count, reason="other bytes came than the hub has",
                )  # fmt: skip
            self._changed.notify_all()

    # --- the end; the lock is held

    def _done(self, target: Target) -> None:
        target.state, target.have = State.DONE, target.file.size
        target.part = None
        self._live.remove(target)
        self._end_if_done()

    def _end_if_done(self) -> None:
        if not self._live:
            self._ended.set()
        self._changed.notify_all()  # also where another file may be opened now

    def _end(self, error: RpcError) -> None:
        with self._changed:
            if not self._ended.is_set():
                self._error = error
                self._ended.set()
            self._changed.notify_all()
