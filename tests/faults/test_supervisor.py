"""The supervisor against real children that misbehave: each fault ends in one `on_exit` that names it."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import resource
import select
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlxd.children import ChildSpec, Death, exitwatch
from mlxd.children.child import Child
from mlxd_client.errors import WorkerDied
from support.children import QuietLog, Recorder, bad, generate, quick, supervise
from support.loops import both_loops, run, until


def gone(pid: int) -> bool:
    """Whether no process has this pid, not even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def end_of(tmp_path: Path, spec: ChildSpec, **limits: Any) -> tuple[Recorder, Death]:
    """Spawn, and wait until it has ended by itself or by the supervisor's verdict."""
    supervisor = supervise(tmp_path, **limits)
    recorder = Recorder()
    child = supervisor.spawn(spec, recorder)
    assert child.pid
    death = await child.wait()
    assert recorder.deaths == [death]
    assert gone(child.pid)
    assert supervisor.children == ()
    assert list((tmp_path / "run" / "children").iterdir()) == []
    await supervisor.close()
    return recorder, death


# --- deaths --------------------------------------------------------------------------------------------------------

OWN_DEATHS = [
    ("segfault", {"cause": "signal", "signal": "SIGSEGV"}),
    ("abort", {"cause": "signal", "signal": "SIGABRT"}),
    ("exit:3", {"cause": "exit", "exit_code": 3}),
    ("exit:0", {"cause": "exit", "exit_code": 0}),
    ("mid-frame", {"cause": "exit", "exit_code": 0}),
]


@both_loops
@pytest.mark.parametrize(("mode", "facts"), OWN_DEATHS, ids=[mode for mode, _ in OWN_DEATHS])
def test_a_child_that_dies(tmp_path: Path, loop_kind: str, mode: str, facts: dict[str, Any]) -> None:
    recorder, death = run(end_of(tmp_path, bad(mode)), loop_kind=loop_kind)
    assert recorder.ready
    assert not death.expected
    error = death.to_error()
    assert isinstance(error, WorkerDied)
    details = {key: value for key, value in error.details.items() if key != "last_words"}
    assert details == facts


def test_dying_before_the_ready_frame(tmp_path: Path) -> None:
    recorder, death = run(end_of(tmp_path, bad("exit-early:7")))
    assert not recorder.ready
    assert (death.cause, death.exit_code) == ("exit", 7)


def test_dying_in_mid_frame_is_told(tmp_path: Path) -> None:
    _, death = run(end_of(tmp_path, bad("mid-frame")))
    assert "in the middle of a frame" in death.describe()


def test_last_words_are_the_cleaned_end_of_stderr(tmp_path: Path) -> None:
    _, death = run(end_of(tmp_path, bad("exit:3")))
    assert death.last_words == "the first of its last words\nlast words before exit 3"
    assert death.to_error().details["last_words"] == death.last_words


GARBAGE = ["garbage", "garbage-first", "not-a-message", "huge"]


@both_loops
@pytest.mark.parametrize("mode", GARBAGE)
def test_garbage_on_the_pipe(tmp_path: Path, loop_kind: str, mode: str) -> None:
    _, death = run(end_of(tmp_path, bad(mode)), loop_kind=loop_kind)
    assert (death.cause, death.signal) == ("garbage", "SIGKILL")
    assert death.detail


HANGS = ["hang", "spin", "half-frame"]


@both_loops
@pytest.mark.parametrize("mode", HANGS)
def test_a_child_that_hangs(tmp_path: Path, loop_kind: str, mode: str) -> None:
    _, death = run(end_of(tmp_path, bad(mode), heartbeat_s=0.3), loop_kind=loop_kind)
    assert (death.cause, death.signal) == ("hang", "SIGKILL")
    assert "0.3 s" in death.describe()


def test_a_child_that_never_gets_ready(tmp_path: Path) -> None:
    recorder, death = run(end_of(tmp_path, bad("never-ready"), ready_s=0.5))
    assert not recorder.ready
    assert death.cause == "never_ready"


@both_loops
def test_a_child_that_closes_its_pipe_and_lives_on(tmp_path: Path, loop_kind: str) -> None:
    _, death = run(end_of(tmp_path, bad("close-pipe")), loop_kind=loop_kind)
    assert (death.cause, death.signal) == ("hang", "SIGKILL")
    assert "closed its pipe" in death.detail


