"""The daemon's end of one fetcher: hands it its one task, and sorts what comes back.

Knows the frames of childwire.py and nothing of models' states or jobs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from mlxd_client import errors

from . import childwire as wire
from .children.child import Child
from .children.death import Death
from .children.interface import ChildSpec
from .children.supervisor import Supervisor

__all__ = ["FetcherLink", "Fetchers"]

T = TypeVar("T")

# What huggingface_hub finds a user's token by, and what keeps it from doing so. Children get none of the daemon's
# secrets; fetchers get these.
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_ON_TOKENS = ("HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN")
# How long a fetcher may take to go once it is of no use: what it has is on disk already.
_GRACE_S = 0.3


class FetcherLink(Generic[T]):
    """One task from spawn to exit; the handler of its child.

    Args:
        method, params: the task.
        result: what its answer is.
        on_progress: called with each `fetching` frame.
        on_answer: called once with the result or an error, unless the child dies before.
        on_exit: called once, last of all.
    """

    def __init__(
        self,
        method: str,
        params: Any,
        result: type[T],
        *,
        on_answer: Callable[[T | errors.RpcError], None],
        on_exit: Callable[[Death], None],
        on_progress: Callable[[wire.Fetching], None] | None = None,
    ) -> None:
        self.child: Child | None = None
        self._method, self._params, self._result = method, params, result
        self._on_answer, self._on_exit, self._on_progress = on_answer, on_exit, on_progress
        self._request: int | None = None

    def on_ready(self, child: Child, ready: wire.Ready, /) -> None:
        self._request = child.request(self._method, self._params)

    def on_heartbeat(self, child: Child, heartbeat: wire.Heartbeat, /) -> None:
        pass

    def on_message(self, child: Child, message: dict[str, Any], /) -> None:
        if message.get("method") == "fetching":
            if self._on_progress is not None:
                self._on_progress(msgspec.convert(message["params"], wire.Fetching))
        elif self._request is not None and message.get("id") == self._request:
            self._request = None
            failed = errors.from_wire(message["error"]) if "error" in message else None
            self._on_answer(failed if failed is not None else msgspec.convert(message["result"], self._result))

    def on_exit(self, child: Child, death: Death, /) -> None:
        self._on_exit(death)


class Fetchers:
    """Starts fetchers.

    Args:
        command: what runs one.
        environment: the daemon's own, in which the token, the hub's address and the proxies are found.
    """

    def __init__(
        self, supervisor: Supervisor, command: list[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._supervisor = supervisor
        self.command = command
        self._environment = dict(os.environ if environment is None else environment)

    @property
    def offline(self) -> bool:
        """Whether the user forbade asking the hub."""
        told = self._environment.get("HF_HUB_OFFLINE") or self._environment.get("TRANSFORMERS_OFFLINE") or ""
        return told.upper() in ("1", "ON", "YES", "TRUE")

    def start(self, name: str, link: FetcherLink[Any]) -> None:
        """Start one; `name` is what it works on, for people."""
        spec = ChildSpec(kind="fetcher", name=name, argv=self.command, env=self._changes())
        link.child = self._supervisor.spawn(spec, link)

    def _changes(self) -> dict[str, str | None]:
        token = next((self._environment[name] for name in _TOKENS if self._environment.get(name)), None)
        changes: dict[str, str | None] = {name: self._environment.get(name) for name in _ON_TOKENS}
        changes["HF_TOKEN"] = token
        # glibc would keep an arena of large blocks for each thread, and more of them the longer a download goes on.
        changes["MALLOC_ARENA_MAX"] = "2"
        if not self.offline:
            changes["HF_HUB_OFFLINE"] = None
        return changes

    @staticmethod
    def stop(link: FetcherLink[Any]) -> None:
        if link.child is not None:
            link.child.stop(_GRACE_S)

    async def ask(self, name: str, method: str, params: Any, result: type[T], *, timeout_s: float | None = None) -> T:
        """Have a fetcher of its own do one task, and wait for the answer. Whoever stops waiting ends it.

        Raises:
            RpcError: what the fetcher said, or DownloadFailed where it died or took longer than `timeout_s`.
        """
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def answered(outcome: T | errors.RpcError) -> None:
            if answer.done():
                return
            if isinstance(outcome, errors.RpcError):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)

        def ended(death: Death) -> None:
            answered(errors.DownloadFailed(f"the process that asked the hub ended: {death.describe()}"))

        link = FetcherLink(method, params, result, on_answer=answered, on_exit=ended)
        self.start(name, link)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise errors.DownloadFailed(f"the hub did not answer within {timeout_s:g} s") from None
        finally:
            self.stop(link)
