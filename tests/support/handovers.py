"""Daemons that follow each other under load: streams and calls that go on, and how long a new connection waits."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlxd_client import Client
from support.daemon import PATIENCE_S
from support.restarts import Relay

_PING = b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n'
_ANSWER = b'{"jsonrpc":"2.0","id":1,"result":{}}\n'
PROMPT = "one two three four five six seven eight"


class Load:
    """Clients that never stop asking, each in a thread.

    Attributes:
        answers: how many answers came, whole and right.
        waits_s: how long each new connection waited for its first answer, newest last.
        failures: what went wrong; a client that meets anything stops.
    """

    def __init__(self, daemon: Relay, streams: int) -> None:
        self.answers = 0
        self.waits_s: list[float] = []
        self.failures: list[BaseException] = []
        self._daemon = daemon
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._guarded, args=(self._stream,)) for _ in range(streams)]
        self._threads.append(threading.Thread(target=self._guarded, args=(self._connect,)))

    @contextmanager
    def running(self) -> Iterator[Load]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join(PATIENCE_S)
        assert not self.failures, self.failures

    def _guarded(self, work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            self.failures.append(error)

    def _stream(self) -> None:
        with self._daemon.client() as client:
            while not self._over.is_set():
                assert "".join(client.stream_process(PROMPT)) == PROMPT
                self.answers += 1

    def _connect(self) -> None:
        """A connection after the other, each asking one thing."""
        while not self._over.is_set():
            began = time.perf_counter()
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(PATIENCE_S)
                sock.connect(str(self._daemon.socket))
                sock.sendall(_PING)
                told = b""
                while not told.endswith(b"\n"):
                    told += (more := sock.recv(4096))
                    assert more, f"hung up on after {told!r}"
            assert told.startswith(_ANSWER), told  # it may be told at once that it is to connect anew
            self.waits_s.append(time.perf_counter() - began)
            time.sleep(0.001)


def follow(daemon: Relay, load: Load, times: int) -> list[float]:
    """So many handovers, one after the other. Returns the longest wait of a new connection at each, in seconds."""
    worst = []
    with daemon.client() as client:
        for _ in range(times):
            before = daemon.newest()
            already = len(load.waits_s)
            restarted(client)
            daemon.gone(before.pid)
            assert not load.failures, load.failures
            worst.append(max(load.waits_s[already:], default=0.0))
    return worst


def restarted(client: Client) -> None:
    client.restart(wait_s=PATIENCE_S)


def table(times: int, streams: int, worst_s: list[float], quiet_s: list[float], answers: int, took_s: float) -> str:
    """What docs/upgrades.md quotes."""
    rows = [
        ("longest wait of a new connection at a handover, median", f"{statistics.median(worst_s) * 1000:.1f} ms"),
        ("the same, the longest of all", f"{max(worst_s) * 1000:.1f} ms"),
        ("wait of a new connection with no handover, median", f"{statistics.median(quiet_s) * 1000:.1f} ms"),
        ("streams that were answered whole meanwhile", f"{answers:,}"),
        ("answers that were lost, connections that were refused", "0"),
        ("a handover with all that goes before and after it", f"{took_s / times:.2f} s"),
    ]
    head = f"| {times} handovers beside {streams} streams | |\n|---|---|\n"
    return head + "\n".join(f"| {what} | {told} |" for what, told in rows)
