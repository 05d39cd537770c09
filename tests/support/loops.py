"""Runs a coroutine as a test: under uvloop or asyncio, with a deadline over all of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
import uvloop

__all__ = ["both_loops", "run", "until"]

T = TypeVar("T")

both_loops = pytest.mark.parametrize("loop_kind", ["uvloop", "asyncio"])


def run(main: Coroutine[Any, Any, T], *, loop_kind: str = "uvloop", deadline_s: float = 30.0) -> T:
    """The result of `main`. Raises TimeoutError past the deadline, and AssertionError for errors that nobody caught."""
    unhandled: list[dict[str, Any]] = []

    async def bounded() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unhandled.append(context))
        async with asyncio.timeout(deadline_s):
            return await main

    factory = uvloop.new_event_loop if loop_kind == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        result = runner.run(bounded())
    assert not unhandled, unhandled
    return result


async def until(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    """Wait for what no event tells, such as a file or another process's end."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        await asyncio.sleep(0.005)
