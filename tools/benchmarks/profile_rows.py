"""Where the time of a request goes, part by part: in a daemon whose worker has clocks around its functions.

The worker is profiled_worker.py, which takes longer than the real one, since nothing in it runs beside anything else.
Answers are streamed, one client after the other or eight at once. What the client waited for and the worker did not
spend is the daemon's, the socket's and the client's.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

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


def profile_rows(label: str, model: Path, temp: Path, scale: Scale) -> Iterator[Row]:
    out = temp / "profile.json"
    command = json.dumps([sys.executable, "-m", "benchmarks.profiled_worker"])
    with Daemon(MLXD_WORKER_COMMAND=command, **{OUT: str(out)}) as daemon:
        with daemon.client() as client:
            client.load(str(model), keep_alive=-1)
        for streams in (1, STREAMS):
            told = f"{label}, {streams} at once" if streams > 1 else f"{label}, alone"
            yield from one_table(told, daemon, model, out, streams, scale)


def one_table(label: str, daemon: Daemon, model: Path, out: Path, streams: int, scale: Scale) -> Iterator[Row]:
    prompts, tokens = Prompts(model), scale.profile_tokens

    def run() -> float:
        asked = [prompts.one() for _ in range(streams)]
        return float(asyncio.run(batch_ours(daemon.socket, model, asked, tokens))["total_s"])

    run()  # kernels are compiled
    before = rested(out)
    waited = sum(run() for _ in range(scale.profile_rounds))
    after = rested(out)
    spent = {name: after[name] - before[name] for name in after if name != IDLE}
    unknown = spent.keys() - PARTS.keys()
    if unknown:
        raise RuntimeError(f"parts without a place in the table: {', '.join(sorted(unknown))}")
    spent["daemon"] = max(0.0, waited - sum(spent.values()))
    requests = scale.profile_rounds * streams
    name, each = f"profile/{model.name}", 1e3 / requests
    yield alone(name, f"{label}: a request of {tokens} tokens, profiled", waited * each, "ms")
    for part, told in (PARTS | {"daemon": "daemon, socket, client"}).items():
        if spent.get(part):
            share = spent[part] / waited
            yield alone(name, f"{label}: {told} ({share:.1%})", spent[part] * each, "ms")


def rested(out: Path) -> Counter[str]:
    """The worker's sums once it has nothing left to do: two that are the same but for the waiting."""
    until = time.monotonic() + PATIENCE_S
    last: dict[str, float] | None = None
    while time.monotonic() < until:
        time.sleep(1.0)  # more than the time between two heartbeats, after each of which it writes
        seconds: dict[str, float] = json.loads(out.read_text())["seconds"]
        busy = {
            name: round(spent, 3) for name, spent in seconds.items() if name not in (IDLE, "loop", "encode", "pipe")
        }
        if busy == last:
            return Counter(seconds)
        last = busy
    raise RuntimeError("the profiled worker does not come to rest")
