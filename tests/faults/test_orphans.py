"""No child outlives its daemon: by itself where it can, by the next start's sweep where it cannot."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlxd.children.records import ChildRecord, Records, command_line, start_token
from support.children import QuietLog, Recorder, bad, supervise
from support.household import LIMIT_S, Household
from support.hub import Hub
from support.loops import run

FAKE_DAEMON = Path(__file__).parents[1] / "support" / "fake_daemon.py"


class FakeDaemon:
    def __init__(self, run_dir: Path, *modes: str) -> None:
        command = [sys.executable, str(FAKE_DAEMON), str(run_dir), *modes]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        told = json.loads(self.process.stdout.readline())
        self.swept: list[int] = told["swept"]
        self.pids: list[int] = told["pids"]

    def end(self, number: int | None = None) -> None:
        """By a signal, or by the end of its stdin."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if number is not None:
            self.process.send_signal(number)
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


Start = Callable[..., FakeDaemon]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts fake daemons, and ends what is left of them and their children."""
    started: list[FakeDaemon] = []

    def begin(*modes: str) -> FakeDaemon:
        started.append(FakeDaemon(tmp_path / "run", *modes))
        return started[-1]

    yield begin
    for daemon in started:
        if daemon.process.poll() is None:
            daemon.end(signal.SIGKILL)
        for pid in daemon.pids:
            if "bad_child.py" in " ".join(command_line(pid)):
                os.kill(pid, signal.SIGKILL)


def wait_gone(pids: list[int], limit_s: float) -> float:
    """Seconds until none of them lives; fails past the limit."""
    begin = time.monotonic()
    while any(start_token(pid) for pid in pids):
        assert time.monotonic() - begin < limit_s, "children outlived their daemon"
        time.sleep(0.005)
    return time.monotonic() - begin


def test_children_of_a_killed_daemon_end_by_themselves(start: Start) -> None:
    daemon = start("worker", "flood", "deaf")
    daemon.end(signal.SIGKILL)
    wait_gone(daemon.pids, 10)


@pytest.mark.slow
@pytest.mark.model
def test_real_children_of_a_killed_daemon_end_whatever_they_do(tmp_path: Path) -> None:
    """Where the kernel does not tell them of it, those that cannot see to it themselves are the next start's."""
    with Hub() as hub, Household.daemon_of(hub) as daemon:
        house = Household(daemon, hub, tmp_path.resolve())
        lived = house.bury(house.fill(small=True))
        if sys.platform != "linux":
            lived = {name: s for name, s in lived.items() if "stopped" not in name and "locked" not in name}
        assert len(lived) > 3
        assert max(lived.values()) < LIMIT_S, lived
        if sys.platform == "linux":  # not when its time is up
            assert lived["compiling in a grandchild"] < 2.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_hanging_child_of_a_killed_daemon_is_ended_by_the_kernel(start: Start) -> None:
    daemon = start("tied")
    daemon.end(signal.SIGKILL)
    wait_gone(daemon.pids, 10)


def test_an_orphan_that_ignores_everything_is_swept_at_the_next_start(start: Start, tmp_path: Path) -> None:
    first = start("ignore-all", "hang")
    first.end(signal.SIGKILL)
    assert all(start_token(pid) for pid in first.pids)
    second = start("worker")
    assert sorted(second.swept) == sorted(first.pids)
    assert not any(start_token(pid) for pid in first.pids)
    assert all(start_token(pid) for pid in second.pids)
    second.end()
    assert second.process.returncode == 0
    assert not any(start_token(pid) for pid in second.pids)
    assert list((tmp_path / "run" / "children").iterdir()) == []


WAITS = [sys.executable, "-ISc", "print(flush=True); input()", "argument"]


