"""The form of the file, its versions, and the way from each to the next. Opening makes, brings forward, or refuses it.

jobs     one row per job; `deleted` ones are about to go, with all that is theirs
models   which models a job's items go to, in the order in which the job works them off
items    requests as they came, msgpack of their params; `place` counts from 0
results  what became of an item, msgpack of a Completion or an ErrorObject: an item is done if and only if it has one
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path

from .header import APPLICATION_ID, VERSION, version_of

__all__ = ["Damaged", "Newer", "connect", "set_aside"]

PAGE_BYTES = 4096
# A file up to this size is checked whole when it is opened; a larger one would take seconds, and is found out as it is
# read.
CHECKED_BYTES = 64 * 1024 * 1024
# How long to wait for another process that still has the file, such as a daemon that is about to end.
BUSY_S = 2.0

_FIRST = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL UNIQUE,
    key TEXT UNIQUE,
    digest BLOB,
    name TEXT,
    model TEXT,
    state TEXT NOT NULL CHECK (state IN ('open', 'running', 'done', 'failed', 'cancelled', 'deleted')),
    total INTEGER NOT NULL,
    done INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    error BLOB
);
CREATE TABLE items (
    number INTEGER PRIMARY KEY,
    job INTEGER NOT NULL REFERENCES jobs (number),
    place INTEGER NOT NULL,
    custom_id TEXT,
    method TEXT NOT NULL,
    params BLOB NOT NULL,
    UNIQUE (job, place)
);
CREATE UNIQUE INDEX items_by_custom_id ON items (job, custom_id) WHERE custom_id IS NOT NULL;
CREATE TABLE results (
    number INTEGER PRIMARY KEY,
    job INTEGER NOT NULL REFERENCES jobs (number),
    place INTEGER NOT NULL,
    ok INTEGER NOT NULL,
    result BLOB NOT NULL,
    ended_at REAL NOT NULL,
    UNIQUE (job, place)
);
"""

# Version 2: jobs remember the model that was asked for, items how often they were tried, and items of one model run
# together.
_SECOND = """
ALTER TABLE jobs ADD COLUMN asked TEXT;
ALTER TABLE items ADD COLUMN tries INTEGER NOT NULL DEFAULT 0;
ALTER TABLE items ADD COLUMN turn INTEGER NOT NULL DEFAULT 0;
CREATE INDEX items_by_turn ON items (job, turn, place);
CREATE TABLE models (
    job INTEGER NOT NULL REFERENCES jobs (number),
    turn INTEGER NOT NULL,
    model TEXT NOT NULL,
    PRIMARY KEY (job, turn)
) WITHOUT ROWID;
"""

# What brings a file from the version before to this one.
_STEPS: dict[int, str] = {1: _FIRST, 2: _SECOND}


class Damaged(Exception):
    """The file is no such file, or parts of it cannot be read."""


class Newer(Exception):
    """A newer mlxd wrote the file; its version is `args[0]`."""


def connect(path: Path, *, budget_bytes: int, version: int = VERSION) -> sqlite3.Connection:
    """Open the file, which is made where it is missing, for this process alone. Transactions are never implicit.

    Args:
        budget_bytes: what it may grow to; beyond that writing fails as on a full disk.
        version: the form to bring it to; only tests want an older one.

    Raises:
        Damaged: see there.
        Newer: see there.
        sqlite3.Error: the disk is full, the file is another process's, or it cannot be opened.
    """
    if (found := version_of(path) or 0) > version:
        raise Newer(found)  # before anything of it is touched
    _private(path)
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=64)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        _check(db, path, version)  # which only reads: what is not ours stays as it is
        _settle(db, budget_bytes)
        _bring_forward(db, version)
    except sqlite3.DatabaseError as error:
        db.close()
        if error.sqlite_errorname.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise Damaged(str(error)) from None
        raise
    except BaseException:
        db.close()
        raise
    return db


def _private(path: Path) -> None:
    """Make the file ours alone before SQLite opens it; what it makes beside it gets the same mode."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        return
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)


def _settle(db: sqlite3.Connection, budget_bytes: int) -> None:
    """How the file is treated.

    synchronous FULL: what was committed is on disk before anybody hears of it. On macOS that is fsync, which leaves the
    drive its cache: a power cut may take the last commits, and their items run again; checkpoint_fullfsync makes sure
    that it takes nothing older and breaks nothing. secure_delete: what is deleted is overwritten.
    """
    for name, value in (
        ("page_size", PAGE_BYTES), ("auto_vacuum", "INCREMENTAL"), ("journal_mode", "WAL"), ("synchronous", "FULL"),
        ("checkpoint_fullfsync", "ON"), ("secure_delete", "ON"), ("foreign_keys", "OFF"), ("cache_size", -256),
        ("temp_store", "MEMORY"), ("mmap_size", 0), ("journal_size_limit", 4 * 1024 * 1024),
        ("max_page_count", max(16, budget_bytes // PAGE_BYTES)),
    ):  # fmt: skip
        db.execute(f"PRAGMA {name} = {value}")


def _check(db: sqlite3.Connection, path: Path, version: int) -> None:
    (found,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != APPLICATION_ID:
        raise Damaged("it is a database of another program")
    if found > version:
        raise Newer(found)
    if path.stat().st_size <= CHECKED_BYTES:
        (told,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if told != "ok":
            raise Damaged(told)


def _bring_forward(db: sqlite3.Connection, version: int) -> None:
    """One transaction: whoever is killed in the middle leaves the form that it was."""
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found == version:
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        for step in range(found + 1, version + 1):
            for statement in _STEPS[step].split(";"):
                if statement.strip():
                    db.execute(statement)
        db.execute(f"PRAGMA user_version = {version}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def set_aside(path: Path) -> Path:
    """Rename a damaged file and what belongs to it, so that nothing of it is lost. Returns its new name."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        aside = path.with_name(f"{path.name}.damaged-{stamp}" + (f"-{number}" if number else ""))
        if not aside.exists():
            break
    for ending in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{path}{ending}", f"{aside}{ending}")
    os.replace(path, aside)
    return aside
