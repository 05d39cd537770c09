"""A new daemon takes over from a running one: nothing that was accepted is lost, nobody is refused, one at a time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from mlxd.cli.daemon import runs
from mlxd.handover import choose_program
from mlxd_client import AsyncClient, Client, errors
from support.daemon import PATIENCE_S, active, until
from support.restarts import Relay, newer

CLEANUP = "mlxd/cleanup"


def test_a_newer_one_takes_over_and_streams_go_on_in_the_old_one(tmp_path: Path) -> None:
    with Relay(bad_child="worker", steps=True) as daemon, daemon.client() as client, client.events() as events:
        old = daemon.newest()
        stream = client.stream_process("!slow 2")
        active(events, 1)
        choose_program(daemon.home, newer(tmp_path))
        result = client.restart()
        new = daemon.note(result.pid or 0)
        assert (result.version, new.pid != old.pid) == ("9.9.9", True)
        stopping = next(event for event in events if event.name in ("daemon_stopping", "resync"))
        assert stopping.details == {"reason": "restart", "version": "9.9.9", "pid": new.pid}
        assert client.status().pid == new.pid
        assert client.process("hello").text == "hello"  # on a new connection, by a worker of the new one
        assert old.is_running()
        daemon.step(0, 1)
        assert stream.wait().text == "piece0 piece1"
        old.wait(PATIENCE_S)
        assert daemon.process is not None
        assert daemon.process.wait() == 0
        assert (daemon.home / "mlxd.lock").read_text() == f"{new.pid}\n"
        resync = next(event for event in events if event.name == "resync")
        assert resync.snapshot is not None
        assert not resync.snapshot.stopping
    assert not daemon.socket.exists()


def test_nobody_notices_but_in_the_answers(tmp_path: Path) -> None:
    """Calls of every kind, by threads that share a client and by one of its own, while three daemons follow each
    other."""
    over = False

    def ask(client: Client) -> int:
        asked = 0
        while not over:
            assert client.process("hello").text == "hello"
            assert "".join(client.stream_process("one two")) == "one two"
            client.ping()
            assert client.model(CLEANUP).id == CLEANUP
            asked += 4
        return asked

    with (
        Relay(bad_child="worker") as daemon,
        daemon.client() as shared,
        daemon.client() as own,
        ThreadPoolExecutor(3) as pool,
    ):
        counts = [pool.submit(ask, client) for client in (shared, shared, own)]
        try:
            for number in range(2):
                before = daemon.newest().pid
                choose_program(daemon.home, newer(tmp_path, f"9.9.{number}"))
                with daemon.client() as client:
                    assert client.restart().version == f"9.9.{number}"
                daemon.gone(before)
        finally:
            over = True
        assert all(count.result(PATIENCE_S) > 0 for count in counts)


def test_an_asyncio_client_notices_as_little(tmp_path: Path) -> None:
    async def main(daemon: Relay) -> None:
        async with AsyncClient(daemon.socket, name="tests", timeout_s=PATIENCE_S) as client:
            over = asyncio.Event()

            async def ask() -> None:
                while not over.is_set():
                    assert (await client.process("hello")).text == "hello"
                    assert [piece async for piece in client.stream_process("one two")]
                    await client.status()

            asking = [asyncio.create_task(ask()) for _ in range(4)]
            async with AsyncClient(daemon.socket, timeout_s=PATIENCE_S) as other:
                result = await other.restart()
            assert (await client.status()).pid == result.pid
            over.set()
            await asyncio.gather(*asking)

    with Relay(bad_child="worker") as daemon:
        asyncio.run(main(daemon))


# --- where the new one fails ----------------------------------------------------------------------------------------

FAILS = {
    "import no_such_module": "ended with exit code 1: ModuleNotFoundError: No module named 'no_such_module'",
    "import os; os.kill(os.getpid(), 9)": "died of signal 9",
    "import os; os.environ['MLXD_MAX_BATCH'] = 'x'": "max_batch cannot be",
    "from mlxd import downloads; downloads.RECORDS_VERSION = 1": "was written by a newer mlxd",
    "from mlxd.runtime import Runtime; Runtime.begin = lambda self: 1 / 0": "ZeroDivisionError",
    "from mlxd.server.server import Server; Server.start = lambda *_: os.kill(os.getpid(), 9); import os": "signal 9",
}


@pytest.mark.parametrize("before", FAILS)
def test_the_old_one_goes_on_where_the_new_one_fails(tmp_path: Path, before: str) -> None:
    with Relay(bad_child="worker", steps=True) as daemon, daemon.client() as client, client.events() as events:
        (daemon.home / "downloads.json").write_text('{"version":2,"downloads":[]}')
        pid = daemon.newest().pid
        stream = client.stream_process("!slow 2")
        active(events, 1)
        choose_program(daemon.home, newer(tmp_path, before=before))
        process = psutil.Process(pid)
        held = process.num_fds(), len(process.children())
        with pytest.raises(errors.RestartFailed, match="the new daemon failed") as failed:
            client.restart()
        assert FAILS[before] in failed.value.message
        assert (process.num_fds(), len(process.children())) == held
        assert client.status().pid == pid
        assert not client.status().draining
        assert client.process("hello").text == "hello"
        daemon.step(0, 1)
        assert stream.wait().text == "piece0 piece1"
        assert (daemon.home / "mlxd.lock").read_text() == f"{pid}\n"
        assert not [one for one in daemon.daemons() if one.pid != pid]
        choose_program(daemon.home, newer(tmp_path))  # and the next one is none the worse for it
        assert client.restart().version == "9.9.9"
        daemon.gone(pid)


LEAVES_A_CHILD = """
import os
from mlxd.children.interface import ChildSpec
from mlxd.runtime import Runtime
async def begin(self):
    argv = [sys.executable, "-ISc", "import time; time.sleep(3600)"]
    child = self._supervisor.spawn(ChildSpec(kind="fetcher", name="m", argv=argv), None)
    with open({told!r}, "w") as file:
        file.write(str(child.pid))
    os.kill(os.getpid(), 9)
