"""What is asked of the file: jobs and items put in, results recorded, pages read. Each change is one transaction, so
that a daemon that is killed has made it or has not."""

from __future__ import annotations

import errno
import hashlib
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from mlxd_client.errors import InsufficientDisk, InternalError, InvalidParams, NotFound, PermissionDenied, RpcError
from mlxd_client.types import BatchResult, BatchResultsResult, Completion, ErrorObject

from . import schema

__all__ = ["Item", "Job", "Outcome", "Recorded", "State", "Store", "digest"]

State = Literal["open", "running", "done", "failed", "cancelled"]
# A page of results, and the items that are read ahead, hold about so many bytes at most.
PAGE_BYTES = 256 * 1024
AHEAD_BYTES = 256 * 1024
# A disk with so much room left is not full.
SPARE_BYTES = 64 * 1024 * 1024
# How many items of a deleted job go with one transaction, and pages of the file with one step.
DELETED_AT_ONCE = 500
VACUUMED_PAGES = 2000


class Item(NamedTuple):
    """A request as it is kept: `params` are msgpack, `model` is what the caller calls it, or nothing."""

    method: str
    params: bytes
    model: str
    custom_id: str | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it is kept. Times are Unix seconds."""

    job: str
    number: int
    state: State
    total: int
    created_at: float
    key: str | None = None
    name: str | None = None
    model: str | None = None
    asked: str | None = None
    done: int = 0
    failed: int = 0
    started_at: float | None = None
    ended_at: float | None = None
    error: ErrorObject | None = None


class Outcome(NamedTuple):
    """What became of an item: msgpack of a Completion where it is `ok`, else of an ErrorObject."""

    job: str
    place: int
    ok: bool
    result: bytes


class Try(NamedTuple):
    """An item was tried so often."""

    job: str
    place: int
    tries: int


class End(NamedTuple):
    """A job ends before all of its items have."""

    job: str
    state: Literal["failed", "cancelled"]
    error: ErrorObject | None


class Recorded(NamedTuple):
    """How a job stands after a transaction."""

    job: str
    done: int
    failed: int
    state: str
    ended_at: float | None


class Waiting(NamedTuple):
    """Items that have no result: (place, tries, method, params) each; `more` may follow after `cursor`."""

    items: list[tuple[int, int, str, bytes]]
    cursor: tuple[int, int]
    more: bool


_JOB_FIELDS = ("job", "number", "state", "total", "created_at", "key", "name", "model", "asked", "done", "failed",
               "started_at", "ended_at")  # fmt: skip


def digest(model: str | None, items: Iterable[Item]) -> bytes:
    """What tells two submissions apart."""
    made = hashlib.sha256(repr(model).encode())
    for item in items:
        for part in (item.method.encode(), item.params, repr(item.custom_id).encode()):
            made.update(len(part).to_bytes(8, "big"))
            made.update(part)
    return made.digest()


class Store:
    """One open file. Used by one thread at a time.

    Every method raises RpcError for what cannot be: InsufficientDisk where nothing more can be written,
    PermissionDenied and InternalError for a disk that fails otherwise; and schema.Damaged.

    Args:
        path: the file.
        budget_bytes: what it may grow to.
        clock: Unix time.

    Attributes:
        closed: `open` has to come before anything else.
    """

    def __init__(self, path: Path, budget_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._budget_bytes = budget_bytes
        self._clock = clock
        self.open()

    def open(self) -> None:
        """Raises schema.Newer, too."""
        with _told():
            self.db = schema.connect(self._path, budget_bytes=self._budget_bytes)
        self.closed = False

    def close(self) -> None:
        """What was written ahead goes into the file, as far as the disk lets it."""
        self.closed = True
        self.db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing."""
        with _told():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:  # a full disk has SQLite do this itself
                    self.db.execute("ROLLBACK")
                raise

    def over_budget(self) -> bool:
        """After InsufficientDisk: whether it is the budget that is used up, and not the disk."""
        try:
            return shutil.disk_usage(self._path.parent).free > SPARE_BYTES
        except OSError:
            return False

    # --- jobs -----------------------------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """All that are not deleted, those that ended by when they did, before those that have not by when they came."""
        with _told():
            rows = self.db.execute(
                f"SELECT {', '.join(_JOB_FIELDS)}, error FROM jobs WHERE state != 'deleted' "
                "ORDER BY ended_at IS NULL, ended_at, number"
            ).fetchall()
        return [_job(row) for row in rows]

    def job(self, job: str) -> Job:
        """Raises NotFound."""
        with _told():
            row = self.db.execute(
                f"SELECT {', '.join(_JOB_FIELDS)}, error FROM jobs WHERE job = ? AND state != 'deleted'", (job,)
            ).fetchone()
        if row is None:
            raise NotFound("there is no such batch job", job=job)
        return _job(row)

    def submit(
        self, job: str, items: Sequence[Item], *, key: str | None = None, name: str | None = None,
        model: str | None = None, asked: str | None = None, opened: bool = False,
    ) -> tuple[Job, bool]:  # fmt: skip
        """Put in a job with its first items. Returns it, and whether it is new: where one was submitted under this key
        before, with the same items, that one is meant.

        Args:
            model: the one that all items go to, if they do.
            asked: the model that the caller named for items without one.

        Raises InvalidParams: under this key, something else was submitted; or two items have one custom_id.
        """
        mark = digest(asked, items)
        with self._transaction() as db:
            if key is not None:
                found = db.execute("SELECT job, digest FROM jobs WHERE key = ?", (key,)).fetchone()
                if found is not None:
                    if found[1] != mark:
                        told = f"key: {found[0]} was submitted under it, with other items"
                        raise InvalidParams(told, field="key", job=found[0])
                    return self.job(found[0]), False
            now = self._clock()
            db.execute(
                "INSERT INTO jobs (job, key, digest, name, model, asked, state, total, created_at, started_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (job, key, mark, name, model, asked, "open" if opened else "running", 0, now, None if opened else now),
            )
            self._add(db, self._number(job), 0, items)
        return self.job(job), True

    def knows(self, key: str) -> bool:
        """Whether a job was submitted under this key."""
        with _told():
            return self.db.execute("SELECT 1 FROM jobs WHERE key = ?", (key,)).fetchone() is not None

    def append(self, job: str, items: Sequence[Item], at: int | None, model: str | None) -> Job | None:
        """Add items to an open job. Returns the job; None where they are there already.

        Args:
            at: how many items the job has by the caller's count.
            model: the one that all these items go to, if they do.

        Raises:
            NotFound: there is no such job.
            InvalidParams: it is not open; `at` is not how many it has; two items have one custom_id.
        """
        with self._transaction() as db:
            known = self.job(job)
            number = known.number
            if at is not None and at < known.total and self._has(db, number, at, items):
                return None  # the answer to this was lost
            if known.state != "open":
                raise InvalidParams(f"job: {job} takes no more items: it was started", field="job")
            if at is not None and at != known.total:
                raise InvalidParams(f"at: {job} has {known.total} items", field="at", total_items=known.total)
            self._add(db, number, known.total, items)
            if not known.total or known.model != model:
                db.execute("UPDATE jobs SET model = ? WHERE number = ?", (None if known.total else model, number))
        return self.job(job)

    def _has(self, db: sqlite3.Connection, number: int, at: int, items: Sequence[Item]) -> bool:
        """Whether these are the items from `at` on."""
        found = db.execute(
            "SELECT method, params, custom_id FROM items WHERE job = ? AND place >= ? ORDER BY place LIMIT ?",
            (number, at, len(items)),
        )
        return [tuple(row) for row in found] == [(item.method, item.params, item.custom_id) for item in items]

    def _add(self, db: sqlite3.Connection, number: int, place: int, items: Sequence[Item]) -> None:
        turns = {model: turn for turn, model in db.execute("SELECT turn, model FROM models WHERE job = ?", (number,))}
        for index, item in enumerate(items):
            turn = turns.get(item.model)
            if turn is None:
                turn = turns[item.model] = len(turns)
                db.execute("INSERT INTO models (job, turn, model) VALUES (?, ?, ?)", (number, turn, item.model))
            try:
                db.execute(
                    "INSERT INTO items (job, place, turn, custom_id, method, params) VALUES (?, ?, ?, ?, ?, ?)",
                    (number, place + index, turn, item.custom_id, item.method, item.params),
                )
            except sqlite3.IntegrityError:
                told = f"items[{index}]: another item of this job has the custom_id {item.custom_id!r}"
                raise InvalidParams(told, field=f"items[{index}].custom_id") from None
        db.execute("UPDATE jobs SET total = total + ? WHERE number = ?", (len(items), number))

    def start(self, job: str) -> tuple[Job, bool]:
        """Have an open, failed or cancelled job run; one that runs or is done is left as it is. Returns the job, and
        whether that changed anything.

        Raises NotFound, and InvalidParams where it has no items.
        """
        with self._transaction() as db:
            known = self.job(job)
            if not known.total:
                raise InvalidParams(f"job: {job} has no items yet", field="job")
            changed = known.state in ("open", "failed", "cancelled")
            if changed:
                db.execute(
                    "UPDATE jobs SET state = 'running', started_at = coalesce(started_at, ?), ended_at = NULL, "
                    "error = NULL WHERE number = ?", (self._clock(), known.number),
                )  # fmt: skip
        return self.job(job), changed

    # --- items and their results ----------------------------------------------------------------------------------

    def waiting(self, job: str, after: tuple[int, int], count: int) -> Waiting:
        """The next items without a result. Raises NotFound."""
        number = self._number(job)
        items: list[tuple[int, int, str, bytes]] = []
        cursor, size = after, 0
        with _told():
            rows = self.db.execute(
                "SELECT turn, place, tries, method, params FROM items i WHERE job = ? AND (turn, place) > (?, ?) "
                "AND NOT EXISTS (SELECT 1 FROM results r WHERE r.job = i.job AND r.place = i.place) "
                "ORDER BY turn, place LIMIT ?", (number, *after, count + 1),
            )  # fmt: skip
            for turn, place, tries, method, params in rows:
                if len(items) == count or size > AHEAD_BYTES:
                    return Waiting(items, cursor, True)
                items.append((place, tries, method, params))
                cursor = (turn, place)
                size += len(params)
        return Waiting(items, cursor, False)

    def item(self, job: str, place: int) -> tuple[str, bytes]:
        """One item's method and params. Raises NotFound."""
        with _told():
            found = self.db.execute(
                "SELECT method, params FROM items WHERE job = (SELECT number FROM jobs WHERE job = ?) AND place = ?",
                (job, place),
            ).fetchone()
        if found is None:
            raise NotFound("there is no such item", job=job, index=place)
        return found[0], found[1]

    def record(self, changes: Sequence[Outcome | Try | End]) -> list[Recorded]:
        """Make all these changes, and end the jobs whose last item they bring. Returns how the jobs stand that they
        concern, as far as those are there.

        An item gets its result here, once: what came later for the same one is dropped, as is what came for a job that
        does not run any more.
        """
        with self._transaction() as db:
            now = self._clock()
            for change in changes:
                if isinstance(change, Outcome):
                    self._put(db, change, now)
                elif isinstance(change, Try):
                    db.execute(
                        "UPDATE items SET tries = ? WHERE job = (SELECT number FROM jobs WHERE job = ?) AND place = ?",
                        (change.tries, change.job, change.place),
                    )
                else:
                    error = None if change.error is None else msgspec.msgpack.encode(change.error)
                    db.execute(
                        "UPDATE jobs SET state = ?, ended_at = ?, error = ? "
                        "WHERE job = ? AND state IN ('open', 'running')", (change.state, now, error, change.job),
                    )  # fmt: skip
            jobs = list(dict.fromkeys(change.job for change in changes))
            stands = [self._stands(db, job, now) for job in jobs]
        return [found for found in stands if found is not None]

    def _put(self, db: sqlite3.Connection, outcome: Outcome, now: float) -> None:
        put = db.execute(
            "INSERT OR IGNORE INTO results (job, place, ok, result, ended_at) "
            "SELECT number, ?, ?, ?, ? FROM jobs WHERE job = ? AND state = 'running'",
            (outcome.place, outcome.ok, outcome.result, now, outcome.job),
        )
        db.execute(
            "UPDATE jobs SET done = done + ?, failed = failed + ? WHERE job = ?",
            (put.rowcount, put.rowcount * (not outcome.ok), outcome.job),
        )

    def _stands(self, db: sqlite3.Connection, job: str, now: float) -> Recorded | None:
        db.execute(
            "UPDATE jobs SET state = 'done', ended_at = ? WHERE job = ? AND state = 'running' AND done = total",
            (now, job),
        )
        found = db.execute("SELECT job, done, failed, state, ended_at FROM jobs WHERE job = ?", (job,)).fetchone()
        return None if found is None else Recorded(*found)

    def results(self, job: str, after: int, limit: int) -> BatchResultsResult:
        """A page; see BatchResultsResult. Raises NotFound."""
        known = self.job(job)
        ended = known.ended_at is not None
        page: list[BatchResult] = []
        size, more = 0, False
        with _told():
            rows = self.db.execute(
                "SELECT i.place, i.custom_id, r.ok, r.result FROM items i LEFT JOIN results r "
                "ON r.job = i.job AND r.place = i.place WHERE i.job = ? AND i.place > ? "
                f"{'AND r.place IS NOT NULL ' if ended else ''} ORDER BY i.place LIMIT ?",
                (known.number, after, limit + 1),
            )
            for place, custom_id, ok, result in rows:
                if result is None:
                    break
                if len(page) == limit or size > PAGE_BYTES:
                    more = True
                    break
                page.append(_result(place, custom_id, ok, result))
                size += len(result)
        return BatchResultsResult(results=page, more=more, complete=ended and not more)

    # --- deleting -------------------------------------------------------------------------------------------------

    def forget(self, job: str) -> None:
        """Nobody sees the job any more, and its key is free; what is left of it goes with `sweep`.

        Raises NotFound, and InvalidParams where it has not ended.
        """
        with self._transaction() as db:
            known = self.job(job)
            if known.ended_at is None:
                raise InvalidParams(f"job: {job} has not ended", field="job")
            db.execute("UPDATE jobs SET state = 'deleted', key = NULL WHERE number = ?", (known.number,))

    def sweep(self) -> bool:
        """Remove some of what deleted jobs have left, and give the room back. Returns whether there is more."""
        with self._transaction() as db:
            found = db.execute("SELECT number FROM jobs WHERE state = 'deleted' LIMIT 1").fetchone()
            if found is not None:
                for table in ("results", "items"):
                    db.execute(
                        f"DELETE FROM {table} WHERE number IN (SELECT number FROM {table} WHERE job = ? LIMIT ?)",
                        (found[0], DELETED_AT_ONCE),
                    )
                (left,) = db.execute("SELECT EXISTS (SELECT 1 FROM items WHERE job = ?)", found).fetchone()
                (told,) = db.execute("SELECT EXISTS (SELECT 1 FROM results WHERE job = ?)", found).fetchone()
                if not left and not told:
                    db.execute("DELETE FROM models WHERE job = ?", found)
                    db.execute("DELETE FROM jobs WHERE number = ?", found)
                return True
        with _told():
            (free,) = self.db.execute("PRAGMA freelist_count").fetchone()
            if free:
                self.db.executescript(f"PRAGMA incremental_vacuum({VACUUMED_PAGES})")  # `execute` takes one page
            # What was written ahead holds what was deleted, too, until it is begun anew.
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return bool(free > VACUUMED_PAGES)

    def _number(self, job: str) -> int:
        found = self.db.execute("SELECT number FROM jobs WHERE job = ?", (job,)).fetchone()
        if found is None:
            raise NotFound("there is no such batch job", job=job)
        return int(found[0])


