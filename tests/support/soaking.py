"""Hours of everything at once on one daemon, which must be the same afterwards: descriptors, tasks, threads, memory.

One loop, for the suite (two minutes) and for tools/soak.py. Work and faults go on in rounds; after each the daemon is
left alone until nothing is under way, and then looked at. The first looks are its warm-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from mlxd_client import Client, errors
from support import fake_model
from support.daemon import PATIENCE_S, Daemon
from support.hub import Hub
from support.ledger import MODELS, Traffic, Wrong

MIB = 1024 * 1024
SETTINGS: dict[str, Any] = {"max_batch": 4, "queue_limit": 64, "subscriber_events": 64, "drain_s": 2}
REPOS = ("org/first", "org/second", "org/third")
# What may differ between two looks at a daemon that does nothing: descriptors, tasks and threads, and bytes.
SLACK, SLACK_BYTES = 3, 6 * MIB
# How long a ping may take while all that goes on, on a busy machine.
PING_S = 5.0
GARBAGE = 4096
BATCH = [{"method": "process", "params": {"prompt": prompt}} for prompt in ("a b", "!slow 3", "!error", "c")]


@dataclass(frozen=True)
class Look:
    """A daemon at rest. `at_s` since the soak began, `files` in its folder."""

    at_s: float
    descriptors: int
    tasks: int
    threads: int
    rss_bytes: int
    files: int

    def line(self) -> str:
        return (
            f"{self.at_s:7.0f} s {self.descriptors:5} descriptors {self.tasks:4} tasks {self.threads:4} threads "
            f"{self.rss_bytes / MIB:7.1f} MiB {self.files:5} files"
        )


class Soak:
    """
    Args:
        daemon: a running one with SETTINGS, whose workers are tests/support/bad_child.py.
        say: told of each look, in a line.
    """

    def __init__(self, daemon: Daemon, hub: Hub, seed: int, say: Callable[[str], None] = print) -> None:
        self.daemon, self.hub, self.seed, self.say = daemon, hub, seed, say
        self.draw = random.Random(seed)
        self.looks: list[Look] = []
        self.pings: list[float] = []
        self._models = [daemon.model(name) for name in MODELS]
        self._process = psutil.Process(daemon.pid)
        self._began = time.monotonic()
        for repo in REPOS:
            hub.commit(repo, fake_model.files(300_000))
        hub.throttle(1_500_000)
        self.traffic = Traffic(daemon.socket, self.draw, self._models, connections=24)
        self.traffic.more = [
            *(("models.download", {"model": repo}) for repo in REPOS * 2),
            *(("models.delete", {"model": repo}) for repo in REPOS),
            ("models.verify", {"model": REPOS[0]}), ("models.plan", {"model": REPOS[1]}),
            ("events.subscribe", {"topics": ["models"]}), ("rpc.discover", None), ("cache.list", None),
            ("batch.submit", {"items": BATCH, "model": self._models[0]}), ("metrics", None), ("config.reload", None),
        ]  # fmt: skip
        with daemon.client() as client:
            if "config.set" in client.connect().capabilities:
                values = {"keep_alive_s": 60.0}, {"keep_alive_s": 120.0}, {"log_level": "info"}, {"no_such": 1}
                self.traffic.more += [("config.set", {"values": value}) for value in values]

    @property
    def tally(self) -> Counter[str]:
        return self.traffic.tally

    def run(self, seconds: float, *, round_s: float = 20.0, warm_up: int = 2) -> list[str]:
        """Returns the report. Raises Wrong, which names the seed.

        Args:
            warm_up: how many rounds come before the look that all later ones are compared with.
        """
        try:
            end = self._began + seconds
            while time.monotonic() < end or len(self.looks) < warm_up + 2:
                asyncio.run(self._round(min(round_s, max(5.0, end - time.monotonic()))))
                self._rest()
                self.looks.append(self._look())
                self.say(self.looks[-1].line())
                self._compare(warm_up)
        except Exception as error:
            raise Wrong(f"seed {self.seed}: {type(error).__name__}: {error}") from error
        return self.report(warm_up)

    def report(self, warm_up: int) -> list[str]:
        first, last = self.looks[min(warm_up, len(self.looks) - 1)], self.looks[-1]
        pings = sorted(self.pings)
        return [
            *(f"{count:9,}  {what}" for what, count in sorted(self.tally.items())),
            f"pings: median {statistics.median(pings) * 1000:.1f} ms, 99th percentile "
            f"{pings[int(0.99 * (len(pings) - 1))] * 1000:.0f} ms, worst {pings[-1] * 1000:.0f} ms, of {len(pings):,}",
            f"after the warm-up {first.line().strip()}",
            f"in the end        {last.line().strip()}",
        ]

    # --- a round --------------------------------------------------------------------------------------------------

    async def _round(self, seconds: float) -> None:
        over = asyncio.Event()
        others = [
            asyncio.create_task(work(over))
            for work in (self._kill, self._babble, self._lag, self._ping)
        ]  # fmt: skip
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await self.traffic.turn()
            await asyncio.sleep(0.01)
            for task in others:
                if task.done():
                    task.result()
        over.set()
        await asyncio.gather(*others)
        await self.traffic.settle()

    async def _pause(self, over: asyncio.Event, seconds: float) -> bool:
        """Whether the round goes on after so long, about."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), seconds * self.draw.uniform(0.5, 1.5))
        return not over.is_set()

    async def _kill(self, over: asyncio.Event) -> None:
        """A worker or a fetcher, now and then; stopped ones are for the heartbeat to find."""
        while await self._pause(over, 0.7):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                children = self.daemon.children()
                if children:
                    os.kill(self.draw.choice(children).pid, signal.SIGKILL)
                    self.tally["children killed"] += 1

    async def _babble(self, over: asyncio.Event) -> None:
        """Clients that send what is nothing, or half of something, and go or stay."""
        staying: list[socket.socket] = []
        while await self._pause(over, 0.2):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.connect(str(self.daemon.socket))
                start = self.draw.choice((b"", b"{", (1000).to_bytes(4, "big"), b"\xff\xff\xff\xff", b'{"id": 1'))
                sock.send(start + self.draw.randbytes(self.draw.randrange(GARBAGE)))
                self.tally["clients of garbage"] += 1
            staying.append(sock)
            while len(staying) > self.draw.randrange(8):
                staying.pop(0).close()
        for sock in staying:
            sock.close()

    async def _lag(self, over: asyncio.Event) -> None:
        """Subscribers that never read; they are left behind, or cut off."""
        while await self._pause(over, 2.0):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(str(self.daemon.socket))
            sock.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "events.subscribe"}\n')
            self.tally["subscribers that never read"] += 1
            await self._pause(over, 3.0)
            sock.close()

    async def _ping(self, over: asyncio.Event) -> None:
        reader, writer = await asyncio.open_unix_connection(str(self.daemon.socket))
        while await self._pause(over, 0.25):
            began = time.monotonic()
            writer.write(b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n')
            async with asyncio.timeout(PATIENCE_S):
                await reader.readline()
            self.pings.append(time.monotonic() - began)
        writer.close()

    # --- between rounds -------------------------------------------------------------------------------------------

    def _rest(self) -> None:
        """See to it that nothing is under way any more; whoever does not come to rest is wrong."""
        with self.daemon.client() as client:
            for job in client.jobs():
                with contextlib.suppress(errors.RpcError):
                    if job.kind == "batch":
                        client.call("batch.delete", {"job": job.job, "cancel": True})
                    else:
                        client.cancel_job(job.job)
            for model in (*self._models, *REPOS):
                with contextlib.suppress(errors.RpcError):
                    client.unload(model)
            give_up_at = time.monotonic() + PATIENCE_S
            while left := self._under_way(client):
                if time.monotonic() > give_up_at:
                    raise Wrong(f"it does not come to rest: {left}")
                time.sleep(0.1)

    def _under_way(self, client: Client) -> list[str]:
        status = client.status()
        left = [f"{child.pid} {child.name()}" for child in self.daemon.children()]
        left += ["requests"] if status.queue.running or status.queue.waiting else []
        left += [f"{status.clients} clients"] if status.clients > 1 else []
        return left + [f"job {job.job}" for job in client.jobs() if job.ended_at is None]

    def _look(self) -> Look:
        with self.daemon.client() as client:
            status = client.status()
        assert status.pid == self.daemon.pid, "another daemon"
        with self._process.oneshot():
            return Look(
                at_s=time.monotonic() - self._began,
                descriptors=self._process.num_fds(),
                tasks=status.tasks,
                threads=self._process.num_threads(),
                rss_bytes=self._process.memory_info().rss,
                files=sum(1 for path in self.daemon.home.rglob("*") if "hub" not in path.parts and path.is_file()),
            )

    def _compare(self, warm_up: int) -> None:
        worst = max(self.pings, default=0.0)
        if worst > PING_S:
            raise Wrong(f"a ping took {worst:.1f} s")
        if len(self.looks) <= warm_up + 1:
            return
        first, last = self.looks[warm_up], self.looks[-1]
        for what in ("descriptors", "tasks", "threads", "files"):
            if getattr(last, what) > getattr(first, what) + SLACK:
                raise Wrong(f"{what} grew from {getattr(first, what)} to {getattr(last, what)}")
        if last.rss_bytes > first.rss_bytes + SLACK_BYTES:
            raise Wrong(f"memory grew from {first.rss_bytes / MIB:.1f} to {last.rss_bytes / MIB:.1f} MiB")
