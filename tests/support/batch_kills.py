"""A batch job whose daemon and workers are killed again and again, and what must be true of it all the same."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from mlxd_client import Client
from mlxd_client.types import Job
from support.daemon import PATIENCE_S, Daemon

Kill = Callable[[Daemon], None]


def kill_worker(daemon: Daemon) -> None:
    with contextlib.suppress(ValueError, ProcessLookupError):  # there may be none at present
        daemon.worker().kill()


def kill_daemon(daemon: Daemon) -> None:
    daemon.restart(crash=True)


def stop_daemon(daemon: Daemon) -> None:
    daemon.restart()


KILLS: dict[str, Kill] = {"worker": kill_worker, "daemon": kill_daemon, "stop": stop_daemon}


def prompts(count: int) -> list[dict[str, Any]]:
    """Items that a bad_child answers with their own text."""
    return [
        {"method": "process", "custom_id": f"c{n}", "params": {"prompt": f"item {n} of many"}} for n in range(count)
    ]


class BatchKills:
    """One run.

    Args:
        items: what the job is made of.
        seed: decides who is killed, and when.
    """

    def __init__(self, daemon: Daemon, items: list[dict[str, Any]], seed: int) -> None:
        self.daemon = daemon
        self.items = items
        self.draw = random.Random(seed)
        self._key = f"kills {seed}"
        self.kills: Counter[str] = Counter()
        self.known: dict[int, bytes] = {}  # results as they were first read
        with daemon.client() as client:
            self.job = client.submit_items(items, key=self._key).job

    def run(self, kills: int) -> Job:
        """Let the job go on, with about so many kills spread over it; returns how it ended. Raises AssertionError."""
        step = max(1, len(self.items) // (kills + 1))
        at = 0
        while True:
            at += self.draw.randint(1, 2 * step)
            job = self.until(at)
            if job.ended_at is not None:
                break
            who = self.draw.choices(list(KILLS), (6, 4, 1))[0]
            KILLS[who](self.daemon)
            self.kills[who] += 1
            with self.daemon.client() as client:
                self.check(client)
        with self.daemon.client() as client:
            self.check(client)
            assert client.submit_items(self.items, key=self._key).job == self.job
            assert [job.job for job in client.batches()] == [self.job]
        assert sorted(self.known) == list(range(len(self.items))), "an item is lost"
        assert job.done_items == len(self.items)
        return job

    def until(self, count: int) -> Job:
        """The job, once so many of its items are done or it has ended."""
        with self.daemon.client() as client, client.events(["job"]) as events:
            job = client.batch(self.job)
            while job.ended_at is None and (job.done_items or 0) < count:
                event = events.get(PATIENCE_S)
                if event is not None and event.job is not None and event.job.job == self.job:
                    job = event.job
            return job

    def check(self, client: Client) -> None:
        """What was read once is there for ever, and as it was; nothing is there twice."""
        seen = -1
        for result in client.results(self.job):
            assert result.index > seen, "results out of order"
            seen = result.index
            made = msgspec.msgpack.encode(result)
            assert self.known.setdefault(result.index, made) == made, f"the result of item {result.index} has changed"
            item = self.items[result.index]
            assert result.custom_id == item["custom_id"]
            assert result.error is None or result.error.kind == "worker_died"
            assert result.result is None or result.result.text == item["params"]["prompt"]
        assert max(self.known, default=-1) <= seen, "a result is lost"
