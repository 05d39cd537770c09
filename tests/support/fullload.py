"""A daemon with everything under way at once, told to end; for tests/faults/test_full_load.py and tools/faults.py."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from typing import Any

import psutil

from mlxd_client import errors
from mlxd_client.codec import encode
from support import fake_model
from support.daemon import PATIENCE_S, Daemon, until
from support.hub import Hub

# What the docs promise beside the drain.
EXTRA_S = 2.0
MODELS = ("one", "two", "three")
STREAMS, WAITING, SUBSCRIBERS = 4, 20, 30


class FullLoad:
    """Streams on several models and a queue for each, a hung worker, one that is stopped, downloads, a load, and
    clients that never read.

    Args:
        daemon: a running one from `daemon_of`.
    """

    def __init__(self, daemon: Daemon, hub: Hub) -> None:
        self.daemon, self.hub = daemon, hub
        self.told: list[str] = []  # what became of each request: the error's kind, or `done`
        self._deaf: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        hub.commit("org/moving", fake_model.files(4_000_000))
        hub.throttle(200_000)

    @staticmethod
    def daemon_of(hub: Hub, **settings: Any) -> Daemon:
        return Daemon(bad_child="worker", env=hub.env(), max_batch=STREAMS, heartbeat_s=60, **settings)

    def begin(self) -> None:
        """Returns once all is under way."""
        daemon = self.daemon
        with daemon.client() as client, client.events() as events:
            for name in (*MODELS, "hung", "stopped"):
                client.load(daemon.model(name), keep_alive=-1)
            for name in MODELS:
                for _ in range(STREAMS + WAITING):
                    self._ask(daemon.home / "models" / name, "!slow 100000")
                until(events, "queue", id=str(daemon.home / "models" / name), active=STREAMS, waiting=WAITING)
            for name, prompt in (("hung", "!hang"), ("stopped", "!slow 100000")):
                self._ask(daemon.home / "models" / name, prompt)
                until(events, "queue", id=str(daemon.home / "models" / name), active=1)
            max(daemon.children(), key=lambda child: child.create_time()).suspend()
            client.download("org/moving")
            self.hub.wait_bytes("*.safetensors", 50_000, repo="org/moving", timeout_s=PATIENCE_S)
            for _ in range(SUBSCRIBERS):
                self._never_read()
            self._ask(daemon.model("loading"), "x")
            until(events, "loading_started")

    def end(self, *signals: int) -> float:
        """Send these, one after the other. Returns the seconds until the daemon has ended, and checks how."""
        process = self.daemon.process
        assert process is not None
        children, began = self.daemon.children(), time.monotonic()
        with self.daemon.client(reconnect=False) as client, client.events() as events:
            process.send_signal(signals[0])
            until(events, "daemon_stopping")
            for number in signals[1:]:
                process.send_signal(number)
        status = process.wait(PATIENCE_S)
        took_s = time.monotonic() - began
        assert status == 0, f"the daemon ended with {status}"
        assert not self.daemon.socket.exists()
        _, alive = psutil.wait_procs(children, timeout=0.5)
        assert not alive, f"children live on: {alive}"
        for thread in self._threads:
            thread.join(PATIENCE_S)
        assert len(self.told) == len(self._threads), "some were never answered"
        assert set(self.told) <= {"shutting_down", "done"}, set(self.told)
        return took_s

    def close(self) -> None:
        for sock in self._deaf:
            sock.close()

    def _ask(self, model: object, prompt: str) -> None:
        def ask() -> None:
            try:
                with self.daemon.client(reconnect=False) as client:
                    client.process(prompt, model=str(model))
                self.told.append("done")
            except errors.MlxdError as error:
                self.told.append(getattr(error, "kind", type(error).__name__))

        self._threads.append(threading.Thread(target=ask, daemon=True))
        self._threads[-1].start()

    def _never_read(self) -> None:
        """A subscriber that also asked for more than a socket holds, and reads none of it."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.daemon.socket))
        self._deaf.append(sock)
        for number, method in enumerate(["events.subscribe", *["rpc.discover"] * 9]):
            with contextlib.suppress(OSError):
                sock.sendall(encode({"jsonrpc": "2.0", "id": number, "method": method}))


# By how they are sent.
SIGNALS = {"SIGTERM": [signal.SIGTERM], "SIGINT": [signal.SIGINT], "twice": [signal.SIGTERM, signal.SIGTERM]}
