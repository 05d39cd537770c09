"""The fuzzer of a live daemon: conversations on several connections at once, kept where they make it do new things.

The daemon is a process of its own with `bad_child` workers; only its coverage is looked at from outside. A finding is
an answer that is missing, too much, for nobody's request or an `internal_error`; a daemon that ends, stops answering
others, writes an error to its log, or holds on to descriptors or memory.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import select
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from mlxd.server.requests import MEMBERS
from mlxd_client import Client
from mlxd_client.codec import Decoder, Invalid
from mlxd_client.errors import ProtocolError
from support.daemon import Daemon

from .corpus import Corpus
from .talks import Line, Talk, changed, invented

__all__ = ["Report", "fuzz"]

_MAP_BYTES = 65_536
_ANSWER_S = 60.0
_INVENTED = 0.2
# Another client asks after so many conversations.
_ASK_EVERY = 50
# What may be held beyond what the first tenth of the conversations left: a full log of events is some of it.
_GROWTH_BYTES = 48 * 1024 * 1024
_SPARE_FILES = 16
_LOG_LINES = 100  # of the daemon's log are shown with a finding


class Report(msgspec.Struct):
    """What so many frames came to; `blocks` of the daemon's code ran at least once."""

    frames: int = 0
    talks: int = 0
    connections: int = 0
    seconds: float = 0.0
    refusals: Counter[str] = msgspec.field(default_factory=Counter)
    blocks: int = 0
    kept: int = 0
    rss_bytes: tuple[int, int] = (0, 0)
    files: tuple[int, int] = (0, 0)
    findings: list[str] = []


class Wrong(Exception):
    """A finding, in words."""


class Connection:
    """One line of a conversation as it is played, and what it must come to."""

    def __init__(self, path: Path, line: Line, draw: random.Random) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(os.fspath(path))
        self.sock.setblocking(False)
        self._line = line
        data = line.data()
        edges = sorted(draw.randrange(len(data) + 1) for _ in range(draw.randrange(4)))
        self._chunks = [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)], strict=True) if a < b]
        self._expect(data)
        self._decoder: Decoder | None = None
        self.answered: Counter[Any] = Counter()
        self.kinds: list[str] = []
        self.closed = False

    def _expect(self, data: bytes) -> None:
        """What the codec makes of these bytes; what the daemon makes of its messages is seen by its answers."""
        decoder = Decoder()
        # A last line needs no end where nothing more comes.
        decoder.feed(data + b"\n" if self._line.finish and data[:1] == b"{" else data)
        self.asked: Counter[Any] = Counter()  # ids by how often they were asked for
        self.due = 0
        self.broken = False
        try:
            for message in decoder:
                if isinstance(message, Invalid):
                    self._ask(message.id)
                elif not _is_notification(message):
                    self._ask(message.get("id"))
        except ProtocolError:
            self.broken = True
        self._rest = decoder.buffered

    def _ask(self, request_id: Any) -> None:
        self.due += 1
        if type(request_id) in (int, str):
            self.asked[request_id] += 1

    @property
    def done(self) -> bool:
        """Everything is answered, or the daemon has closed. Bytes that are no frame must make it close."""
        return self.closed or not (self._chunks or self.broken or self.answered.total() < self.due)

    def send(self) -> None:
        try:
            sent = self.sock.send(self._chunks[0])
        except BlockingIOError:
            return
        except OSError:  # it has closed; what it said comes first
            self._chunks.clear()
            return
        self._chunks[0] = self._chunks[0][sent:]
        if not self._chunks[0]:
            del self._chunks[0]
        if not self._chunks and self._line.finish:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)

    @property
    def sending(self) -> bool:
        return bool(self._chunks)

    def receive(self) -> None:
        """Raises Wrong."""
        try:
            data = self.sock.recv(262_144)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self.closed = True
            self._chunks.clear()
            return
        self._decoder = self._decoder or Decoder()
        self._decoder.feed(data)
        for message in self._messages():
            if isinstance(message, Invalid):
                raise Wrong(f"the daemon sent what is no message: {message.reason}")
            if "method" not in message:
                self._on_answer(message)

    def _messages(self) -> Iterator[dict[str, Any] | Invalid]:
        assert self._decoder is not None
        try:
            yield from self._decoder
        except ProtocolError as error:
            raise Wrong(f"the daemon sent what is no frame: {error}") from None

    def _on_answer(self, message: dict[str, Any]) -> None:
        self.answered[message["id"]] += 1
        if "error" in message:
            self.kinds.append(message["error"]["data"]["kind"])
            if self.kinds[-1] == "internal_error" and "asked to fail" not in message["error"]["message"]:
                raise Wrong(f"internal_error: {message}")
        for request_id, count in self.answered.items():
            if request_id is not None and count > self.asked[request_id]:
                raise Wrong(f"{count} answers to {self.asked[request_id]} requests of id {request_id!r}")
        most = self.due + (self.broken or bool(self._rest))
        if self.answered.total() > most:
            raise Wrong(f"{self.answered.total()} answers where there are {most} requests")


def _is_notification(message: dict[str, Any]) -> bool:
    sound = type(message.get("method")) is str and message.get("jsonrpc") == "2.0" and message.keys() <= MEMBERS
    return sound and "id" not in message