def test_the_silence_that_a_load_takes_is_borne(tmp_path: Path) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path, heartbeat_s=0.2)
        recorder = Recorder()
        child = supervisor.spawn(bad("hang"), recorder)
        await recorder.until_ready()
        child.expect_silence(20)
        await asyncio.sleep(0.6)
        assert child.alive
        child.expect_silence(0)
        death = await child.wait()
        assert death.cause == "hang"

    run(main())


def test_what_waited_unread_during_a_load_is_not_held_against_it(tmp_path: Path) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path, heartbeat_s=2.0)
        recorder = Recorder()
        child = supervisor.spawn(bad(), recorder)
        early = child.request("generate", generate("x" * 2_000_000))
        await recorder.until_ready()
        child.expect_silence(20)
        load = child.request("load", {"model": "m", "path": "/!sleep/2.5"})
        waiting = child.request("generate", generate("x" * 2_000_000))
        await recorder.answer(load)
        child.expect_silence(0)
        await recorder.answer(early)
        await recorder.answer(waiting)
        await supervisor.close()

    run(main())


def test_silence_while_the_daemon_itself_stood_still_is_forgiven(tmp_path: Path) -> None:
    async def main() -> None:
        asleep_s = 0.0
        supervisor = supervise(tmp_path, clock=lambda: time.monotonic() + asleep_s, heartbeat_s=1.0)
        recorder = Recorder()
        child = supervisor.spawn(bad("hang"), recorder)
        await recorder.until_ready()
        start = time.monotonic()
        asleep_s = 60.0
        death = await child.wait()
        assert death.cause == "hang"  # in the end, but not for the sleep
        assert time.monotonic() - start > 1.5

    run(main())


def test_what_came_while_the_loop_was_busy_is_a_sign_of_life(tmp_path: Path) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path, heartbeat_s=0.8)
        recorder = Recorder()
        child = supervisor.spawn(bad(), recorder)
        await recorder.until_ready()
        for _ in range(4):
            seen = len(recorder.heartbeats)
            time.sleep(0.9)  # noqa: ASYNC251 - that is the fault
            await asyncio.sleep(0)
            await recorder.until_beats(seen + 1)
        assert child.usable
        await supervisor.close()

    run(main())


@both_loops
def test_a_kill_from_outside_is_told_at_once(tmp_path: Path, loop_kind: str) -> None:
    async def main() -> float:
        supervisor = supervise(tmp_path)
        recorder = Recorder()
        child = supervisor.spawn(bad(), recorder)
        await recorder.until_ready()
        start = time.monotonic()
        os.kill(child.pid, signal.SIGKILL)
        death = await child.wait()
        assert (death.cause, death.signal) == ("signal", "SIGKILL")
        return time.monotonic() - start

    assert run(main(), loop_kind=loop_kind) < 1.0


def test_without_an_exit_watch_the_pipe_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, pid: int) -> None:
        raise OSError("no such call")

    monkeypatch.setattr(exitwatch.ExitWatch, "__init__", refuse)
    for mode, cause in {"segfault": "signal", "hang": "hang", "close-pipe": "hang", "exit-early:1": "exit"}.items():
        _, death = run(end_of(tmp_path, bad(mode), heartbeat_s=0.3))
        assert death.cause == cause


def test_a_grandchild_that_keeps_the_pipes_open_hides_no_death(tmp_path: Path) -> None:
    code = "import os, time\nif os.fork(): os._exit(5)\ntime.sleep(3)"
    _, death = run(end_of(tmp_path, quick(code)))
    assert (death.cause, death.exit_code) == ("exit", 5)


@pytest.mark.parametrize(
    "argv",
    [["/nonexistent/program"], [str(Path(__file__))], ["bad\0argument"]],
    ids=["missing", "not executable", "no argument"],
)
def test_a_spawn_that_fails(tmp_path: Path, argv: list[str]) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path)
        recorder = Recorder()
        before = len(os.listdir("/dev/fd"))
        child = supervisor.spawn(ChildSpec(kind="worker", name="test/none", argv=argv), recorder)
        assert not recorder.deaths  # told later, never from within
        child.send({"method": "stop"})
        child.stop()
        death = await child.wait()
        assert recorder.deaths == [death]
        assert (death.cause, death.pid) == ("spawn_failed", 0)
        assert "could not be started" in death.describe()
        assert len(os.listdir("/dev/fd")) == before

    run(main())


# --- the pipe ------------------------------------------------------------------------------------------------------


