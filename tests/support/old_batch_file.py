"""Makes tests/data/batch-1.sqlite3: a file of batch jobs as version 1 wrote it, with a job in the middle of its items.

    PYTHONPATH=client/src:daemon/src python tests/support/old_batch_file.py

Run once for each version that is left behind; what it made stays in the repository, as users' disks have it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from mlxd.batch import schema
from mlxd_client import types

DATA = Path(__file__).parents[1] / "data"
ITEMS = 5


def make(path: Path) -> None:
    """Version 1: five items of the built-in model, of which the first and the third have results."""
    db = schema.connect(path, budget_bytes=1 << 30, version=1)
    db.execute(
        "INSERT INTO jobs (job, key, digest, name, model, state, total, done, failed, created_at, started_at) VALUES "
        "('batch-old-1', 'a key', x'00', 'from before', 'mlxd/cleanup', 'running', ?, 2, 1, 1000.0, 1000.0)", (ITEMS,),
    )  # fmt: skip
    for place in range(ITEMS):
        params = types.ProcessParams(prompt=f"um the number {place}", model="mlxd/cleanup")
        db.execute(
            "INSERT INTO items (job, place, custom_id, method, params) VALUES (1, ?, ?, 'process', ?)",
            (place, f"old-{place}", msgspec.msgpack.encode(params)),
        )
    usage, timings = types.Usage(prompt_tokens=1, completion_tokens=1), types.Timings()
    made = types.Completion(model="mlxd/cleanup", text="The old answer.", finish_reason="stop", usage=usage,
                            timings=timings)  # fmt: skip
    told = types.ErrorObject(kind="context_exceeded", message="too long")
    for place, ok, result in ((0, 1, made), (2, 0, told)):
        db.execute(
            "INSERT INTO results (job, place, ok, result, ended_at) VALUES (1, ?, ?, ?, 1001.0)",
            (place, ok, msgspec.msgpack.encode(result)),
        )
    db.execute("PRAGMA journal_mode = DELETE")
    db.close()


if __name__ == "__main__":
    version = schema.VERSION - 1
    target = DATA / f"batch-{version}.sqlite3"
    if target.exists():
        sys.exit(f"{target} is there already: it is to stay as that version wrote it")
    DATA.mkdir(exist_ok=True)
    make(target)
