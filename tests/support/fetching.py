"""A real fetcher process with the test at the other end of its pipe."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from mlxd.childwire import Fetch, Fetched, Fetching, FetchPlan, PlanFetch, Verified, Verify, Where
from mlxd_client.codec import Decoder, Encoding, encode
from mlxd_client.errors import RpcError, from_wire

PATIENCE_S = 60.0


class Ended(AssertionError):
    """The process ended before it answered."""


class FetcherProcess:
    """One `python -m mlxd.fetch`. Keeps all it says; errors that it answers with are raised.

    Attributes:
        progress: all `fetching` notifications so far.
        beats: when heartbeats came, in monotonic seconds.
    """

    def __init__(self, env: Mapping[str, str], *, command: list[str] | None = None) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._decoder = Decoder(Encoding.MSGPACK, max_bytes=1 << 26)
        with theirs:
            self.process = subprocess.Popen(
                [*(command or [sys.executable, "-m", "mlxd.fetch"]), "--fd", str(theirs.fileno())],
                env={**os.environ, **env},
                pass_fds=[theirs.fileno()],
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
            )
        self.messages: list[dict[str, Any]] = []
        self.progress: list[Fetching] = []
        self.progress_at: list[float] = []
        self.beats: list[float] = []
        self.stderr = b""

    def __enter__(self) -> FetcherProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        if self.process.poll() is None:
            self.process.kill()
        if not self.process.stderr.closed:  # type: ignore[union-attr]
            self.stderr += self.process.communicate(timeout=PATIENCE_S)[1]

    def send(self, method: str, params: Any, request_id: int | None = None) -> None:
        message = {"jsonrpc": "2.0", "method": method, "params": params}
        self._socket.sendall(encode(message if request_id is None else {**message, "id": request_id}))

    def until(self, holds: Callable[[dict[str, Any]], bool], timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """The first message from here on of which this holds."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            data = self._socket.recv(1 << 16)
            if not data:
                self.stderr += self.process.communicate(timeout=PATIENCE_S)[1]
                raise Ended(f"exit {self.process.returncode}: {self.stderr.decode()}")
            self._decoder.feed(data)
            found = None
            for message in self._decoder:
                assert isinstance(message, dict)
                self._keep(message)
                if found is None and holds(message):
                    found = message
            if found is not None:
                return found

    def _keep(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        if message.get("method") == "fetching":
            self.progress.append(msgspec.convert(message["params"], Fetching))
            self.progress_at.append(time.monotonic())
        if message.get("method") == "heartbeat":
            self.beats.append(time.monotonic())

    def answer(self, request_id: int = 1, timeout_s: float = PATIENCE_S) -> Any:
        """The result, or the error, raised."""
        message = self.until(lambda message: message.get("id") == request_id, timeout_s)
        if "error" in message:
            raise from_wire(message["error"])
        return message["result"]

    def ask(self, method: str, params: Any, timeout_s: float = PATIENCE_S) -> Any:
        self.send(method, params, 1)
        return self.answer(1, timeout_s)

    def until_progress(self, holds: Callable[[Fetching], bool], timeout_s: float = PATIENCE_S) -> Fetching:
        self.until(lambda message: message.get("method") == "fetching" and holds(self.progress[-1]), timeout_s)
        return next(at for at in self.progress if holds(at))

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)


def where(cache: Path, repo: str = "org/name", **how: Any) -> Where:
    return Where(repo=repo, cache=str(cache), **how)


def fetch(env: Mapping[str, str], cache: Path, repo: str = "org/name", *, at: Mapping[str, Any] | None = None,
          timeout_s: float = PATIENCE_S, **how: Any) -> Fetched:  # fmt: skip
    """Download in a process of its own. `at` goes to Where, the rest to Fetch."""
    with FetcherProcess(env) as fetcher:
        order = Fetch(where=where(cache, repo, **(at or {})), **how)
        return msgspec.convert(fetcher.ask("fetch", order, timeout_s), Fetched)


def plan(env: Mapping[str, str], cache: Path, repo: str = "org/name", context_length: int | None = None,
         **at: Any) -> FetchPlan:  # fmt: skip
    with FetcherProcess(env) as fetcher:
        order = PlanFetch(where=where(cache, repo, **at), context_length=context_length)
        return msgspec.convert(fetcher.ask("plan", order), FetchPlan)


def verify(env: Mapping[str, str], snapshot: Path) -> Verified:
    with FetcherProcess(env) as fetcher:
        return msgspec.convert(fetcher.ask("verify", Verify(snapshot=str(snapshot))), Verified)


def fetch_error(env: Mapping[str, str], cache: Path, repo: str = "org/name", **how: Any) -> RpcError:
    """What a download that fails says."""
    try:
        fetched = fetch(env, cache, repo, **how)
    except RpcError as error:
        return error
    raise AssertionError(f"it did not fail: {fetched}")