def play(path: Path, talk: Talk, draw: random.Random) -> list[str]:
    """Have one conversation. Returns the kinds of errors that were answered. Raises Wrong."""
    lines = [Connection(path, line, draw) for line in talk.lines]
    give_up_at = time.monotonic() + _ANSWER_S
    try:
        while waiting := [line for line in lines if not line.done]:
            sending = [line.sock for line in waiting if line.sending]
            readable, writable, _ = select.select([line.sock for line in waiting], sending, [], 1.0)
            for line in waiting:
                if line.sock in writable:
                    line.send()
                if line.sock in readable:
                    line.receive()
            if time.monotonic() > give_up_at:
                missing = [(dict(line.asked - line.answered), line.broken) for line in waiting]
                raise Wrong(f"not answered within {_ANSWER_S:g} s: (ids, broken) {missing}")
        for line in lines:
            if not line.closed:
                line.receive()  # one answer too many would be here
    finally:
        for line in lines:
            line.sock.close()
    return [kind for line in lines for kind in line.kinds]


class _Run:
    """One daemon and what is known of it."""

    def __init__(self, daemon: Daemon, hits: mmap.mmap, seed: int, folder: Path | None) -> None:
        self.daemon, self.hits = daemon, hits
        self.draw = random.Random(seed)
        self.corpus: Corpus[Talk] = Corpus(folder)
        self.report = Report()
        self.process = psutil.Process(daemon.pid)
        self._blocks = 0

    def have(self, talk: Talk, steady: Client) -> None:
        """Have one conversation, and keep it if it showed something new; others are served meanwhile. Raises Wrong."""
        report = self.report
        try:
            kinds = play(self.daemon.socket, talk, self.draw)
        except (Wrong, OSError) as error:
            raise Wrong(f"{error}\n    {msgspec.msgpack.encode(talk).hex()}") from None
        report.talks += 1
        report.frames += talk.frames
        report.connections += len(talk.lines)
        report.refusals.update(kinds)
        state = self.hits[:]
        ran = _MAP_BYTES - state.count(0)
        features: list[Hashable] = list(set(kinds))
        if ran > self._blocks:
            self._blocks = ran
            features += [number for number, hit in enumerate(state) if hit]
        self.corpus.learn(talk, features)
        if report.talks % _ASK_EVERY == 0:
            steady.ping()

    def next(self) -> Talk:
        if not self.corpus.inputs or self.draw.random() < _INVENTED:
            return invented(self.draw)
        return changed(self.draw, self.corpus.pick(self.draw), self.corpus.pick(self.draw))

    def held(self) -> tuple[int, int]:
        """Memory and descriptors of the daemon, once it has no other client and no worker."""
        with self.daemon.client() as client:
            self._wait(lambda: client.status().clients <= 2)
            client.unload("mlxd/cleanup")
            self._wait(lambda: not self.process.children())
        return self.process.memory_info().rss, self.process.num_fds()

    def _wait(self, holds: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + _ANSWER_S
        while not holds():
            if time.monotonic() > give_up_at:
                raise Wrong("it holds on to connections or children that nobody needs")
            time.sleep(0.05)


@contextlib.contextmanager
def _covered_daemon() -> Iterator[tuple[Daemon, mmap.mmap]]:
    tools = Path(__file__).resolve().parents[1]
    with tempfile.NamedTemporaryFile(prefix="mlxd-hits-") as file:
        file.truncate(_MAP_BYTES)
        program = [sys.executable, "-m", "fuzzing.covered_daemon", file.name]
        path = os.pathsep.join([str(tools), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {"PYTHONPATH": path, "BAD_CHILD_LIFE_S": "86400"}
        with (
            mmap.mmap(file.fileno(), 0) as hits,
            Daemon(bad_child="worker", program=program, env=env, heartbeat_s=60) as daemon,
        ):
            yield daemon, hits


def fuzz(frames: int | None, seed: int = 0, *, seconds: float | None = None, folder: Path | None = None) -> Report:
    """Send so many frames, or for so long, whatever ends first; a finding ends it too.

    Args:
        folder: where conversations that were kept lie between runs.
    """
    with _covered_daemon() as (daemon, hits), daemon.client(timeout_s=10.0) as steady:
        run = _Run(daemon, hits, seed, folder)
        report = run.report
        began = time.monotonic()
        try:
            _play_all(run, steady, frames, seconds)
        except Wrong as error:
            report.findings.append("\n".join([str(error), *daemon.log().splitlines()[-_LOG_LINES:]]))
        report.seconds = time.monotonic() - began
        report.blocks, report.kept = _MAP_BYTES - hits[:].count(0), len(run.corpus.inputs)
    return report


def _play_all(run: _Run, steady: Client, frames: int | None, seconds: float | None) -> None:
    """Raises Wrong."""
    report, began, before = run.report, time.monotonic(), None
    waiting = run.corpus.kept(Talk)[::-1]
    while True:
        spent = time.monotonic() - began
        part = max(report.frames / frames if frames else 0.0, spent / seconds if seconds else 0.0)
        if part >= 1.0:
            return _judge(run, before)
        if before is None and part > 0.1 and not waiting:
            before = run.held()
        run.have(waiting.pop() if waiting else run.next(), steady)


def _judge(run: _Run, before: tuple[int, int] | None) -> None:
    """What the daemon holds now, and what it wrote."""
    report, after = run.report, run.held()
    if before is not None:
        report.rss_bytes, report.files = (before[0], after[0]), (before[1], after[1])
        if after[0] > before[0] + _GROWTH_BYTES:
            report.findings.append(f"it grew from {before[0]:,} to {after[0]:,} bytes")
        if after[1] > before[1] + _SPARE_FILES:
            report.findings.append(f"it had {before[1]} descriptors, and has {after[1]}")
    report.findings += [line for line in run.daemon.log().splitlines() if '"level":"error"' in line]
