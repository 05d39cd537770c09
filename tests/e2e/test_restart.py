"""A new daemon takes over from a running one: nothing that was accepted is lost, nobody is refused, one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxd.handover import choose_program
from mlxd_client import errors
from support.daemon import PATIENCE_S, active
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
    from concurrent.futures import ThreadPoolExecutor

    over = False

    def ask(client: object) -> int:
        asked = 0
        while not over:
            assert client.process("hello").text == "hello"  # type: ignore[attr-defined]
            assert "".join(client.stream_process("one two")) == "one two"  # type: ignore[attr-defined]
            client.ping()  # type: ignore[attr-defined]
            assert client.model(CLEANUP).id == CLEANUP  # type: ignore[attr-defined]
            asked += 4
        return asked

    with Relay(bad_child="worker") as daemon, daemon.client() as shared, daemon.client() as own:
        with ThreadPoolExecutor(3) as pool:
            counts = [pool.submit(ask, client) for client in (shared, shared, own)]
            try:
                for number in range(3):
                    before = daemon.newest().pid
                    choose_program(daemon.home, newer(tmp_path, f"9.9.{number}"))
                    with daemon.client() as client:
                        assert client.restart().version == f"9.9.{number}"
                    daemon.gone(before)
            finally:
                over = True
            assert all(count.result(PATIENCE_S) > 0 for count in counts)


def test_an_asyncio_client_notices_as_little(tmp_path: Path) -> None:
    import asyncio

    from mlxd_client import AsyncClient

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
    "import os; os._exit(7)": "ended with exit code 7",
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
        with pytest.raises(errors.RestartFailed, match="the new daemon failed") as failed:
            client.restart()
        assert FAILS[before] in failed.value.message
        assert client.status().pid == pid
        assert not client.status().draining
        assert client.process("hello").text == "hello"
        daemon.step(0, 1)
        assert stream.wait().text == "piece0 piece1"
        assert (daemon.home / "mlxd.lock").read_text() == f"{pid}\n"
        assert not [one for one in daemon.processes() if one.pid != pid and "serve" in one.cmdline()]
        choose_program(daemon.home, newer(tmp_path))  # and the next one is none the worse for it
        assert client.restart().version == "9.9.9"
        daemon.gone(pid)


def test_a_new_one_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with Relay(bad_child="worker", ready_s=1) as daemon, daemon.client() as client:
        choose_program(daemon.home, newer(tmp_path, before="import time; time.sleep(3600)"))
        with pytest.raises(errors.RestartFailed, match="it was not ready within 1 s"):
            client.restart()
        assert len([one for one in daemon.processes() if "serve" in one.cmdline()]) == 1
        client.ping()


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    with Relay(bad_child="worker") as daemon, daemon.client() as client:
        choose_program(daemon.home, [str(tmp_path / "nothing")])
        with pytest.raises(errors.RestartFailed, match="cannot be started"):
            client.restart()
        assert client.restart().version == "0.1.0"  # the choice was for that time only