Runtime.begin = begin
"""


def test_what_a_new_one_has_started_ends_with_it(tmp_path: Path) -> None:
    """Also what does not by itself, before the old one goes on with the same files."""
    told = tmp_path / "pid"
    with Relay(bad_child="worker") as daemon, daemon.client() as client:
        assert client.process("hello").text == "hello"
        worker = daemon.worker().pid
        choose_program(daemon.home, newer(tmp_path, before=LEAVES_A_CHILD.format(told=str(told))))
        with pytest.raises(errors.RestartFailed, match="died of signal 9"):
            client.restart()
        assert not runs(int(told.read_text()))
        assert daemon.worker().pid == worker


@pytest.mark.skipif(sys.platform != "linux", reason="sets the limits of another process")
def test_where_nothing_can_be_written_none_is_started(tmp_path: Path) -> None:
    """As with a full disk: there is no place for a new one's last words."""
    with Relay(bad_child="worker") as daemon, daemon.client(timeout_s=PATIENCE_S) as client:
        process = daemon.newest()
        process.rlimit(psutil.RLIMIT_FSIZE, (0, psutil.RLIM_INFINITY))
        with pytest.raises(errors.RestartFailed, match="cannot be started"):
            client.restart()
        assert client.status().pid == process.pid
        process.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))


DOES_NOT_LET_GO = """
from mlxd.runtime import Runtime
let_go = Runtime.let_go
async def once(self, timeout_s):
    Runtime.let_go = let_go
    raise TimeoutError
Runtime.let_go = once
"""