@both_loops
def test_the_stand_in_serves_like_a_worker(tmp_path: Path, loop_kind: str) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path)
        recorder = Recorder()
        child = supervisor.spawn(bad(), recorder)
        await recorder.until_ready()
        assert recorder.ready[0].pid == child.pid
        await recorder.answer(child.request("load", {"model": "m", "path": "/m"}))
        result = await recorder.answer(child.request("generate", generate("one two  three")))
        assert result["result"]["text"] == "one two three"
        pieces = [piece for m in recorder.messages if m.get("method") == "step" for piece in m["params"]["pieces"]]
        assert "".join(text for _, text, _ in pieces) == "one two three"
        slow = child.request("generate", generate("!slow 1000"))
        child.notify("cancel", {"id": slow})
        assert (await recorder.answer(slow))["result"]["finish_reason"] == "cancelled"
        await recorder.until(lambda: recorder.heartbeats)
        child.stop()
        death = await child.wait()
        assert (death.cause, death.exit_code, death.expected) == ("stopped", 0, True)

    run(main(), loop_kind=loop_kind)


@both_loops
def test_large_frames_cross_whole_in_both_directions(tmp_path: Path, loop_kind: str) -> None:
    text = "x" * 3_000_000

    async def main() -> None:
        supervisor = supervise(tmp_path)
        recorder = Recorder()
        child = supervisor.spawn(bad(), recorder)
        ids = [child.request("generate", generate(text)) for _ in range(4)]  # sent before it is ready
        for request_id in ids:
            assert (await recorder.answer(request_id))["result"]["text"] == text
        await supervisor.close()

    run(main(), loop_kind=loop_kind)


@both_loops
def test_a_flood_stalls_nobody(tmp_path: Path, loop_kind: str) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path)
        recorder = Recorder()
        child = supervisor.spawn(bad("flood"), recorder)
        counts = [0]
        while counts[-1] < 20_000:
            await asyncio.sleep(0)
            counts.append(len(recorder.messages))
        assert max(after - before for before, after in pairwise(counts)) <= 512  # in one turn of the loop
        assert child._pipe is not None
        assert child._pipe._decoder.buffered <= 2 * 65_536
        child.stop(grace_s=0)
        await child.wait()

    run(main(), loop_kind=loop_kind)


def test_a_flood_of_stderr_is_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        log = QuietLog()
        supervisor = supervise(tmp_path, log)
        recorder = Recorder()
        child = supervisor.spawn(bad("flood-stderr"), recorder)
        await recorder.until(lambda: len(recorder.heartbeats) > 3)
        child.kill()
        death = await child.wait()
        assert 0 < len(death.last_words.encode()) <= 2048
        assert set(death.last_words.split("\n")[1:-1]) == {"a line that nobody asked for"}
        lines = [fields["line"] for _, event, fields in log.entries if event == "child stderr"]
        assert any("more lines at once" in line for line in lines)

    run(main())


@both_loops
def test_a_child_that_does_not_read(tmp_path: Path, loop_kind: str) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path, heartbeat_s=2.0)
        recorder = Recorder()
        child = supervisor.spawn(bad("deaf"), recorder)
        await recorder.until_ready()
        child.request("generate", generate("x" * 2_000_000))
        death = await child.wait()
        assert death.cause == "hang"
        assert "unread" in death.detail
        assert recorder.heartbeats  # it was alive all the time

    run(main(), loop_kind=loop_kind)


def test_what_waits_for_a_child_is_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path, send_buffer_bytes=1_000_000)
        recorder = Recorder()
        child = supervisor.spawn(bad("deaf"), recorder)
        await recorder.until_ready()
        for _ in range(3):
            child.request("generate", generate("x" * 500_000))
        assert not recorder.deaths
        death = await child.wait()
        assert (death.cause, death.signal) == ("hang", "SIGKILL")

    run(main())


def test_a_message_that_cannot_be_handled_ends_the_child(tmp_path: Path) -> None:
    class Faulty(Recorder):
        def on_message(self, child: Child, message: dict[str, Any], /) -> None:
            raise KeyError("pieces")

    async def main() -> None:
        log = QuietLog()
        supervisor = supervise(tmp_path, log)
        recorder = Faulty()
        child = supervisor.spawn(bad(), recorder)
        child.request("count", {"text": "a b"})
        death = await child.wait()
        assert death.cause == "garbage"
        assert "KeyError" in death.detail
        assert "a child's handler failed" in log.events()

    run(main())


