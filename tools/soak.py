"""A daemon under duress, for as long as one likes.

    python3 tools/dev.py soak --minutes M [--seed N]        everything at once, and what the daemon holds stays the same
    python3 tools/dev.py soak [--kills N] [--seed N]        downloads and deletes, killed at any byte
    python3 tools/dev.py soak --batch N [--items N]         a batch job, whose daemon and workers are killed
    python3 tools/dev.py soak [--size-gb G] [--files N]     models as large as the disk allows

The suite has the short forms (tests/faults/test_soak.py, test_download_kills.py and test_download_scale.py,
tests/e2e/test_batch.py). Everything happens against the tests' hub on loopback, in a folder of its own, and is checked
as it goes: the first thing that is wrong ends the run. Exits 1 then.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

if TYPE_CHECKING:
    from support.download_kills import Tally

MIB = 1024 * 1024
SPARE_BYTES = 4 * 10**9


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/dev.py soak", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--minutes", type=float, help="requests, faults, downloads, garbage; what the daemon holds stays"
    )
    parser.add_argument("--kills", type=_count, help="kill downloads and deletes so often; 200 where nothing is asked")
    parser.add_argument("--batch", type=_count, help="kill the daemon and its workers so often while a batch job runs")
    parser.add_argument("--items", type=_count, default=20_000, help="with --batch: how many items it has")
    parser.add_argument("--seed", type=int, help="decides what is killed, and when; printed where it is not given")
    parser.add_argument("--size-gb", type=float, help="download one model of this size, and watch what it costs others")
    parser.add_argument("--files", type=_count, help="the same with a model of so many files")
    options = parser.parse_args(arguments)
    if options.kills is options.size_gb is options.files is options.batch is options.minutes is None:
        options.kills = 200
    seed = random.randrange(2**32) if options.seed is None else options.seed
    wanted: list[Callable[[], None]] = []
    if options.minutes is not None:
        wanted.append(lambda: everything(options.minutes, seed))
    if options.size_gb is not None:
        wanted.append(lambda: large(options.size_gb))
    if options.files is not None:
        wanted.append(lambda: many(options.files))
    if options.batch is not None:
        wanted.append(lambda: batch(options.batch, options.items, seed))
    if options.kills is not None:
        wanted.append(lambda: kill(options.kills, seed))
    try:
        for run in wanted:
            run()
    except AssertionError:
        sys.stdout.flush()
        traceback.print_exc()
        print("WRONG: see above", flush=True)
        return 1
    return 0


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


# --- everything at once ---------------------------------------------------------------------------------------------


def everything(minutes: float, seed: int) -> None:
    """Raises AssertionError once something is wrong, or has grown."""
    from support.daemon import Daemon
    from support.hub import Hub
    from support.soaking import SETTINGS, Soak

    print(f"{minutes:g} minutes, seed {seed}", flush=True)
    with Hub() as hub, Daemon(bad_child="worker", env=hub.env(), **SETTINGS) as daemon:
        soak = Soak(daemon, hub, seed, lambda line: print(line, flush=True))
        print(*soak.run(60 * minutes), sep="\n", flush=True)


# --- kills ----------------------------------------------------------------------------------------------------------


def kill(kills: int, seed: int) -> None:
    """Raises AssertionError, with the table of what was done until then."""
    from support.daemon import Daemon
    from support.download_kills import KillLoop
    from support.hub import Hub

    print(f"{kills} kills, seed {seed}", flush=True)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {loop.tally.count:4} kills  {line}", flush=True)

    with Hub() as hub, Daemon(bad_child="worker", env=hub.env()) as daemon:
        loop = KillLoop(hub, daemon, seed, say)
        try:
            loop.run(kills)
        finally:
            print(*table(loop.tally, time.monotonic() - began), sep="\n", flush=True)


def table(tally: Tally, took_s: float) -> list[str]:
    lines = [
        "",
        f"{tally.count} kills in {took_s:.0f} s, {_listed(tally.downloads)}, {tally.deletes} deletes",
        f"  who    {_listed(tally.kills)}",
        f"  when   {_listed(tally.moments)}",
        f"  bytes  {tally.sent_bytes / MIB:,.1f} MiB sent for {tally.size_bytes / MIB:,.1f} MiB of weights; "
        f"{tally.in_sockets / MIB:,.1f} MiB of the rest lay in sockets",
    ]
    if tally.lost:
        lines.append(
            f"  lost   {statistics.mean(tally.lost) / MIB:.2f} MiB by a kill, {max(tally.lost) / MIB:.2f} by the worst "
            "one (8 are allowed)"
        )
    for who, times in sorted(tally.recovered_s.items()):
        lines.append(
            f"  again  {statistics.median(times):.2f} s after a kill of {who}, at the slowest {max(times):.2f}"
        )
    if tally.left_behind:
        lines.append(f"  left   {tally.left_behind} replaced revisions that only the next daemon removed")
    return lines


def _listed(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common()) or "nothing"


# --- batch jobs -----------------------------------------------------------------------------------------------------


def batch(kills: int, items: int, seed: int) -> None:
    """Raises AssertionError, with what was done until then."""
    from support.batch_kills import BatchKills, prompts
    from support.daemon import Daemon

    print(f"a batch job of {items} items, {kills} kills, seed {seed}", flush=True)
    began = time.monotonic()
    with Daemon(bad_child="worker", batch_retry_s=0.01, log_level="warning") as daemon:
        loop = BatchKills(daemon, prompts(items), seed)
        try:
            job = loop.run(kills)
        finally:
            print(f"{_listed(loop.kills)} killed in {time.monotonic() - began:.0f} s, {len(loop.known)} results read")
    print(f"{job.done_items} items with a result each, {job.failed_items} of them worker_died", flush=True)


# --- scale ----------------------------------------------------------------------------------------------------------


def large(size_gb: float) -> None:
    from support.hub import sparse_safetensors, synthetic_files

    size = int(size_gb * 1e9)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < size + SPARE_BYTES:
        sys.exit(f"{size_gb:g} GB do not fit: {free / 1e9:.0f} GB are free in {tempfile.gettempdir()}")
    print(f"one file of {size_gb:g} GB; the hub hashes it first", flush=True)
    _scale({**synthetic_files(1, MIB), "model.safetensors": sparse_safetensors(size)})


def many(count: int) -> None:
    from support.hub import synthetic_files

    print(f"{count} files", flush=True)
    _scale(synthetic_files(count, MIB))


def _scale(files: dict[str, object]) -> None:
    from support.daemon import Daemon
    from support.download_scale import measure
    from support.hub import Hub

    with Hub() as hub, Daemon(bad_child="worker", env=hub.env()) as daemon:
        hub.commit("org/large", files)  # type: ignore[arg-type]
        figures = measure(daemon, "org/large")
    print(*figures.lines(), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
