"""The file of batch jobs between daemons: left to another, taken back, retried while somebody else has it; and what
becomes of ended jobs that several want the room of."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from mlxd.batch import schema
from mlxd.batch.store import Item, Outcome, Store
from mlxd.core import actions as do
from mlxd.core import events as ev
from mlxd.core.core import Core, Limits
from mlxd.runtime import ledger
from mlxd.runtime.ledger import Ledger, found
from mlxd_client.errors import InsufficientDisk, InternalError, RpcError, Unsupported
from support.loops import run

PATIENCE_S = 20.0
BUDGET = 1 << 30
ITEM = Item("process", b"", "m")


class Lines:
    """A log that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, event: str, /, **fields: Any) -> None:
        self.said.append(event)

    info = warning = error = say


class Bench:
    """A ledger, and a core that it tells; what that wants is left undone."""

    def __init__(self, path: Path, budget_bytes: int = BUDGET) -> None:
        self.loop = asyncio.get_running_loop()
        self.core = Core(Limits(100))
        self.log = Lines()
        self.said: list[do.Action] = []
        self.news = asyncio.Event()
        self.ledger = Ledger(path, budget_bytes, self.core, self.tell, self.log, self.loop)  # type: ignore[arg-type]

    def tell(self, event: ev.Event) -> None:
        self.said += self.core.handle(event, self.loop.time())
        self.news.set()

    async def until_told(self) -> None:
        self.news.clear()
        await asyncio.wait_for(self.news.wait(), PATIENCE_S)

    async def end_job(self, job: str, result: bytes = b"") -> None:
        """A job of one item, which is recorded."""
        kept, _ = await self.ledger.roomy(lambda store: store.submit(job, [ITEM]))
        self.tell(found(kept))
        self.ledger.record(Outcome(job, 0, False, result))
        while self.core.jobs[job].ended_at is None:
            await self.until_told()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(schema, "BUSY_S", 0.01)
    monkeypatch.setattr(ledger, "AGAIN_S", 0.05)
    return tmp_path / "batch.sqlite3"


def held(path: Path) -> sqlite3.Connection:
    """The file, as another process has it."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    return other


def with_a_job(path: Path) -> None:
    store = Store(path, BUDGET)
    store.submit("j", [ITEM])
    store.close()


def test_a_file_that_somebody_has_is_tried_again(path: Path) -> None:
    with_a_job(path)

    async def test() -> None:
        other, bench = held(path), Bench(path)
        await bench.ledger.begin()
        assert not bench.ledger.busy, "it would keep the daemon up for as long as that lasts"
        await bench.until_told()  # a try that failed, too, may leave the daemon idle
        assert not bench.core.jobs
        other.close()
        while not bench.core.jobs:
            await bench.until_told()
        assert bench.log.said == ["batch jobs cannot be read"]
        await bench.ledger.close()

    run(test())


def test_a_file_that_cannot_be_read_keeps_no_other_daemon_from_taking_over(path: Path) -> None:
    with_a_job(path)

    async def test() -> None:
        other, bench = held(path), Bench(path)
        await bench.ledger.begin()
        await asyncio.wait_for(bench.ledger.let_go(), PATIENCE_S)
        other.close()
        successor = Bench(path)
        await successor.ledger.begin()
        assert list(successor.core.jobs) == ["j"]
        await successor.ledger.close()
        await bench.ledger.take_back()
        assert list(bench.core.jobs) == ["j"]
        await bench.ledger.close()

    run(test())


def test_what_is_taken_back_is_opened_with_the_next_use(path: Path) -> None:
    """Also where that fails at first."""

    async def test() -> None:
        bench = Bench(path)
        await bench.end_job("a")
        await bench.ledger.let_go()
        other = held(path)
        await bench.ledger.take_back()
        with pytest.raises(InternalError, match="locked"):
            await bench.ledger.ask(Store.jobs)
        other.close()
        assert [job.job for job in await bench.ledger.ask(Store.jobs)] == ["a"]
        await bench.end_job("b")
        await bench.ledger.close()

    run(test())


def test_what_a_newer_daemon_has_brought_forward_is_left_alone(path: Path) -> None:
    async def test() -> None:
        bench = Bench(path)
        await bench.end_job("a")
        await bench.ledger.let_go()
        newer = sqlite3.connect(path)
        newer.execute("PRAGMA user_version = 99")
        newer.close()
        await bench.ledger.take_back()
        with pytest.raises(Unsupported):
            await bench.ledger.ask(Store.jobs)
        await bench.ledger.close()

    run(test())


def test_two_that_need_room_at_once_both_get_it(path: Path) -> None:
    """The same ended job is the oldest to both."""

    async def test() -> None:
        bench = Bench(path, 1_000_000)
        for number in range(4):
            await bench.end_job(f"old-{number}", bytes(200_000))
        big = [Item("process", bytes(250_000), "m")]

        def put_in(job: str) -> Coroutine[Any, Any, Any]:
            return bench.ledger.roomy(lambda store: store.submit(job, big))

        made = await asyncio.gather(put_in("x"), put_in("y"))
        assert [job.job for job, _ in made] == ["x", "y"]
        assert "a batch job is deleted to make room" in bench.log.said
        assert "old-0" not in bench.core.jobs
        await bench.ledger.close()

    run(test())


def test_what_was_lost_with_its_file_can_be_deleted(path: Path) -> None:
    async def test() -> None:
        bench = Bench(path)
        kept, _ = await bench.ledger.roomy(lambda store: store.submit("j", [ITEM]))
        bench.tell(found(kept))

        def damaged(store: Store) -> None:
            raise schema.Damaged("a page is torn")

        with pytest.raises(InternalError, match="damaged"):
            await bench.ledger.ask(damaged)
        assert bench.core.jobs["j"].state == "failed"
        await bench.ledger.delete("j")
        assert not bench.core.jobs
        await bench.ledger.close()

    run(test())


def test_a_file_that_is_none_is_told_as_what_it_is(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere" / "file")

    async def test() -> None:
        bench = Bench(path)
        with pytest.raises(RpcError) as refused:
            await bench.ledger.ask(Store.jobs)
        assert refused.value.kind == "permission_denied"
        await bench.ledger.close()

    run(test())


def test_ended_jobs_do_not_make_room_on_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        bench = Bench(path)
        await bench.end_job("a")

        def full(store: Store) -> None:
            raise InsufficientDisk("full")

        monkeypatch.setattr(Store, "over_budget", lambda store: False)
        with pytest.raises(InsufficientDisk):
            await bench.ledger.roomy(full)
        assert list(bench.core.jobs) == ["a"]
        await bench.ledger.close()

    run(test())