def _job(row: tuple[Any, ...]) -> Job:
    *fields, error = row
    told = None if error is None else msgspec.msgpack.decode(error, type=ErrorObject)
    return Job(**dict(zip(_JOB_FIELDS, fields, strict=True)), error=told)


def _result(place: int, custom_id: str | None, ok: bool, result: bytes) -> BatchResult:
    if ok:
        made = msgspec.msgpack.decode(result, type=Completion)
        return BatchResult(index=place, custom_id=custom_id, result=made)
    return BatchResult(index=place, custom_id=custom_id, error=msgspec.msgpack.decode(result, type=ErrorObject))


@contextmanager
def _told() -> Iterator[None]:
    """SQLite's errors, and the system's, as ours."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise schema.Damaged(str(error)) from None
        raise _refusal(name, error) from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise _refusal("SQLITE_FULL" if full else "SQLITE_CANTOPEN", error) from None


def _refusal(name: str, error: Exception) -> RpcError:
    if name.startswith("SQLITE_FULL") or "full" in str(error):
        return InsufficientDisk("there is no room for batch jobs: the disk or the setting batch_disk_bytes is used up")
    if name.startswith(("SQLITE_READONLY", "SQLITE_PERM", "SQLITE_CANTOPEN")):
        return PermissionDenied(f"the file of the batch jobs cannot be written: {error}")
    return InternalError(f"the file of the batch jobs: {error}", cause=name.lower())