# --- stopping ------------------------------------------------------------------------------------------------------


@both_loops
@pytest.mark.parametrize(
    ("mode", "signals"),
    [("ignore-stop", ["SIGTERM"]), ("ignore-all", ["SIGTERM", "SIGKILL"]), ("spin", ["SIGTERM", "SIGKILL"])],
)
def test_stopping_escalates(tmp_path: Path, loop_kind: str, mode: str, signals: list[str]) -> None:
    async def main() -> None:
        log = QuietLog()
        supervisor = supervise(tmp_path, log, term_grace_s=0.2 if "SIGKILL" in signals else 20)
        recorder = Recorder()
        child = supervisor.spawn(bad(mode), recorder)
        await recorder.until_ready()
        child.stop(grace_s=0.2)
        child.stop(grace_s=10)  # asking again, with more patience, changes nothing
        death = await child.wait()
        assert (death.cause, death.signal, death.expected) == ("stopped", signals[-1], True)
        steps = [event for event in log.events() if "SIG" in event]
        assert [step.rpartition(" ")[2] for step in steps] == signals

    run(main(), loop_kind=loop_kind)


def test_nothing_is_called_from_within_a_call(tmp_path: Path) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path)
        recorder = Recorder()
        child = supervisor.spawn(quick("pass"), recorder)
        watch = exitwatch.ExitWatch(child.pid)
        assert select.select([watch.fileno], [], [], 20)[0]  # it ends, and the loop has no turn to see it
        watch.close()
        child.send({"method": "nobody", "params": {}})
        child.stop(grace_s=0)
        child.kill()
        assert not recorder.deaths
        await child.wait()

    run(main())


def test_stopping_before_the_ready_frame(tmp_path: Path) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path, term_grace_s=0.1)
        recorder = Recorder()
        child = supervisor.spawn(bad("never-ready"), recorder)
        child.stop(grace_s=20)
        child.stop(grace_s=0)  # asking again, with less, does
        assert (await child.wait()).cause == "stopped"

    run(main())


READS_TO_THE_END = """
import socket, sys
pipe = socket.socket(fileno=int(sys.argv[-1]))
while pipe.recv(99): pass
"""


def test_the_end_of_input_alone_ends_a_child_that_reads(tmp_path: Path) -> None:
    async def main() -> None:
        child = supervise(tmp_path).spawn(quick(READS_TO_THE_END), Recorder())
        child.stop()
        assert (await child.wait()).exit_code == 0

    run(main())


@both_loops
def test_close_leaves_nobody(tmp_path: Path, loop_kind: str) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path, term_grace_s=0.1)
        recorders = [Recorder() for _ in range(5)]
        modes = ["worker", "ignore-all", "hang", "never-ready", "flood"]
        children = [supervisor.spawn(bad(mode), recorder) for mode, recorder in zip(modes, recorders, strict=True)]
        await recorders[0].until_ready()
        await supervisor.close(grace_s=0.3)
        assert supervisor.children == ()
        assert all(gone(child.pid) for child in children)
        assert all(len(recorder.deaths) == 1 for recorder in recorders)
        late = Recorder()
        assert (await supervisor.spawn(bad(), late).wait()).cause == "spawn_failed"
        await supervisor.close()

    run(main(), loop_kind=loop_kind)


# --- many ----------------------------------------------------------------------------------------------------------


@both_loops
def test_one_exit_each_whatever_happens(tmp_path: Path, loop_kind: str) -> None:
    """Random children, ended in random ways at random moments, several ways at once."""
    chance = random.Random(4)
    modes = ["worker", "exit:1", "segfault", "garbage", "garbage-first", "close-pipe", "mid-frame", "flood"]

    async def torment(child: Child, recorder: Recorder) -> None:
        await asyncio.sleep(chance.random() * 0.3)
        for act in chance.sample(range(5), 3):
            if act == 0:
                child.stop(grace_s=chance.choice([0, 0.01, 0.1]))
            elif act == 1 and child.alive and child.pid:
                os.kill(child.pid, chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGABRT]))
            elif act == 2:
                child.kill()
            elif act == 3:
                child.request("generate", generate("!segfault"))
            else:
                await asyncio.sleep(0)
        child.kill()
        death = await child.wait()
        await asyncio.sleep(0)
        assert recorder.deaths == [death]

    async def main() -> None:
        supervisor = supervise(tmp_path, term_grace_s=0.05, eof_grace_s=0.02)
        for _ in range(5):
            recorders = [Recorder() for _ in range(6)]
            children = [supervisor.spawn(bad(chance.choice(modes)), recorder) for recorder in recorders]
            pairs = zip(children, recorders, strict=True)
            await asyncio.gather(*(torment(child, recorder) for child, recorder in pairs))
        assert supervisor.children == ()

    run(main(), loop_kind=loop_kind, deadline_s=60)


