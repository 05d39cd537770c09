"""Connections that keep books: what was asked, and what came back of it, while everything that can be killed is.

The law: what was asked on a connection is answered there once, with what was asked for or a typed error, or the
connection closes. One loop, for the suite (seconds) and for tools/faults.py (as long as one likes). What is asked and
whom it hits is drawn from one seed; the moments are the machine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from mlxd_client import codec
from mlxd_client.codec import Encoding
from mlxd_client.errors import BY_KIND
from support.daemon import Daemon

SETTINGS: dict[str, Any] = {"drain_s": 1, "max_batch": 4, "queue_limit": 64}
MODELS = ("one", "two", "three")
# How long an answer may take once nothing is killed any more.
ANSWER_S = 60.0
# How many requests one connection has open at most, and how many frames leave in one write.
MOST_OPEN = 40
MOST_TOGETHER = 5

Check = Callable[[dict[str, Any]], object]


class Wrong(AssertionError):
    """The law was broken."""


class Asked:
    """One request: what it was, and what a result of it has to be."""

    __slots__ = ("at", "check", "method", "seq", "streams", "text")

    def __init__(self, method: str, check: Check | None, streams: bool) -> None:
        self.method, self.check, self.streams = method, check, streams
        self.at = time.monotonic()
        self.seq, self.text = 0, ""

    def __repr__(self) -> str:
        return f"{self.method}, asked {time.monotonic() - self.at:.1f} s ago"


class Line:
    """One connection and its book.

    Attributes:
        open: what was asked and not answered, by id.
        closed: it is of no more use.
    """

    def __init__(self, encoding: Encoding, tally: Counter[str]) -> None:
        self.encoding = encoding
        self.tally = tally
        self.open: dict[int, Asked] = {}
        self.closed = False
        self.bad_frames = 0  # sent, and not refused yet; the answer names no id
        self.events = 0
        self._last_id = 0
        self._decoder = codec.Decoder(encoding)
        self._reading = asyncio.Event()
        self._reading.set()

    async def connect(self, path: Path) -> None:
        """Raises OSError."""
        self._reader, self._writer = await asyncio.open_unix_connection(str(path))
        self._task = asyncio.create_task(self._read())

    # --- asking ---------------------------------------------------------------------------------------------------

    def frame(self, method: str, params: dict[str, Any] | None, check: Check | None = None) -> bytes:
        """Write a request into the book. Returns its bytes."""
        self._last_id += 1
        self.open[self._last_id] = Asked(method, check, bool(params and params.get("stream")))
        self.tally["asked"] += 1
        message = {"jsonrpc": "2.0", "id": self._last_id, "method": method}
        return codec.encode(message if params is None else message | {"params": params}, self.encoding)

    def bad_frame(self) -> bytes:
        """A frame that is no request, and gets an error without an id."""
        self.bad_frames += 1
        return codec.encode({"jsonrpc": "2.0", "id": [1], "method": "ping"}, self.encoding)

    def notification(self, method: str, params: dict[str, Any]) -> bytes:
        return codec.encode({"jsonrpc": "2.0", "method": method, "params": params}, self.encoding)

    def send(self, data: bytes) -> None:
        if not self.closed and not self._writer.is_closing():
            self._writer.write(data)

    def finish(self) -> None:
        """Nothing more will be asked; the answers are still wanted."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write_eof()

    def leave(self) -> None:
        """Hang up on whatever is open."""
        self.tally["hung up on"] += len(self.open)
        self._end()
        self._writer.transport.abort()

    @property
    def looks(self) -> bool:
        return self._reading.is_set()

    def look_away(self) -> None:
        """Read nothing until `look`."""
        self._reading.clear()

    def look(self) -> None:
        self._reading.set()

    async def ended(self) -> None:
        """Wait until it is closed, by whomever. Raises Wrong."""
        await self._task

    def check(self) -> None:
        """Raises Wrong, if what came was."""
        if self._task.done():
            self._task.result()

    # --- what comes -----------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Until the connection closes. Raises Wrong."""
        try:
            while data := await self._reader.read(65_536):
                self._decoder.feed(data)
                while (message := self._decoder.next()) is not None:
                    if not isinstance(message, dict):
                        raise Wrong(f"the daemon sent no message: {message}")
                    if not self.closed:
                        self._take(message)
                await self._reading.wait()
        except ConnectionError:
            pass
        if not self.closed:
            self.tally["lost with their connection"] += len(self.open)
            self._end()
        self._writer.close()

    def _end(self) -> None:
        self.closed = True
        self.open.clear()
        self._reading.set()

    def _take(self, message: dict[str, Any]) -> None:
        method = message.get("method")
        if method == "event":
            self.events += 1
        elif method == "stream":
            self._take_piece(message["params"])
        elif method is not None:
            raise Wrong(f"a message of no known kind: {message}")
        elif message["id"] is None and message["error"]["data"].get("details", {}).get("reconnect"):
            self.tally["told to connect anew"] += 1  # what is open was not begun, and the connection closes
        elif message["id"] is None:
            self.bad_frames -= 1
            if self.bad_frames < 0:
                raise Wrong(f"an error for nobody: {message}")
        else:
            self._take_answer(message)

    def _take_piece(self, piece: dict[str, Any]) -> None:
        asked = self.open.get(piece["id"])
        if asked is None or not asked.streams:
            raise Wrong(f"a piece of {piece['id']}, which {'streams not' if asked else 'is not open'}: {piece}")
        if piece["seq"] != asked.seq:
            raise Wrong(f"piece {piece['seq']} of {piece['id']} where {asked.seq} was due")
        asked.seq += 1
        asked.text += piece.get("text", "")

    def _take_answer(self, message: dict[str, Any]) -> None:
        asked = self.open.pop(message["id"], None)
        if asked is None:
            raise Wrong(f"an answer to {message['id']}, which is not open: answered twice, or never asked: {message}")
        if ("result" in message) == ("error" in message):
            raise Wrong(f"neither a result nor an error: {message}")
        if "error" in message:
            self._take_error(asked, message["error"])
            return
        self.tally[f"answered {asked.method}"] += 1
        result = message["result"]
        if asked.streams and result["text"] != asked.text:
            raise Wrong(f"the pieces of {asked} were {asked.text!r}, the answer {result['text']!r}")
        if asked.check is not None and not asked.check(result):
            raise Wrong(f"a wrong answer to {asked}: {result}")

    def _take_error(self, asked: Asked, error: dict[str, Any]) -> None:
        kind = error["data"]["kind"]
        if kind not in BY_KIND or error["code"] != BY_KIND[kind].code:
            raise Wrong(f"an error of no known kind for {asked}: {error}")
        if kind == "internal_error" and "asked to fail" not in error["message"]:
            raise Wrong(f"a bug answered {asked}: {error}")
        self.tally[f"refused {kind}"] += 1


