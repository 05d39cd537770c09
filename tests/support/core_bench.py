"""A core at work alone: tell it events, look at what it wants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from mlxd.core import actions as do
from mlxd.core import events as ev
from mlxd.core.core import Core, Limits
from mlxd.core.invariants import check
from mlxd.core.limits import Rules
from mlxd_client import errors, types

T = TypeVar("T")
WALL = 1_000_000.0
MODEL = "org/model"


class Bench:
    """A core, its clock and what it wanted with the last event."""

    def __init__(self, **limits: float) -> None:
        bounds = Limits(budget_bytes=100, **({"downloads": 2} | limits))  # type: ignore[arg-type]
        self.core = Core(bounds, wall=WALL, job_prefix="load-abc123")
        self.now = 10.0
        self.said: list[do.Action] = []
        self._rids = 0

    def tell(self, event: ev.Event) -> list[do.Action]:
        self.said = self.core.handle(event, self.now)
        check(self.core)
        return self.said

    def ask(self, make: Callable[[int], ev.Event]) -> int:
        self._rids += 1
        self.tell(make(self._rids))
        return self._rids

    def have(self, model: str = MODEL, *, revision: str = "r0", need: int = 10) -> None:
        self.tell(ev.Found(model, "hub", need, revision, 1000, 2048))

    def configure(self, *, pinned: tuple[str, ...] = (), preload: tuple[str, ...] = (), **changes: Any) -> None:
        """New settings: `changes` are those of Limits, and keep_alive by model."""
        keep_alive = changes.pop("keep_alive", {})
        limits = dataclasses.replace(self.core.limits, **changes)
        self.tell(ev.Configure(limits, Rules(keep_alive, frozenset(pinned), preload)))

    def load(self, model: str = MODEL, lease: str | None = None) -> int:
        self.ask(lambda rid: ev.Ensure(rid, 1, model, lease))
        worker = self.one(do.StartWorker).worker
        self.tell(ev.Loaded(worker, 12, 2048))
        return worker

    def download(self, model: str = MODEL, *, repair: bool = False) -> str:
        rid = self.ask(lambda rid: ev.Download(rid, 1, model, repair))
        started = self.one(do.Started)
        assert started.rid == rid
        return started.job

    def fetch(self, model: str = MODEL) -> int:
        """Download; returns the fetcher that was started."""
        self.download(model)
        return self.one(do.StartFetcher).fetcher

    def fetched(self, fetcher: int, revision: str = "r1", need: int = 10) -> None:
        model = self.core._book.by_fetcher[fetcher].model
        self.tell(ev.Fetched(fetcher, ev.Found(model, "hub", need, revision, 2000, 4096)))

    def gone(self, fetcher: int, error: errors.RpcError | None = None) -> None:
        self.tell(ev.FetcherExited(fetcher, error))

    def delete(self, model: str = MODEL) -> int:
        return self.ask(lambda rid: ev.Delete(rid, 1, model))

    def one(self, kind: type[T]) -> T:
        (found,) = self.all(kind)
        return found

    def all(self, kind: type[T]) -> list[T]:
        return [action for action in self.said if isinstance(action, kind)]

    def names(self) -> list[str]:
        """The events of models that were told, in order."""
        return [p.name for p in self.all(do.Publish) if p.model is not None and p.name != "queue"]

    def job(self, job: str) -> types.Job:
        return self.core.jobs[job].view(WALL)

    def view(self, model: str = MODEL) -> types.Model:
        return self.core.view(model)

    def refused(self, rid: int) -> errors.RpcError:
        fail = self.one(do.Fail)
        assert fail.rid == rid
        return fail.error
