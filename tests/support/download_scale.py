"""What a large download costs everybody else: memory, the daemon's answers, events. Measured, not judged.

Resident memory is what psutil calls rss: the process's own pages and those of mapped files, as libraries. What it reads
and writes by system calls lies in the page cache and is nobody's rss; neither the fetcher nor the daemon maps models.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import psutil

from mlxd_client.sync import EventStream
from mlxd_client.types import Event
from support.daemon import Daemon
from support.pinger import Pinger

MB = 1_000_000
IDLE_S = 1.0
PATIENCE_S = 600.0


@dataclass
class Figures:
    """Bytes and seconds. `most_events` are `download_progress` within any one second; `pings` how many were timed."""

    size_bytes: int
    took_s: float
    fetcher_rss: int
    daemon_rss: int
    events: int
    most_events: int
    pings: int
    idle_p99_s: float
    ping_p50_s: float
    ping_p99_s: float
    ping_max_s: float

    def lines(self) -> list[str]:
        return [
            f"{self.size_bytes / 1e9:.2f} GB in {self.took_s:.1f} s: {self.size_bytes / self.took_s / MB:.0f} MB/s",
            f"fetcher at most {self.fetcher_rss / MB:.1f} MB resident (to stay under 120)",
            f"daemon at most {self.daemon_rss / MB:.1f} MB resident (to stay under 60)",
            f"{self.pings:,} pings of another client meanwhile: median {self.ping_p50_s * 1e3:.2f} ms, 99th percentile "
            f"{self.ping_p99_s * 1e3:.2f} ms (to stay under 5; idle {self.idle_p99_s * 1e3:.2f} ms), "
            f"slowest {self.ping_max_s * 1e3:.1f} ms",
            f"{self.events:,} progress events, at most {self.most_events} within one second (to stay near 10)",
        ]


def measure(daemon: Daemon, repo: str) -> Figures:
    """Download `repo`, to the end. AssertionError where that fails."""
    with Pinger(daemon.socket) as idle:
        time.sleep(IDLE_S)  # what is measured is an idle daemon, over time
        idle_times = idle.stop()
    rss = _Rss(daemon)
    with daemon.client() as client, client.events(topics=["models", "jobs"]) as events, Pinger(daemon.socket) as pinger:
        began = time.monotonic()
        job = client.download(repo)
        progress = _follow(events, job, rss)
        took = time.monotonic() - began
        times = sorted(pinger.stop())
        ended = client.job(job)
    assert ended.state == "done", ended
    assert times
    assert rss.fetcher > 0
    return Figures(
        size_bytes=ended.total_bytes or 0, took_s=took, fetcher_rss=rss.fetcher, daemon_rss=rss.daemon,
        events=len(progress), most_events=_most_within(progress, 1.0), pings=len(times),
        idle_p99_s=_quantile(sorted(idle_times), 0.99), ping_p50_s=_quantile(times, 0.5),
        ping_p99_s=_quantile(times, 0.99), ping_max_s=times[-1],
    )  # fmt: skip


class _Rss:
    """The most that either was seen to have."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = psutil.Process(daemon.pid)
        self._child: psutil.Process | None = None
        self.fetcher = self.daemon = 0

    def look(self) -> None:
        self.daemon = max(self.daemon, self._daemon.memory_info().rss)
        try:
            if self._child is None:
                self._child = next((c for c in self._daemon.children() if "mlxd.fetch" in c.cmdline()), None)
            if self._child is not None:
                self.fetcher = max(self.fetcher, self._child.memory_info().rss)
        except psutil.NoSuchProcess:  # a zombie already, or gone
            self._child = None


def _follow(events: EventStream, job: str, rss: _Rss) -> list[float]:
    """Read events to the end of the job. Returns when each event of progress was sent."""
    progress: list[float] = []
    while True:
        event: Event | None = events.get(PATIENCE_S)
        assert event is not None
        if event.name == "download_progress":
            progress.append(event.at)
            rss.look()
        if event.job is not None and event.job.job == job and event.job.ended_at is not None:
            return progress


def _most_within(times: list[float], seconds: float) -> int:
    window: deque[float] = deque()
    most = 0
    for at in times:
        window.append(at)
        while window[0] <= at - seconds:
            window.popleft()
        most = max(most, len(window))
    return most


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
