"""The fetcher's loop: reads the pipe, beats, says how far the task got. The task itself runs on other threads."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from mlxd_client.errors import InvalidParams, InvalidRequest, MethodNotFound, RpcError

from ..childside import Pipe, Pulse, Stopped
from ..childwire import Fetch, Heartbeat, PlanFetch, Verify
from . import tasks
from .hub import Hub
from .report import Report, internal

PROGRESS_S = 0.11  # so that no second has more than ten

T = TypeVar("T")


class Latest(msgspec.Struct):
    repos: list[str]


# What is asked for, as what, and who does it.
METHODS: dict[str, tuple[type[Any], Callable[[Hub, Any, Report], Any]]] = {
    "plan": (PlanFetch, tasks.plan),
    "fetch": (Fetch, tasks.fetch),
    "verify": (Verify, tasks.verify),
    "latest": (Latest, lambda hub, order, report: tasks.latest(hub, order.repos, report)),
}


class Fetcher:
    """Serves one pipe, whose file descriptor is `fd`. `run` ends by Stopped, or PipeClosed once the daemon is gone."""

    def __init__(self, pipe: Pipe, fd: int, hub: Hub) -> None:
        self._pipe, self._fd, self._hub = pipe, fd, hub
        self._pulse = Pulse(pipe, lambda: Heartbeat(active=int(self._task is not None)))
        self._woken, self._waker = os.pipe()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(self._woken, select.POLLIN)
        self._task: tuple[int, Report] | None = None
        self._told_at = 0.0
        self._told: Any = None

    def run(self) -> None:
        while True:
            rest_s = self._pulse.rest_s
            if self._task is not None:
                rest_s = min(rest_s, max(0.0, self._told_at + PROGRESS_S - time.monotonic()))
            ready = {fd for fd, _ in self._poll.poll(rest_s * 1000 + 1)}
            if self._fd in ready:
                for message in self._pipe.receive(0.0):
                    self._handle(message)
            if self._woken in ready:
                os.read(self._woken, 64)
            self._tell()
            self._pulse.beat()
            self._pipe.flush()

    def _handle(self, message: dict[str, Any]) -> None:
        method, request_id = message.get("method"), message.get("id")
        if request_id is None:
            if method == "stop":
                raise Stopped
            return
        try:
            self._start(request_id, method, message.get("params", {}))
        except RpcError as error:
            self._pipe.fail(request_id, error)

    def _start(self, request_id: int, method: Any, params: Any) -> None:
        kind, work = METHODS.get(method, (None, None)) if isinstance(method, str) else (None, None)
        if kind is None or work is None:
            raise MethodNotFound(f"a fetcher has no method {method!r}")
        if self._task is not None:
            raise InvalidRequest("a fetcher does one thing at a time")
        order = _convert(params, kind)
        report = Report(self._wake)
        self._task = request_id, report
        threading.Thread(target=self._work, args=(work, order, report), daemon=True).start()

    def _wake(self) -> None:
        os.write(self._waker, b"\0")

    def _work(self, work: Callable[[Hub, Any, Report], Any], order: Any, report: Report) -> None:
        try:
            report.end(work(self._hub, order, report))
        except RpcError as error:
            report.end(error)
        except BaseException as error:
            report.end(internal(error))

    def _tell(self) -> None:
        """The task's end, or how far it got, where that is due and news."""
        if self._task is None:
            return
        request_id, report = self._task
        outcome = report.outcome
        now = time.monotonic()
        if now >= self._told_at + PROGRESS_S:
            self._told_at = now
            progress = report.progress() if report.progress is not None else None
            if progress is not None and progress != self._told:
                self._pipe.notify("fetching", progress)
                self._told = progress
        if outcome is None:
            return
        self._task = None
        if isinstance(outcome, RpcError):
            self._pipe.fail(request_id, outcome)
        else:
            self._pipe.reply(request_id, outcome)


def _convert(params: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(params, kind)
    except msgspec.ValidationError as error:
        raise InvalidParams(str(error)) from None
