"""Where the time of a request goes, part by part: in a daemon whose worker has clocks around its functions.

The worker is profiled_worker.py, which takes longer than the real one, since nothing in it runs beside anything else.
Answers are streamed, one client after the other or eight at once. Shares are of what the clients waited; keeping a
prefix for later comes after the answer, and counts too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

from .effort import STREAMS, Scale
from .generation_rows import Prompts, batch_ours
from .processes import PATIENCE_S, Daemon
from .profiled_worker import IDLE, OUT
from .table import Row, alone

# In the order of a request's way. What is not here is the worker's own bookkeeping.
PARTS = {
    "template": "template",
    "tokenise": "tokenise",
    "prefix cache": "prefix cache",
    "prefill": "prefill, forward",
    "forward": "decode, forward",
    "constrain": "decode, rule",
    "sample": "decode, sample",
    "detokenise": "detokenise",
    "encode": "encode frames",
    "pipe": "pipe between worker and daemon",
    "batch": "batch bookkeeping",
    "loop": "worker's loop",
}
# What grows even where there is nothing to do, since a worker says that it lives.
_TICKING = (IDLE, "loop", "encode", "pipe")


def profile_rows(label: str, model: Path, temp: Path, scale: Scale) -> Iterator[Row]:
    out = temp / "profile.json"
    command = json.dumps([sys.executable, "-m", "benchmarks.profiled_worker"])
    libraries = {"auto": label} | ({"bundled": f"{label} on MLX's BLAS"} if sys.platform == "linux" else {})
    for blas, named in libraries.items():
        with Daemon(MLXD_WORKER_COMMAND=command, MLXD_BLAS=blas, **{OUT: str(out)}) as daemon:
            with daemon.client() as client:
                client.load(str(model), keep_alive=-1)
            for streams in (1, STREAMS):
                told = f"{named}, {streams} at once" if streams > 1 else f"{named}, alone"
                yield from one_table(told, daemon, model, out, streams, scale)


def one_table(label: str, daemon: Daemon, model: Path, out: Path, streams: int, scale: Scale) -> Iterator[Row]:
    prompts, tokens = Prompts(model), scale.profile_tokens

    def run() -> float:
        asked = [prompts.one() for _ in range(streams)]
        return float(asyncio.run(batch_ours(daemon.socket, model, asked, tokens))["total_s"])

    run()  # kernels are compiled
    before, daemon_s, queued = rested(out), busy_s(daemon), queued_s(daemon, model)
    waited = sum(run() for _ in range(scale.profile_rounds))
    after = rested(out)
    spent = {name: after[name] - before[name] for name in after if name != IDLE}
    unknown = spent.keys() - PARTS.keys()
    if unknown:
        raise RuntimeError(f"parts without a place in the table: {', '.join(sorted(unknown))}")
    spent["daemon"] = busy_s(daemon) - daemon_s
    requests = scale.profile_rounds * streams
    name, each = f"profile/{model.name}", 1e3 / requests
    yield alone(name, f"{label}: a request of {tokens} tokens, profiled", waited * each, "ms")
    yield alone(name, f"{label}: in the daemon's queue", (queued_s(daemon, model) - queued) * each, "ms")
    for part, told in (PARTS | {"daemon": "daemon, its CPU time"}).items():
        if spent.get(part):
            share = spent[part] / waited
            yield alone(name, f"{label}: {told} ({share:.1%})", spent[part] * each, "ms")


def queued_s(daemon: Daemon, model: Path) -> float:
    """How long all requests of this model together have waited until the worker had them, in seconds."""
    with daemon.client() as client:
        (stats,) = client.stats(str(model)).models
    return stats.queue_s.count * stats.queue_s.mean if stats.queue_s else 0.0


def busy_s(daemon: Daemon) -> float:
    """How long the daemon's own process has computed so far, in seconds."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{daemon.process.pid}/schedstat").read_text().split()[0]) / 1e9
    used = psutil.Process(daemon.process.pid).cpu_times()
    return float(used.user + used.system)


def rested(out: Path) -> Counter[str]:
    """The worker's sums once it has nothing left to do: two that are the same but for the waiting."""
    until = time.monotonic() + PATIENCE_S
    last: dict[str, float] | None = None
    while time.monotonic() < until:
        time.sleep(1.0)  # more than the time between two heartbeats, after each of which it writes
        seconds: dict[str, float] = json.loads(out.read_text())["seconds"]
        busy = {name: round(spent, 3) for name, spent in seconds.items() if name not in _TICKING}
        if busy == last:
            return Counter(seconds)
        last = busy
    raise RuntimeError("the profiled worker does not come to rest")
