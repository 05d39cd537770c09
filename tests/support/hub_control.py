"""The hub as the test drives it: each method of `Control` is one call that a test may make over the secret path."""

from __future__ import annotations

import typing
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from support import hub_faults
from support.hub_state import Gate, State
from support.hub_wire import Call, Content, Fault, Reply, Request


class TimedOut(Exception):
    """What was waited for did not happen."""


class Control:
    def __init__(self, state: State) -> None:
        self._state = state

    def call(self, call: Call) -> Reply:
        if call.method.startswith("_") or call.method == "call":
            raise AttributeError(call.method)
        method: Callable[..., Any] = getattr(self, call.method)
        hints = typing.get_type_hints(method)
        params = {name: msgspec.msgpack.decode(raw, type=hints[name]) for name, raw in call.params.items()}
        try:
            return Reply(result=method(**params))
        except TimedOut as error:
            return Reply(error=str(error), timed_out=True)

    # --- repositories ---

    def commit(self, repo: str, files: dict[str, Content], branch: str, lfs: list[str], tag: str | None) -> str:
        return self._state.commit(repo, files, branch, lfs, tag)

    def move(self, repo: str, branch: str, commit: str) -> None:
        with self._state.lock:
            self._state.repos[repo].branches[branch] = commit

    def tag(self, repo: str, name: str, commit: str) -> None:
        with self._state.lock:
            self._state.repos[repo].tags[name] = commit

    def remove(self, repo: str) -> None:
        with self._state.lock:
            del self._state.repos[repo]

    def etags(self, repo: str, commit: str) -> dict[str, str]:
        with self._state.lock:
            return {name: file.etag for name, file in self._state.repos[repo].commits[commit].items()}

    def gate(self, repo: str, gate: Gate | None) -> None:
        with self._state.lock:
            self._state.repos[repo].gate = gate

    def relative_redirects(self, on: bool) -> None:
        self._state.relative_redirects = on

    # --- misbehaviour ---

    def fault(self, fault: Fault) -> int:
        if fault.kind not in hub_faults.KINDS:
            raise ValueError(f"no such fault: {fault.kind}")
        fault.where = fault.where or hub_faults.KINDS[fault.kind]
        if unknown := set(fault.where) - {*hub_faults.ANYWHERE, "body"}:
            raise ValueError(f"no such place: {unknown}")
        fault.about_siblings = fault.kind in hub_faults.ABOUT_SIBLINGS
        return self._state.add_fault(fault)

    def fired(self, id: int) -> int:
        with self._state.lock:
            return next(fault.fired for fault in self._state.faults if fault.id == id)

    def clear(self, id: int | None, repo: str | None) -> None:
        self._remove(lambda fault: (id is None or fault.id == id) and (repo is None or fault.repo == repo))

    def release(self, repo: str | None, file: str | None, keep: bool) -> None:
        if keep:
            with self._state.changed:
                self._state.releases += 1
                self._state.changed.notify_all()
            return
        self._remove(
            lambda fault: (
                fault.kind == "hold"
                and (repo is None or fault.repo in (repo, "*"))
                and (file is None or fault.file == file)
            )
        )

    def _remove(self, which: Callable[[Fault], bool]) -> None:
        with self._state.changed:
            self._state.faults = [fault for fault in self._state.faults if not which(fault)]
            self._state.changed.notify_all()

    def throttle(self, bytes_per_s: float) -> None:
        self._state.rate.set(bytes_per_s)

    def pause(self, on: bool) -> None:
        with self._state.changed:
            self._state.paused = on
            self._state.changed.notify_all()

    # --- what happened ---

    def requests(self) -> list[Request]:
        with self._state.lock:
            return msgspec.convert(msgspec.to_builtins(self._state.records), list[Request])

    def forget(self) -> None:
        with self._state.lock:
            self._state.records.clear()
            self._state.sent.clear()

    def sent(self, file: str, repo: str | None) -> int:
        return self._state.sent_of(file, repo)

    def wait_requests(self, count: int, which: dict[str, Any], timeout_s: float) -> list[Request]:
        def seen() -> list[Request]:
            return [record for record in self._state.records if _is(record, which)]

        with self._state.lock:
            if not self._state.wait(lambda: len(seen()) >= count, timeout_s):
                raise TimedOut(f"{len(seen())} of {count} requests came, of those with {which}")
            return msgspec.convert(msgspec.to_builtins(seen()), list[Request])

    def wait_bytes(self, file: str, at_least: int, repo: str | None, timeout_s: float) -> int:
        if not self._state.wait(lambda: self._state.sent_of(file, repo) >= at_least, timeout_s):
            raise TimedOut(f"{self._state.sent_of(file, repo)} of {at_least} bytes of {file} were sent")
        return self._state.sent_of(file, repo)


def _is(record: Request, which: dict[str, Any]) -> bool:
    """Whether the record has these values: `path` and `file` are patterns, `where` is one of several places."""
    for name, wanted in which.items():
        value = getattr(record, name)
        if name in ("path", "file"):
            if value is None or not fnmatchcase(value, wanted):
                return False
        elif name == "where":
            if wanted not in value:
                return False
        elif name == "ended" and wanted == "*":
            if not value:
                return False
        elif value != wanted:
            return False
    return True
