"""Measuring on a thread: when it is done, and that a system which hangs or fails holds nobody up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from mlxd.core import actions as do
from mlxd.core import events as ev
from mlxd.core.core import Core, Limits
from mlxd.core.pressure import Reading
from mlxd.runtime import measuring
from mlxd.runtime.measuring import Measuring


class Warnings:
    """A log that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warning(self, event: str, /, **fields: Any) -> None:
        self.said.append(fields["how"])


class FakeMachine:
    """One whose answers a test gives, or keeps back."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        self.read = read
        self.reads = 0

    def footprint(self, pid: int) -> int | None:
        return None


class Bench:
    """Measuring, with a core that it tells, on a loop."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        self.loop = asyncio.get_running_loop()
        self.core = Core(Limits(100))
        self.log = Warnings()
        self.told: list[ev.Measured] = []
        self.news = asyncio.Event()
        self.said: list[do.Action] = []
        self.measuring = Measuring(FakeMachine(read), {}, self.core, self.tell, self.log, self.loop)  # type: ignore[arg-type]

    def tell(self, event: ev.Event) -> None:
        assert threading.current_thread() is threading.main_thread()
        if isinstance(event, ev.Measured):
            self.told.append(event)
            self.news.set()
        self.said += self.core.handle(event, self.loop.time())

    async def another(self) -> ev.Measured:
        await asyncio.wait_for(self.news.wait(), 20)
        self.news.clear()
        return self.told[-1]


GOOD = Reading(200, 150)


def run(test: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def test_it_is_done_when_asked_for_and_not_again() -> None:
    async def test() -> None:
        bench = Bench(lambda: GOOD)
        await bench.measuring.begin()
        assert [one.reading for one in bench.told] == [GOOD]
        bench.measuring.rest()
        assert bench.measuring._timer is None, "nobody has a use for it"
        bench.measuring.measure()
        bench.measuring.measure()  # the first has begun: what changed since needs one of its own
        await bench.another()
        first = bench.told[-1]
        while bench.told[-1] is first:
            await bench.another()
        assert bench.told[-1].began_at >= first.began_at
        bench.measuring.close()

    run(test)


def test_it_goes_on_while_somebody_has_a_use_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "INTERVAL_S", 0.01)

    async def test() -> None:
        bench = Bench(lambda: GOOD)
        bench.tell(ev.Found("org/m", "hub", 10))
        bench.tell(ev.Submit(1, 1, "org/m"))
        await bench.measuring.begin()
        for _ in range(5):
            await bench.another()
        bench.measuring.close()

    run(test)


def test_a_system_that_hangs_holds_no_load_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PATIENCE_S", 0.05)
    goes_on = threading.Event()

    def read() -> Reading:
        goes_on.wait(20)
        return GOOD

    async def test() -> None:
        bench = Bench(lambda: GOOD)
        await bench.measuring.begin()
        bench.measuring._system.read = read  # type: ignore[method-assign]
        bench.news.clear()
        bench.measuring.measure()
        assert (await bench.another()).reading is None
        assert bench.log.said == ["took too long"]
        bench.measuring.measure()
        bench.measuring._system.read = lambda: GOOD  # type: ignore[method-assign]
        goes_on.set()
        assert (await bench.another()).reading == GOOD, "it is tried again once the thread is back"
        bench.measuring.close()

    run(test)


def test_a_system_that_fails_says_so_once() -> None:
    def read() -> Reading:
        raise OSError("no")

    async def test() -> None:
        bench = Bench(read)
        for _ in range(3):
            bench.measuring.measure()
            assert (await bench.another()).reading is None
            while bench.measuring._task is not None:
                await asyncio.sleep(0)
        assert bench.log.said == ["failed: OSError: no"]
        bench.measuring.close()

    run(test)