@both_loops
def test_fifty_spawns_leak_nothing(tmp_path: Path, loop_kind: str) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path)
        for _ in range(2):  # what the first of all brings along is there before the second
            await supervisor.spawn(quick("pass"), Recorder()).wait()
        gc.collect()  # what earlier tests left is not to go in between
        fds = sorted(os.listdir("/dev/fd"))
        pids = []
        for _ in range(10):
            batch = [supervisor.spawn(quick("print('hello')"), Recorder()) for _ in range(5)]
            pids += [child.pid for child in batch]
            for child in batch:
                assert (await child.wait()).last_words == "hello"
        assert sorted(os.listdir("/dev/fd")) == fds
        assert all(gone(pid) for pid in pids)
        assert list((tmp_path / "run" / "children").iterdir()) == []
        await until(lambda: len(asyncio.all_tasks()) == 1)

    run(main(), loop_kind=loop_kind)


# --- what a child gets ---------------------------------------------------------------------------------------------

REPORT = """
import json, os, sys
def is_open(fd):
    try: return bool(os.fstat(fd))
    except OSError: return False
told = {"env": dict(os.environ), "fds": [fd for fd in range(256) if is_open(fd)], "fd": int(sys.argv[-1])}
with open(os.environ["EXTRA"], "w") as file:
    json.dump(told | {"pgrp": os.getpgrp(), "cwd": os.getcwd(), "stdin": os.read(0, 1).decode()}, file)
"""


def test_what_a_child_inherits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN", "OPENAI_API_KEY", "AWS_SESSION", "DB_PASSWORD"]
    for name in [*secrets, "NOTIFY_SOCKET", "LISTEN_FDS"]:
        monkeypatch.setenv(name, "a secret")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)  # a careless library
    try:
        report = tmp_path / "report.json"
        run(end_of(tmp_path, quick(REPORT, EXTRA=str(report), HOME=None)))
    finally:
        os.close(reader)
        os.close(writer)
    told = json.loads(report.read_text())
    env = told["env"]
    assert not [name for name, value in env.items() if value == "a secret"]
    assert env["TOKENIZERS_PARALLELISM"] == "false"
    assert (env["HF_HUB_OFFLINE"], env["PYTHONUNBUFFERED"], env["EXTRA"]) == ("1", "1", str(report))
    assert "HOME" not in env
    temp_dir = Path(env["TMPDIR"])
    assert temp_dir == tmp_path / "run" / "tmp"
    assert temp_dir.stat().st_mode & 0o777 == 0o700
    assert told["fds"] == [0, 1, 2, told["fd"]]
    assert told["pgrp"] == os.getpgrp()
    assert told["stdin"] == ""
    assert told["cwd"] == os.getcwd()


def test_exit_statuses_survive_an_ignored_sigchld(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as the one who started the daemon may leave it
    try:
        _, death = run(end_of(tmp_path, quick("raise SystemExit(3)")))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert (death.cause, death.exit_code) == ("exit", 3)


def test_running_out_of_descriptors_is_a_failed_spawn(tmp_path: Path) -> None:
    async def main() -> None:
        supervisor = supervise(tmp_path)
        await supervisor.spawn(quick("pass"), Recorder()).wait()
        taken: list[int] = []
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, hard))
        try:
            for spare in range(8):
                while True:
                    try:
                        taken.append(os.dup(2))
                    except OSError:
                        break
                for _ in range(spare):
                    os.close(taken.pop())
                before = os.dup(2) if spare else -1
                if spare:
                    os.close(before)
                child = supervisor.spawn(quick("pass"), Recorder())
                death = await child.wait()
                assert death.cause in ("spawn_failed", "exit")
                assert spare > 1 or death.cause == "spawn_failed"
                if spare:
                    after = os.dup(2)
                    os.close(after)
                    assert after == before
        finally:
            for fd in taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        death = await supervisor.spawn(quick("pass"), Recorder()).wait()
        assert death.exit_code == 0

    run(main())