def listening(pid: int, home: Path) -> int:
    """How many descriptors a process has that listen in this folder."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    links = {f"socket:[{row[6]}]" for row in rows if row[3] == "00010000" and row[-1].startswith(str(home))}
    return sum(os.readlink(one) in links for one in Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which descriptors listen")
def test_one_that_could_not_let_go_listens_no_more_often_than_before(tmp_path: Path) -> None:
    program = newer(tmp_path, "0.1.0", before=DOES_NOT_LET_GO)
    with Relay(bad_child="worker", program=program) as daemon, daemon.client() as client:
        first = daemon.newest().pid
        before = listening(first, daemon.home)
        with pytest.raises(errors.RestartFailed, match="did not stop within"):
            client.restart()
        assert listening(first, daemon.home) == before > 0
        assert client.restart().pid != first


FULL_DISK = """
import mlxd.server.listen as listen
sign = listen._sign
def full(lock):
    if sys._getframe(1).f_code.co_name == "claim":
        raise OSError(28, "No space left on device")
    sign(lock)
listen._sign = full
"""


def test_a_pid_that_cannot_be_written_down_is_no_reason_to_fail(tmp_path: Path) -> None:
    with Relay(bad_child="worker", program=newer(tmp_path, "0.1.0", before=FULL_DISK)) as daemon:
        first = daemon.newest().pid
        with daemon.client() as client:
            failing = FULL_DISK + "\nfrom mlxd.runtime import Runtime; Runtime.begin = lambda self: 1 / 0"
            choose_program(daemon.home, newer(tmp_path, before=failing))
            with pytest.raises(errors.RestartFailed, match="ZeroDivisionError"):
                client.restart()
            assert client.process("hello").text == "hello"  # and the old one goes on
            client.restart()
            assert client.process("hello").text == "hello"
            assert client.status().pid != first


def test_who_asks_while_one_takes_over_gets_the_same_one() -> None:
    async def main(daemon: Relay) -> set[int | None]:
        async with AsyncClient(daemon.socket, name="tests", timeout_s=PATIENCE_S) as client:
            return {result.pid for result in await asyncio.gather(*(client.restart() for _ in range(4)))}

    with Relay(bad_child="worker") as daemon:
        first = daemon.newest()
        (new,) = asyncio.run(main(daemon))
        first.wait(PATIENCE_S)
        assert daemon.newest().pid == new != first.pid


def test_a_new_one_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with Relay(bad_child="worker", ready_s=1) as daemon, daemon.client() as client:
        choose_program(daemon.home, newer(tmp_path, before="import time; time.sleep(3600)"))
        with pytest.raises(errors.RestartFailed, match="it was not ready within 1 s"):
            client.restart()
        assert len(daemon.daemons()) == 1
        client.ping()


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    with Relay(bad_child="worker") as daemon, daemon.client() as client:
        choose_program(daemon.home, [str(tmp_path / "nothing")])
        with pytest.raises(errors.RestartFailed, match="cannot be started"):
            client.restart()
        assert client.restart().version == "0.1.0"  # the choice was for that time only


# --- what is more than requests -------------------------------------------------------------------------------------


def test_models_of_both_never_take_more_than_there_is(tmp_path: Path) -> None:
    """A model of the old one holds nearly all memory for a stream: the new one loads its own once that is gone."""
    size = 100_000_000
    with Relay(bad_child="worker") as daemon, daemon.client() as client:
        need = client.plan(daemon.model("large", weights_bytes=size)).memory_bytes
    budget = need + need // 2
    with (
        Relay(bad_child="worker", steps=True, memory_budget_bytes=budget) as daemon,
        daemon.client() as client,
    ):
        large = daemon.model("large", weights_bytes=size)
        with client.events() as events:
            stream = client.stream_process("!slow 1", model=large)
            active(events, 1)
        old = daemon.newest()
        client.restart()
        with daemon.client() as other:
            waiting = other.stream_process("hello", model=large)
            first = next(waiting.pieces())
            assert first.phase in ("queued", "loading")
            assert daemon.newest().children() == []
            daemon.step(0)
            assert stream.wait().text == "piece0"
            assert waiting.wait().text == "hello"
        old.wait(PATIENCE_S)


def test_what_was_loaded_is_loaded_again() -> None:
    with Relay(bad_child="worker") as daemon, daemon.client() as client:
        client.process("hello")
        client.restart()
        with client.events(topics=["models"]) as events:
            assert events.snapshot is not None
            if not any(model.state == "Ready" for model in events.snapshot.models):
                until(events, "loading_completed")
        assert client.model(CLEANUP).state == "Ready"


def test_leases_end_and_waiting_loads_ask_the_new_one(tmp_path: Path) -> None:
    with (
        Relay(bad_child="late", steps=True) as daemon,
        daemon.client() as client,
        daemon.client() as other,
        ThreadPoolExecutor(1) as pool,
        other.events() as events,
    ):
        loading = pool.submit(client.acquire, CLEANUP)
        until(events, "loading_started")
        pid = other.restart().pid
        daemon.step(0)
        lease = loading.result(PATIENCE_S)  # by the new one
        assert lease.held
        assert other.model(CLEANUP).leases == 1
        assert daemon.newest().pid == pid


def test_a_batch_job_goes_on_in_the_new_one_and_no_item_is_done_twice(tmp_path: Path) -> None:
    texts = [f"number {n}" for n in range(40)]
    with Relay(bad_child="worker", steps=True, batch_slots=4) as daemon, daemon.client() as client:
        with client.events(topics=["generation"]) as events:
            items = ({"method": "process", "params": {"prompt": text}} for text in ["!slow 1", *texts])
            job = client.submit_items(items)
            until(events, "generation_started")
        old = daemon.newest()
        failing = newer(tmp_path, before="from mlxd.runtime import Runtime; Runtime.begin = lambda self: 1 / 0")
        choose_program(daemon.home, failing)
        with pytest.raises(errors.RestartFailed, match="ZeroDivisionError"):
            client.restart()  # and the old one goes on with it
        assert client.job(job.job).state == "running"
        assert client.restart().pid != old.pid
        old.wait(PATIENCE_S)
        daemon.step(0)
        ended = client.wait_job(job.job)
        assert (ended.state, ended.done_items, ended.failed_items) == ("done", 41, 0)
        results = list(client.results(job.job))
        assert [one.result.text for one in results if one.result] == ["piece0", *texts]


# --- by a signal, and by the command --------------------------------------------------------------------------------


def test_a_signal_does_the_same(tmp_path: Path) -> None:
    with Relay(bad_child="worker") as daemon, daemon.client() as client, client.events() as events:
        old = daemon.newest()
        choose_program(daemon.home, newer(tmp_path))
        old.send_signal(signal.SIGUSR2)
        until(events, "daemon_stopping")
        old.wait(PATIENCE_S)
        assert client.status().version == "9.9.9"


def test_a_daemon_that_ends_is_not_replaced() -> None:
    """Told to stop, and then to restart: whoever wanted it gone finds none."""
    with Relay(bad_child="worker", steps=True, drain_s=PATIENCE_S) as daemon:
        old = daemon.newest()
        with daemon.client() as client, client.events() as events:
            stream = client.stream_process("!slow 1")
            active(events, 1)
            old.send_signal(signal.SIGTERM)
            until(events, "daemon_stopping")
            old.send_signal(signal.SIGUSR2)
            while not any(told in daemon.log() for told in ("this daemon is ending", "has taken over")):
                client.ping()
            daemon.step(0)
            assert stream.wait().text == "piece0"
        old.wait(PATIENCE_S)
        assert daemon.daemons() == []
        assert not daemon.socket.exists()


def run(daemon: Relay, program: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, *words], env=daemon.env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def test_the_command_brings_its_own_version(tmp_path: Path) -> None:
    with Relay(bad_child="worker") as daemon:
        old = daemon.newest()
        done = run(daemon, newer(tmp_path), "restart", "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        new = daemon.newest()
        assert (told["before"]["version"], told["before"]["pid"]) == ("0.1.0", old.pid)
        assert told["after"] == {"version": "9.9.9", "pid": new.pid}
        old.wait(PATIENCE_S)
        broken = newer(tmp_path, before="import sys\nif 'serve' in sys.argv: sys.exit('it is broken')")
        done = run(daemon, broken, "restart")
        assert (done.returncode, "it is broken" in done.stderr) == (1, True)
        assert daemon.newest().pid == new.pid
        assert "replaced by 0.1.0" in run(daemon, daemon.program, "restart").stdout
        daemon.gone(new.pid)


def test_without_a_daemon_there_is_nothing_to_replace(tmp_path: Path) -> None:
    env = dict(os.environ, MLXD_HOME=str(tmp_path / "none"))
    words = ["-m", "mlxd", "restart"]
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "mlxd is not running\n")
    assert not (tmp_path / "none").exists()


def test_an_apps_own_daemon_is_not_replaced() -> None:
    with Relay(bad_child="worker") as daemon, daemon.client() as client:
        client.ping()
    home = daemon.home
    home.mkdir()
    app = subprocess.Popen(
        [sys.executable, "-m", "mlxd", "serve", "--stdio"], env=daemon.env, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with daemon.client(start=lambda: None) as client:
        for ask in (client.restart, lambda: client.shutdown(if_idle=True)):
            with pytest.raises(errors.Unsupported):
                ask()
        app.send_signal(signal.SIGUSR2)  # by default, that would end it
        give_up_at = time.monotonic() + PATIENCE_S
        while "not restarted" not in daemon.log():
            assert time.monotonic() < give_up_at, "it says nothing of it"
            client.ping()
    app.communicate(timeout=PATIENCE_S)
    assert app.returncode == 0
    daemon.remove()


# --- killed at any moment -------------------------------------------------------------------------------------------

MOMENTS = ("takes over", "another daemon has taken over")


def another(daemon: Relay) -> None:
    command = [*daemon.program, "serve"]
    nothing = subprocess.DEVNULL
    subprocess.Popen(command, env=daemon.env, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)


@pytest.mark.parametrize("whom", ["old", "new"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_one_is_left_or_none_and_the_next_start_works(
    tmp_path: Path, moment: str, whom: str
) -> None:
    """The killer is a daemon itself, where it is about to say so in its log."""
    victim = (
        "os.getpid()" if whom == "old" else "max((p.pid for p in psutil.Process().children()), default=os.getpid())"
    )
    if moment == "takes over":
        victim = "os.getppid()" if whom == "old" else "os.getpid()"
    kill = f"""
