"""A daemon at work beside a crowd: how late events come, how fast it generates, and what it holds."""

from __future__ import annotations

import threading
import time
from statistics import median
from typing import NamedTuple

import psutil

from mlxd_client import Client
from support.crowd import Crowd, Seen, Shape
from support.daemon import PATIENCE_S, Daemon

__all__ = ["Figures", "measure"]

CLEANUP = "mlxd/cleanup"
# Does not end by itself (0 is the model's end), so that each answer fills the context.
ENDLESS = {"temperature": 0.0, "logit_bias": {"0": -1000.0}, "speculation": "off", "cache_prompt": False}
TOKENS = 900
# A short request every so often: what there is to tell.
EVERY_S = 0.5


class Figures(NamedTuple):
    """Tokens a second, alone and beside the crowd, in pairs; and what the crowd saw meanwhile."""

    speeds: list[tuple[float, float]]
    seen: list[Seen]
    rss_bytes: tuple[int, int]  # with all connected, and the most of all looks

    @property
    def ratio(self) -> float:
        return median(beside / alone for alone, beside in self.speeds)

    @property
    def late_s(self) -> float:
        """The 99th percentile, of the worst round."""
        return max(seen.late[2] for seen in self.seen)


class _Talker:
    """Another client, with a short request now and then: all followers are told of each."""

    def __init__(self, daemon: Daemon) -> None:
        self.asked = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._talk, args=(daemon,))

    def _talk(self, daemon: Daemon) -> None:
        with daemon.client() as client:
            while not self._over.wait(EVERY_S):
                client.process("um so hello", model=CLEANUP, max_tokens=1)
                self.asked += 1

    def __enter__(self) -> _Talker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE_S)


def speed(client: Client, seconds: float) -> float:
    """Tokens a second of one stream after the other."""
    began, tokens = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds:
        with client.stream_process("um so hello", model=CLEANUP, max_tokens=TOKENS, **ENDLESS) as stream:
            tokens += stream.wait().usage.completion_tokens
    return tokens / took


def measure(daemon: Daemon, clients: int, rounds: int, seconds: float) -> Figures:
    """Rounds of so many seconds alone and beside the crowd, in turns."""
    process = psutil.Process(daemon.pid)
    speeds, seen, held = [], [], []
    with daemon.client() as client:
        client.load(CLEANUP, keep_alive=-1)
        speed(client, 1.0)
        for number in range(rounds + 1):
            with _Talker(daemon):
                alone = speed(client, seconds)
            with Crowd(daemon.socket, Shape.of(clients)) as crowd:
                held.append(process.memory_info().rss)
                with _Talker(daemon):
                    crowd.seen()
                    beside = speed(client, seconds)
                told = crowd.seen()
                held.append(process.memory_info().rss)
            if number:  # the first is to warm up
                speeds.append((alone, beside))
                seen.append(told)
    return Figures(speeds, seen, (held[0], max(held)))
