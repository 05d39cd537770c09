"""The file of batch jobs: whole whoever is killed when and however full the disk is, brought forward from older
versions, refused from newer ones, set aside where it is damaged."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from mlxd.batch import schema
from mlxd.batch.header import VERSION, version_of
from mlxd.batch.store import End, Item, Outcome, Store, Try
from mlxd_client import types
from mlxd_client.errors import InsufficientDisk, InvalidParams, NotFound
from support.tmpfs import Tmpfs

DATA = Path(__file__).parents[1] / "data"
BUDGET = 1 << 30
ERROR = msgspec.msgpack.encode(types.ErrorObject(kind="unsupported", message="no"))


def answer(text: str) -> bytes:
    usage = types.Usage(prompt_tokens=1, completion_tokens=1)
    made = types.Completion(model="m", text=text, finish_reason="stop", usage=usage, timings=types.Timings())
    return msgspec.msgpack.encode(made)


def items(count: int, *, size: int = 10, model: str = "m", named: str = "") -> list[Item]:
    return [Item("process", bytes(size), model, f"{named}{n}" if named else None) for n in range(count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "batch.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path, BUDGET)
    yield store
    store.close()


def places(store: Store, job: str) -> list[int]:
    return [one.index for one in store.results(job, -1, 1000).results]


# --- what it is asked ---------------------------------------------------------------------------------------------


def test_a_job_from_its_items_to_its_end(store: Store) -> None:
    job, new = store.submit("j", items(3, named="c"), name="a name", model="m")
    assert (new, job.state, job.total, job.name) == (True, "running", 3, "a name")
    assert store.record([Outcome("j", 1, True, answer("b"))])[0].done == 1
    assert store.results("j", -1, 10).results == [], "the first item has no result yet"
    stand = store.record([Outcome("j", 0, False, ERROR), Try("j", 2, 1)])[0]
    assert (stand.done, stand.failed, stand.state) == (2, 1, "running")
    waiting = store.waiting("j", (0, -1), 10)
    assert [(place, tries) for place, tries, _, _ in waiting.items] == [(2, 1)]
    assert not waiting.more
    stand = store.record([Outcome("j", 2, True, answer("c"))])[0]
    assert (stand.done, stand.state, stand.ended_at is not None) == (3, "done", True)
    page = store.results("j", -1, 2)
    assert [(one.index, one.custom_id) for one in page.results] == [(0, "c0"), (1, "c1")]
    assert page.results[0].error is not None
    assert page.results[0].error.kind == "unsupported"
    assert page.results[1].result is not None
    assert page.results[1].result.text == "b"
    assert (page.more, page.complete) == (True, False)
    page = store.results("j", 1, 2)
    assert ([one.index for one in page.results], page.more, page.complete) == ([2], False, True)


def test_an_item_has_one_result(store: Store) -> None:
    store.submit("j", items(2))
    store.record([Outcome("j", 0, True, answer("first"))])
    stand = store.record([Outcome("j", 0, False, ERROR), Outcome("j", 0, True, answer("third"))])[0]
    assert (stand.done, stand.failed) == (1, 0)
    (only,) = store.results("j", -1, 10).results
    assert only.result is not None
    assert only.result.text == "first"


def test_a_key_is_one_job(store: Store) -> None:
    first, _ = store.submit("j", items(2), key="k")
    assert store.submit("other", items(2), key="k") == (first, False)
    with pytest.raises(InvalidParams) as refused:
        store.submit("third", items(3), key="k")
    assert refused.value.details["field"] == "key"
    store.record([End("j", "cancelled", None)])
    store.forget("j")
    assert store.submit("fourth", items(3), key="k")[1], "a deleted job's key is free"


def test_items_are_added_to_an_open_job_once(store: Store) -> None:
    store.submit("j", [], opened=True)
    assert store.waiting("j", (0, -1), 10).items == []
    grown = store.append("j", items(3, named="a"), 0, "m")
    assert grown is not None
    assert (grown.total, grown.model) == (3, "m")
    assert store.append("j", items(3, named="a"), 0, "m") is None, "the answer was lost, and it is asked again"
    grown = store.append("j", items(2, named="b", model="n"), 3, "n")
    assert grown is not None
    assert (grown.total, grown.model) == (5, None)
    with pytest.raises(InvalidParams, match="has 5 items"):
        store.append("j", items(2, named="d"), 4, "m")
    with pytest.raises(InvalidParams, match=r"items\[1\].*custom_id 'b1'"):
        store.append("j", [Item("chat", b"", "m", "new"), Item("chat", b"", "m", "b1")], None, "m")
    assert store.job("j").total == 5, "all of it or nothing"
    store.start("j")
    with pytest.raises(InvalidParams, match="takes no more"):
        store.append("j", items(1, named="e"), 5, "m")
    assert store.append("j", items(2, named="b", model="n"), 3, "n") is None


def test_items_of_one_model_run_together(store: Store) -> None:
    mixed = [Item("process", b"", "ab"[n % 2]) for n in range(6)]
    store.submit("j", mixed)
    first = store.waiting("j", (0, -1), 4)
    assert [place for place, *_ in first.items] == [0, 2, 4, 1]
    assert first.more
    rest = store.waiting("j", first.cursor, 4)
    assert ([place for place, *_ in rest.items], rest.more) == ([3, 5], False)


def test_pages_are_bounded_in_bytes(store: Store) -> None:
    store.submit("j", items(10, size=200_000))
    assert 1 <= len(store.waiting("j", (0, -1), 10).items) < 5
    store.record([Outcome("j", n, True, answer("x" * 200_000)) for n in range(10)])
    seen: list[int] = []
    while True:
        page = store.results("j", seen[-1] if seen else -1, 1000)
        assert 1 <= len(page.results) < 5
        seen += [one.index for one in page.results]
        if page.complete:
            break
    assert seen == list(range(10))


def test_what_ended_early_goes_on_from_there(store: Store) -> None:
    store.submit("j", items(3))
    error = types.ErrorObject(kind="load_failed", message="no")
    store.record([Outcome("j", 1, True, answer("b")), End("j", "failed", error)])
    assert store.job("j").error == error
    store.record([Outcome("j", 0, True, answer("late"))])
    assert places(store, "j") == [1], "what comes after the end is dropped, and all that there is can be read"
    job, changed = store.start("j")
    assert (job.state, job.error, changed) == ("running", None, True)
    assert [place for place, *_ in store.waiting("j", (0, -1), 10).items] == [0, 2]
    assert store.start("j")[1] is False


def test_what_is_deleted_is_gone_from_the_disk(store: Store, path: Path) -> None:
    store.submit("j", [Item("process", b"a secret prompt", "m"), *items(5000, size=500)])
    store.record([Outcome("j", 0, True, answer("a secret answer"))])
    store.submit("other", items(1))
    full = sum(file.stat().st_size for file in path.parent.iterdir())
    assert full > 2_000_000
    with pytest.raises(InvalidParams, match="has not ended"):
        store.forget("j")
    store.record([End("j", "cancelled", None)])
    store.forget("j")
    with pytest.raises(NotFound):
        store.job("j")
    while store.sweep():
        pass
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 100_000
    for file in path.parent.iterdir():
        assert b"a secret" not in file.read_bytes()
    assert [job.job for job in store.jobs()] == ["other"]


def test_nobody_else_can_read_it(store: Store, path: Path) -> None:
    store.submit("j", items(1))
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600, file.name
    store.close()
    path.chmod(0o644)
    Store(path, BUDGET).close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_two_processes_do_not_share_it(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.submit("j", items(1))
    monkeypatch.setattr(schema, "BUSY_S", 0.01)
    with pytest.raises(Exception, match="locked"):
        Store(path, BUDGET)


# --- killed -------------------------------------------------------------------------------------------------------


def killed_before(statement: int, work: Callable[[], object]) -> bool:
    """Have another process do this work, and be killed before it hands SQLite its n-th statement. Returns whether it
    was: else it has done it all, and was killed before it could close anything."""
    child = os.fork()
    if child == 0:
        left = statement
        real = sqlite3.connect

        def connect(*args: object, **options: object) -> sqlite3.Connection:
            db: sqlite3.Connection = real(*args, **options)  # type: ignore[call-overload]
            db.set_trace_callback(count)
            return db

        def count(text: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sqlite3.connect = connect  # type: ignore[assignment]
        try:
            work()
        finally:
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


Work = Callable[[Store], object]


def at_each_statement(tmp_path: Path, before: Work, work: Work) -> Iterator[Path]:
    """The file as each of these kills leaves it, the last one as it is when all is done."""
    statement = 0
    while True:
        statement += 1
        path = tmp_path / str(statement) / "batch.sqlite3"
        path.parent.mkdir()
        store = Store(path, BUDGET)
        before(store)
        store.close()
        killed = killed_before(statement, lambda path=path: work(Store(path, BUDGET)))  # type: ignore[misc]
        yield path
        shutil.rmtree(path.parent)
        if not killed:
            assert statement > 3
            return


def test_killed_while_a_job_is_put_in(tmp_path: Path) -> None:
    seen = set()
    for path in at_each_statement(tmp_path, lambda store: None, lambda store: store.submit("j", items(3), key="k")):
        store = Store(path, BUDGET)
        seen.add(tuple((job.job, job.total) for job in store.jobs()))
        job, new = store.submit("again", items(3), key="k")
        assert (job.job == "j") == (not new)
        assert len(store.waiting(job.job, (0, -1), 10).items) == 3
        store.close()
    assert seen == {(), (("j", 3),)}


def test_killed_while_results_are_recorded(tmp_path: Path) -> None:
    def record(store: Store) -> None:
        store.record([Outcome("j", 0, True, answer("a")), Outcome("j", 1, False, ERROR)])
        store.record([Outcome("j", 2, True, answer("c"))])

    seen = set()
    for path in at_each_statement(tmp_path, lambda store: store.submit("j", items(3)), record):
        store = Store(path, BUDGET)
        job = store.job("j")
        left = [place for place, *_ in store.waiting("j", (0, -1), 10).items]
        have = places(store, "j")
        assert sorted(left + have) == [0, 1, 2], "lost, or there twice"
        assert (job.done, job.failed) == (len(have), int(1 in have))
        assert (job.state == "done") == (not left)
        seen.add(len(have))
        store.record([Outcome("j", place, True, answer("again")) for place in left])
        assert (store.job("j").state, places(store, "j")) == ("done", [0, 1, 2])
        store.close()
    assert seen == {0, 2, 3}


def ended_job(store: Store) -> None:
    store.submit("j", items(600))
    store.record([End("j", "cancelled", None)])


def test_killed_while_a_job_is_deleted(tmp_path: Path) -> None:
    def delete(store: Store) -> None:
        store.forget("j")
        while store.sweep():
            pass

    seen = set()
    for path in at_each_statement(tmp_path, ended_job, delete):
        store = Store(path, BUDGET)
        there = [job.job for job in store.jobs()]
        seen.add(len(there))
        assert not there or store.job("j").total == len(store.waiting("j", (0, -1), 1000).items) == 600
        if there:
            store.forget("j")
        while store.sweep():
            pass
        for table in ("jobs", "items", "results", "models"):
            assert store.db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
        store.close()
    assert seen == {0, 1}


# --- versions -----------------------------------------------------------------------------------------------------


def test_a_file_of_version_1_is_brought_forward(path: Path) -> None:
    shutil.copy(DATA / "batch-1.sqlite3", path)
    assert version_of(path) == 1
    store = Store(path, BUDGET)
    (job,) = store.jobs()
    assert (job.job, job.name, job.total, job.done, job.failed) == ("batch-old-1", "from before", 5, 2, 1)
    assert [place for place, *_ in store.waiting("batch-old-1", (0, -1), 10).items] == [1, 3, 4]
    first = store.results("batch-old-1", -1, 10).results[0]
    assert (first.custom_id, first.result is not None and first.result.text) == ("old-0", "The old answer.")
    store.record([Outcome("batch-old-1", place, True, answer("new")) for place in (1, 3, 4)])
    assert store.job("batch-old-1").state == "done"
    store.close()
    assert version_of(path) == VERSION


def test_killed_while_it_is_brought_forward(tmp_path: Path) -> None:
    """At each statement: the next one finds the old form, or the new one."""
    steps = 0
    while True:
        steps += 1
        path = tmp_path / f"{steps}.sqlite3"
        shutil.copy(DATA / "batch-1.sqlite3", path)
        killed = killed_before(steps, lambda path=path: schema.connect(path, budget_bytes=BUDGET))  # type: ignore[misc]
        store = Store(path, BUDGET)
        assert [job.done for job in store.jobs()] == [2]
        store.close()
        if not killed:
            break
    assert steps > 15


def test_a_newer_file_is_left_as_it_is(path: Path) -> None:
    Store(path, BUDGET).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(schema.Newer) as refused:
        Store(path, BUDGET)
    assert refused.value.args == (VERSION + 1,)
    assert version_of(path) == VERSION + 1
    assert path.read_bytes() == before


def garbage(path: Path) -> None:
    path.write_bytes(b"not a database at all " * 1000)


def torn(path: Path) -> None:
    store = Store(path, BUDGET)
    store.submit("j", items(500, size=100))
    store.close()
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(40_000))


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE something (else_ TEXT)")
    db.close()


@pytest.mark.parametrize("damage", [garbage, torn, foreign])
def test_a_damaged_file_is_told_from_others(path: Path, damage: Callable[[Path], None]) -> None:
    damage(path)
    before = path.read_bytes()
    with pytest.raises(schema.Damaged):
        Store(path, BUDGET)
    aside = schema.set_aside(path)
    assert aside.read_bytes() == before
    assert not path.exists()
    Store(path, BUDGET).close()


def test_damage_under_an_open_store_is_told_by_all_that_read(path: Path) -> None:
    store = Store(path, BUDGET)
    store.submit("j", items(20, size=1000), key="mine")
    assert (store.knows("mine"), store.knows("another")) == (True, False)
    store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(path, "r+b") as file:  # all but the header
        file.seek(100)
        file.write(os.urandom(path.stat().st_size - 100))
    store.db.execute("PRAGMA shrink_memory")
    for read in (lambda: store.knows("mine"), store.jobs, lambda: store.job("j")):
        with pytest.raises(schema.Damaged):
            read()
    store.close()


# --- a full disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[Tmpfs]:
    with Tmpfs(2 * 1024 * 1024) as disk:
        yield disk


def record_all(store: Store, size: int) -> None:
    for n in range(20):
        store.record([Outcome("j", n, True, answer("x" * size))])


def test_a_full_disk_tears_nothing(small_disk: Tmpfs) -> None:
    path = small_disk.folder / "batch.sqlite3"
    store = Store(path, BUDGET)
    store.submit("j", items(20, size=1000))
    small_disk.leave(0)
    with pytest.raises(InsufficientDisk):
        record_all(store, 20_000)
    have = store.job("j").done
    assert len(places(store, "j")) == have < 20
    with pytest.raises(InsufficientDisk):
        store.submit("k", items(500, size=1000))
    small_disk.relax()
    store.record([Outcome("j", n, True, answer("y")) for n in range(have, 20)])
    assert (store.job("j").state, places(store, "j")) == ("done", list(range(20)))
    store.close()
    store = Store(path, BUDGET)
    assert [job.job for job in store.jobs()] == ["j"]
    store.close()


def test_the_budget_is_as_a_full_disk(path: Path) -> None:
    store = Store(path, 400_000)
    store.submit("a", items(10, size=10_000))
    with pytest.raises(InsufficientDisk):
        store.submit("b", items(100, size=10_000))
    assert path.stat().st_size <= 400_000
    assert [job.job for job in store.jobs()] == ["a"]
    store.record([End("a", "cancelled", None)])
    store.forget("a")
    while store.sweep():
        pass
    store.submit("b", items(20, size=10_000))
    store.close()