import os, psutil, structlog
info = structlog.stdlib.BoundLogger.info
def watched(self, event, *rest, **facts):
    if event == {moment!r}:
        open(os.environ["MLXD_HOME"] + "/killed", "w").close()
        os.kill({victim}, 9)
    return info(self, event, *rest, **facts)
structlog.stdlib.BoundLogger.info = watched
"""
    program = newer(tmp_path, "0.1.0", before=kill)
    with Relay(bad_child="worker", program=program) as daemon, daemon.client() as client:
        daemon.expect_exit = None
        client.process("hello")
        first = daemon.newest()
        try:
            client.restart(wait_s=PATIENCE_S)
        except errors.MlxdError:
            pass
        assert (daemon.home / "killed").exists(), "nobody was killed"
        if whom == "old":
            first.wait(PATIENCE_S)
        with daemon.client(start=lambda: another(daemon)) as after:
            deadline = 20
            while True:
                try:
                    after.process("hello")
                    break
                except (errors.ConnectFailed, errors.ConnectionLost):
                    deadline -= 1
                    assert deadline, "no daemon can be had any more"
            pid = after.status().pid
            serving = daemon.daemons()
            psutil.wait_procs([one for one in serving if one.pid != pid], timeout=PATIENCE_S)
            assert [one.pid for one in serving if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == [pid]
