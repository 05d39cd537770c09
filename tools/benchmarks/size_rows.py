"""How little is there while nothing happens: the daemon's memory, and processes before and after a model was loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from .processes import PATIENCE_S, Daemon
from .table import Row, alone

MOST_MB = 40


def before_rows(daemon: Daemon) -> Iterator[Row]:
    """Of a daemon that has never been asked for anything but a ping."""
    yield alone("size", "idle daemon, resident memory", daemon.resident_bytes() / 1e6, "MB", ("<=", MOST_MB))
    yield alone("size", "processes before the first load", len(daemon.children()), "", ("==", 0))


def after_rows(daemon: Daemon, model: Path) -> Iterator[Row]:
    """Load a model, use it, unload it."""
    with daemon.client() as client:
        client.load(str(model))
        client.chat("hello", model=str(model), max_tokens=4)
        workers = daemon.children()
        yield alone("size", "workers while a model is loaded", len(workers), "", ("==", 1))
        held = sum(worker.memory_info().rss for worker in workers)
        began = time.perf_counter()
        client.unload(str(model))
        took_s = time.perf_counter() - began
        psutil.wait_procs(workers, timeout=PATIENCE_S)
        yield alone("size", "workers after it was unloaded", len(daemon.children()), "", ("==", 0))
        yield alone("size", "memory that unloading gave back", held / 1e6, "MB")
        yield alone("size", "unloading, until that memory is free", took_s * 1e3, "ms")
        yield alone("size", "idle daemon afterwards, resident memory", daemon.resident_bytes() / 1e6, "MB")
