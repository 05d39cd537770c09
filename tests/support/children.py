"""A supervisor with short limits, a handler that records, and specs for the programmable child."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mlxd.children import Child, ChildSettings, ChildSpec, Death, Supervisor
from mlxd.childwire import Heartbeat, Ready

__all__ = ["BAD_CHILD", "QuietLog", "Recorder", "bad", "generate", "quick", "supervise"]

BAD_CHILD = Path(__file__).with_name("bad_child.py")

# A fresh interpreter on a busy machine may take seconds; limits that a test means to run into are set by that test.
PATIENT = ChildSettings(ready_s=30, heartbeat_s=20, stop_grace_s=20, term_grace_s=20, eof_grace_s=0.2)


class QuietLog:
    """Keeps (level, event, fields)."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, dict[str, Any]]] = []

    def _keep(self, level: str) -> Callable[..., None]:
        return lambda event, /, **fields: self.entries.append((level, event, fields))

    def __getattr__(self, level: str) -> Callable[..., None]:
        if level not in ("debug", "info", "warning", "error"):
            raise AttributeError(level)
        return self._keep(level)

    def events(self) -> list[str]:
        return [event for _, event, _ in self.entries]


class Recorder:
    """A handler that keeps all it is told, and checks the order that the supervisor promises."""

    def __init__(self) -> None:
        self.ready: list[Ready] = []
        self.messages: list[dict[str, Any]] = []
        self.heartbeats: list[Heartbeat] = []
        self.deaths: list[Death] = []
        self.news = asyncio.Event()

    def on_ready(self, child: Child, ready: Ready, /) -> None:
        assert not self.ready
        assert not self.deaths
        self.ready.append(ready)
        self.news.set()

    def on_message(self, child: Child, message: dict[str, Any], /) -> None:
        assert self.ready
        assert not self.deaths
        self.messages.append(message)
        self.news.set()

    def on_heartbeat(self, child: Child, heartbeat: Heartbeat, /) -> None:
        assert self.ready
        assert not self.deaths
        self.heartbeats.append(heartbeat)
        self.news.set()

    def on_exit(self, child: Child, death: Death, /) -> None:
        assert child.death is death
        assert not self.deaths
        self.deaths.append(death)
        self.news.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for the condition; a death before it fails at once."""
        while not condition():
            assert not self.deaths, self.deaths[0]
            self.news.clear()
            await self.news.wait()

    async def until_ready(self) -> None:
        await self.until(lambda: self.ready)

    async def until_beats(self, count: int) -> None:
        await self.until(lambda: len(self.heartbeats) >= count)

    async def answer(self, request_id: int) -> dict[str, Any]:
        await self.until(lambda: any(message.get("id") == request_id for message in self.messages))
        return next(message for message in self.messages if message.get("id") == request_id)


def supervise(
    tmp_path: Path, log: QuietLog | None = None, clock: Callable[[], float] | None = None, **limits: Any
) -> Supervisor:
    settings = msgspec.structs.replace(PATIENT, **limits)
    return Supervisor(tmp_path / "run", log=log or QuietLog(), settings=settings, clock=clock)


def bad(mode: str = "worker", **env: str) -> ChildSpec:
    """The programmable child; see bad_child.py for its modes."""
    argv = [sys.executable, str(BAD_CHILD), "--mode", mode]
    return ChildSpec(kind="worker", name=f"test/{mode}", argv=argv, env=env)


def quick(code: str, **env: str | None) -> ChildSpec:
    """A child that is a line of Python without imports of ours."""
    return ChildSpec(kind="worker", name="test/quick", argv=[sys.executable, "-ISc", code], env=env)


def generate(prompt: str, **options: Any) -> dict[str, Any]:
    return {
        "kind": "process",
        "messages": [{"role": "user", "content": prompt}],
        "options": options,
        "stream": True,
    }