@pytest.fixture
def innocent() -> Iterator[int]:
    """A process that no sweep may touch."""
    process = subprocess.Popen(WAITS, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    assert process.poll() is None, "an innocent process was killed"
    process.communicate(b"\n")


def record_of(pid: int, /, **changes: Any) -> ChildRecord:
    """A record that matches the process, but for the changes."""
    record = ChildRecord(pid, start_token(pid) or "", "worker", "m", 1, command_line(pid))
    return msgspec.structs.replace(record, **changes)


def sweep(tmp_path: Path) -> tuple[list[int], list[str]]:
    """What was killed, and what is left in the folder."""
    killed = run(supervise(tmp_path).sweep())
    return killed, sorted(path.name for path in (tmp_path / "run" / "children").iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run" / "children"
    made.mkdir(parents=True)
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {"started": "0b5c5e1c-0000-0000-0000-000000000000:1"},
        {"started": ""},
        {"argv": ["python", "-m", "mlxd.worker", "--fd", "7"]},
        {"argv": []},
    ],
    ids=["another start", "no start", "another command", "no command"],
)
def test_a_process_that_got_the_pid_is_spared(
    tmp_path: Path, folder: Path, innocent: int, changes: dict[str, Any]
) -> None:
    (folder / f"{innocent}.json").write_bytes(msgspec.json.encode(record_of(innocent, **changes)))
    assert sweep(tmp_path) == ([], [])


def test_a_record_under_another_name_kills_nobody(tmp_path: Path, folder: Path, innocent: int) -> None:
    (folder / "4711.json").write_bytes(msgspec.json.encode(record_of(innocent)))
    assert sweep(tmp_path) == ([], [])


def test_a_record_behind_a_link_kills_nobody(tmp_path: Path, folder: Path, innocent: int) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_bytes(msgspec.json.encode(record_of(innocent)))
    (folder / f"{innocent}.json").symlink_to(elsewhere)
    assert sweep(tmp_path) == ([], [])
    assert elsewhere.exists()


def test_hostile_records_are_removed(tmp_path: Path, folder: Path) -> None:
    own = os.getpid()
    (folder / f"{own}.json").write_bytes(msgspec.json.encode(record_of(own)))
    (folder / "1.json").write_bytes(msgspec.json.encode(record_of(1)))
    (folder / "-1.json").write_bytes(msgspec.json.encode(record_of(1, pid=-1)))
    (folder / "99.json").write_bytes(b'{"pid": 99, "started"')
    (folder / "98.json").write_bytes(b"[" * 60_000)
    (folder / "97.json").write_bytes(b"\xff\xfe")
    (folder / "96.json").write_bytes(b" " * 1_000_000)
    (folder / "95.json").write_bytes(b'{"pid": "95", "started": 1, "kind": [], "name": {}, "daemon_pid": 1, "argv": 3}')
    (folder / f"{2**70}.json").write_bytes(b'{"pid": %d}' % (2**70))
    (folder / ".123.tmp").write_bytes(b"half")
    os.mkfifo(folder / "94.json")
    assert sweep(tmp_path) == ([], [])


def test_a_folder_in_place_of_a_record_is_left_alone(tmp_path: Path, folder: Path) -> None:
    (folder / "93.json").mkdir()
    assert sweep(tmp_path) == ([], ["93.json"])


def test_a_sweep_without_a_folder_does_nothing(tmp_path: Path) -> None:
    assert run(supervise(tmp_path).sweep()) == []


def test_a_matching_orphan_is_killed(tmp_path: Path, folder: Path) -> None:
    with subprocess.Popen(WAITS, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        Records(folder).write(process.pid, "worker", "m", WAITS)
        assert sweep(tmp_path) == ([process.pid], [])
        assert process.wait(10) == -signal.SIGKILL


def test_a_sweep_spares_the_children_of_its_own_supervisor(tmp_path: Path) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path)
        recorder = Recorder()
        child = supervisor.spawn(bad(), recorder)
        await recorder.until_ready()
        assert await supervisor.sweep() == []
        assert child.usable
        assert [path.name for path in (tmp_path / "run" / "children").iterdir()] == [f"{child.pid}.json"]
        await supervisor.close()

    run(main())


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Records, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Records, "write", full)

    async def main() -> None:
        log = QuietLog()
        supervisor = supervise(tmp_path, log)
        recorder = Recorder()
        supervisor.spawn(bad(), recorder)
        await asyncio.wait_for(recorder.until_ready(), 20)
        assert "no record of a child" in log.events()
        await supervisor.close()

    run(main())