class Traffic:
    """Many connections in both encodings, each of which asks, cancels and leaves as it comes.

    Args:
        draw: decides everything.
        models: ids that answer as tests/support/bad_child.py does.
        hostile: also prompts that kill or stop the worker.

    Attributes:
        more: further requests, by method and params, that are asked as often as the others.
    """

    def __init__(
        self, socket: Path, draw: random.Random, models: list[str], *, connections: int = 24, hostile: bool = True
    ) -> None:
        self.socket, self.draw, self.models = socket, draw, models
        self.connections, self.hostile = connections, hostile
        self.more: list[tuple[str, dict[str, Any] | None]] = []
        self.tally: Counter[str] = Counter()
        self.lines: list[Line] = []
        self._ended: list[asyncio.Task[None]] = []
        self._number = 0

    async def turn(self) -> None:
        """One connection does one thing. Raises Wrong."""
        self._check_ended()
        if sum(not line.closed for line in self.lines) < self.connections:
            await self._connect()
        self.lines = [line for line in self.lines if not line.closed]
        if self.lines:
            self._act(self.draw.choice(self.lines))

    async def settle(self) -> None:
        """Ask nothing more: all that is open has to be answered, or its connection closed. Raises Wrong."""
        for line in self.lines:
            line.look()
        give_up_at = time.monotonic() + ANSWER_S
        while left := [line for line in self.lines if line.open or (line.bad_frames and not line.closed)]:
            self._check_ended()
            if time.monotonic() > give_up_at:
                raise Wrong(f"never answered: {[list(line.open.values())[:3] for line in left]}")
            await asyncio.sleep(0.05)
        for line in self.lines:
            if not line.closed:
                line.leave()
        await asyncio.gather(*(line.ended() for line in self.lines), *self._ended)
        self.lines = []

    def _check_ended(self) -> None:
        for line in self.lines:
            line.check()
        for task in [task for task in self._ended if task.done()]:
            self._ended.remove(task)
            task.result()

    async def _connect(self) -> None:
        line = Line(self.draw.choice(list(Encoding)), self.tally)
        try:
            await line.connect(self.socket)
        except OSError:  # the daemon is being started again
            await asyncio.sleep(0.02)
            return
        self.tally["connections"] += 1
        self.lines.append(line)

    # --- what one does --------------------------------------------------------------------------------------------

    def _act(self, line: Line) -> None:
        acts: list[tuple[Callable[[Line], None], float]] = [
            (self._ask, 20), (self._cancel, 5), (self._leave, 0.5), (self._finish, 0.3), (self._look_away, 0.5),
        ]  # fmt: skip
        act = self.draw.choices([act for act, _ in acts], [weight for _, weight in acts])[0]
        act(line)

    def _ask(self, line: Line) -> None:
        if len(line.open) >= MOST_OPEN:
            line.look()
            return
        frames = b"".join(self._frame(line) for _ in range(self.draw.randint(1, MOST_TOGETHER)))
        cut = self.draw.randrange(len(frames)) if self.draw.random() < 0.2 else 0
        for part in (frames[:cut], frames[cut:]):
            line.send(part)

    def _frame(self, line: Line) -> bytes:
        draw, model = self.draw, self.draw.choice(self.models)
        chance = draw.random()
        if chance < 0.5:
            return self._generate(line, model)
        if chance < 0.6:
            words = "w " * draw.randint(1, 9)
            return line.frame("tokens.count", {"text": words, "model": model}, lambda r: r["tokens"] == len(words) // 2)
        if chance < 0.64:
            return line.bad_frame()
        simple: list[tuple[str, dict[str, Any] | None]] = [
            ("ping", None), ("status", None), ("models.list", None), ("models.get", {"model": model}),
            ("jobs.list", None), ("models.load", {"model": model, "keep_alive": draw.choice((0, 60))}),
            ("models.unload", {"model": model}), ("models.acquire", {"model": model}), ("events.subscribe", None),
            ("nonsense", None), ("models.get", {"model": 3}), ("jobs.wait", {"job": "none"}), ("jobs.cancel", None),
            ("process", {"prompt": "x", "max_tokens": -1}), ("process", {"prompt": "x", "model": "no/such"}),
            ("events.unsubscribe", {"subscription": 1}), ("config.get", None), ("models.verify", {"model": model}),
        ]  # fmt: skip
        return line.frame(*draw.choice(simple + self.more))

    def _generate(self, line: Line, model: str) -> bytes:
        draw, chance = self.draw, self.draw.random()
        self._number += 1
        text, check = f"this is number {self._number}", None
        if chance < 0.3:
            text = f"!slow {draw.randint(1, 40)}"
        elif chance < 0.33 and self.hostile:
            text = draw.choice(("!segfault", "!abort", "!exit 3", "!garbage"))
        elif chance < 0.36:
            text = "!error"
        else:
            check = lambda result: result["text"] == text  # noqa: E731
        params: dict[str, Any] = {"model": model, "stream": draw.random() < 0.5}
        if draw.random() < 0.1:
            params["timeout_s"] = draw.choice((0.001, 0.05, 0.5))
        if draw.random() < 0.2:
            params["priority"] = "batch"
        if draw.random() < 0.5:
            return line.frame("process", params | {"prompt": text}, check)
        return line.frame("chat", params | {"messages": [{"role": "user", "content": text}]}, check)

    def _cancel(self, line: Line) -> None:
        """Something of its own, open or not, as a request or as a notification."""
        target = self.draw.choice([*line.open, 10**6])
        if self.draw.random() < 0.5:
            line.send(line.frame("cancel", {"id": target}, lambda r: r["cancelled"] in (True, False)))
        else:
            line.send(line.notification("cancel", {"id": target}))
        self.tally["cancels"] += 1

    def _leave(self, line: Line) -> None:
        line.leave()
        self.tally["hang-ups"] += 1

    def _finish(self, line: Line) -> None:
        """Half-closed: it is answered and then closed; this end asks nothing more."""
        line.finish()
        line.look()
        self.lines.remove(line)
        self._ended.append(asyncio.create_task(self._close_when_answered(line)))
        self.tally["half-closed"] += 1

    async def _close_when_answered(self, line: Line) -> None:
        give_up_at = time.monotonic() + ANSWER_S
        while line.open:
            if time.monotonic() > give_up_at:
                raise Wrong(f"never answered, half-closed: {list(line.open.values())[:3]}")
            await asyncio.sleep(0.05)
        if not line.closed:
            line.leave()
        await line.ended()

    def _look_away(self, line: Line) -> None:
        if line.looks:
            line.look_away()
            self.tally["looked away"] += 1
        else:
            line.look()


class Ledger:
    """Traffic on a daemon whose workers and which itself are killed and started again.

    Args:
        daemon: a running one, whose workers are tests/support/bad_child.py.
    """

    def __init__(self, daemon: Daemon, seed: int, *, connections: int = 24) -> None:
        self.daemon, self.seed = daemon, seed
        self._draw = random.Random(seed)
        models = [daemon.model(name) for name in MODELS]
        self.traffic = Traffic(daemon.socket, self._draw, models, connections=connections)
        self.tally = self.traffic.tally

    def run(self, seconds: float, *, restart_every_s: float = 3.0, kill_every_s: float = 0.4) -> Counter[str]:
        """Returns what was done. Raises Wrong, which names the seed."""
        try:
            asyncio.run(self._run(seconds, restart_every_s, kill_every_s))
        except Exception as error:
            raise Wrong(f"seed {self.seed}: {type(error).__name__}: {error}") from error
        return self.tally

    async def _run(self, seconds: float, restart_every_s: float, kill_every_s: float) -> None:
        end = time.monotonic() + seconds
        restarts = asyncio.create_task(self._restart_now_and_then(end, restart_every_s))
        kills = asyncio.create_task(self._kill_now_and_then(end, kill_every_s))
        while time.monotonic() < end:
            await self.traffic.turn()
            await asyncio.sleep(0.002)
            for task in (restarts, kills):
                if task.done():
                    task.result()
        await asyncio.gather(restarts, kills)
        await self.traffic.settle()

    async def _restart_now_and_then(self, end: float, every_s: float) -> None:
        while time.monotonic() + every_s < end:
            await asyncio.sleep(every_s * self._draw.uniform(0.5, 1.5))
            crash = self._draw.random() < 0.6
            self.tally["daemons killed" if crash else "daemons stopped"] += 1
            await asyncio.to_thread(self.daemon.restart, crash=crash)

    async def _kill_now_and_then(self, end: float, every_s: float) -> None:
        while time.monotonic() < end:
            await asyncio.sleep(every_s * self._draw.uniform(0.5, 1.5))
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                children = self.daemon.children()
                if children:
                    os.kill(self._draw.choice(children).pid, signal.SIGKILL)
                    self.tally["workers killed"] += 1
