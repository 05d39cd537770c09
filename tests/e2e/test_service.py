"""`mlxd service` with a real systemd: installed, started by the first client, stopped, gone without a trace."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxd.cli.daemon import runs
from mlxd_client import Client
from support.restarts import newer
from support.systemd import PATIENCE_S, NoSystemd, UserSystemd


@pytest.fixture(scope="module")
def systemd() -> Iterator[UserSystemd]:
    try:
        made = UserSystemd()
        made.__enter__()
    except NoSystemd as error:
        pytest.skip(str(error))
    yield made
    made.__exit__()


def mlxd(systemd: UserSystemd, *words: str, ok: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlxd", *words]
    done = subprocess.run(
        command, env=systemd.env | variables, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode == 0) == ok, done.stderr + done.stdout
    return done


def state(systemd: UserSystemd, ok: bool = True) -> dict[str, Any]:
    return json.loads(mlxd(systemd, "service", "status", "--json", ok=ok).stdout)


@pytest.fixture
def installed(systemd: UserSystemd) -> Iterator[UserSystemd]:
    mlxd(systemd, "service", "install", MLXD_IDLE_EXIT_S="3600")
    yield systemd
    mlxd(systemd, "service", "uninstall", "--purge")


def client(systemd: UserSystemd) -> Client:
    return Client(Path(systemd.env["MLXD_HOME"]) / "mlxd.sock", name="tests", start=False, timeout_s=PATIENCE_S)


def units(systemd: UserSystemd) -> list[str]:
    return sorted(str(path.relative_to(systemd.folder)) for path in (systemd.folder / "config").rglob("mlxd*"))


def test_the_first_client_starts_it(installed: UserSystemd) -> None:
    before = state(installed)
    assert (before["installed"], before["listening"], before.get("pid")) == (True, True, None)
    assert oct((Path(installed.env["MLXD_HOME"]) / "mlxd.sock").stat().st_mode & 0o777) == "0o600"
    with client(installed) as one:
        one.ping()
        assert state(installed)["pid"] == one.status().pid
        assert state(installed)["text"] == "0 models loaded, 0 requests running, 0 waiting"
        assert one.process("all is well").text


def test_installing_twice_changes_nothing(installed: UserSystemd) -> None:
    with client(installed) as one:
        one.ping()
        pid = one.status().pid
        told = mlxd(installed, "service", "install", MLXD_IDLE_EXIT_S="3600").stdout
        assert "as it was before" in told
        assert one.status().pid == pid
    assert mlxd(installed, "service", "install", MLXD_IDLE_EXIT_S="60").stdout.count("before") == 0
    assert state(installed).get("pid") is None  # other settings: the next client gets a daemon that has them


def test_stopped_killed_and_restarted_it_is_there_for_the_next_client(installed: UserSystemd) -> None:
    with client(installed) as one:
        one.ping()
        first = one.status().pid
    mlxd(installed, "service", "stop")
    assert state(installed).get("pid") is None
    with client(installed) as one:
        second = one.status().pid
        os.kill(second, signal.SIGKILL)
    with client(installed) as one:
        third = one.status().pid
    mlxd(installed, "service", "restart")
    with client(installed) as one:
        fourth = one.status().pid
    mlxd(installed, "service", "start")
    with client(installed) as one:
        assert one.status().pid == fourth
    assert len({first, second, third, fourth}) == 4


def test_mlxd_stop_ends_the_daemon_and_leaves_the_socket_to_systemd(installed: UserSystemd) -> None:
    with client(installed) as one:
        first = one.status().pid
    assert mlxd(installed, "stop", "--timeout", "20").stdout == "mlxd has stopped\n"
    assert state(installed).get("pid") is None
    with client(installed) as one:
        assert one.status().pid != first


def newest_main(systemd: UserSystemd) -> int:
    """The process that systemd takes for the service."""
    return int(state(systemd)["pid"])


def test_another_takes_over_and_the_service_stays_one(installed: UserSystemd, tmp_path: Path) -> None:
    """systemd learns of the new process; streams of the old one go on; nothing is started or ended by systemd."""
    (unit,) = [Path(file).name for file in state(installed)["files"] if file.endswith(".service")]
    with client(installed) as one, ThreadPoolExecutor(1) as pool:
        first = one.status().pid
        running = pool.submit(one.process, "so um i think we should uh meet on monday at three pm", n=4, max_tokens=150)
        program = newer(tmp_path)
        done = subprocess.run(
            [*program, "service", "restart"], env=installed.env | {"MLXD_IDLE_EXIT_S": "3600"}, capture_output=True,
            text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert running.result(PATIENCE_S).text
        second = one.status()
        assert second.pid != first
    assert newest_main(installed) == second.pid
    psutil.wait_procs([psutil.Process(first)] if psutil.pid_exists(first) else [], timeout=PATIENCE_S)
    shown = installed.ctl("show", "--property=NRestarts,Result", unit).stdout.split()
    assert sorted(shown) == ["NRestarts=0", "Result=success"]
    assert "takes over" in mlxd(installed, "service", "logs").stdout
    mlxd(installed, "service", "stop")
    assert not Path(f"/proc/{second.pid}").exists()
    with client(installed) as one:
        assert one.status().pid not in (first, second.pid)


def test_an_executable_that_moved_is_installed_anew(installed: UserSystemd, tmp_path: Path) -> None:
    moved = tmp_path / "bin" / "python"  # the same environment, in another place
    moved.parent.mkdir()
    moved.symlink_to(os.path.realpath(sys.executable))
    shutil.copy(Path(sys.prefix, "pyvenv.cfg"), tmp_path)
    (tmp_path / "lib").symlink_to(Path(sys.prefix, "lib"))
    with client(installed) as one:
        first = one.status().pid
        env = installed.env | {"MLXD_IDLE_EXIT_S": "3600"}
        done = subprocess.run(
            [moved, "-m", "mlxd", "service", "restart"], env=env, capture_output=True, text=True, timeout=PATIENCE_S,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "has taken over" in done.stdout
        (file,) = [Path(file) for file in state(installed)["files"] if file.endswith(".service")]
        assert f'ExecStart="{moved}"' in file.read_text()
        second = one.status().pid
        assert second != first
        assert psutil.Process(second).cmdline()[0] == str(moved)
    changed = mlxd(installed, "service", "restart", MLXD_IDLE_EXIT_S="60").stdout  # other settings: no handover
    assert "installed anew" in changed
    with client(installed) as one:
        assert one.status().pid not in (first, second)


def test_a_wrong_configuration_ends_in_one_sentence_and_no_loop(installed: UserSystemd) -> None:
    config = Path(installed.env["MLXD_HOME"]) / "config.toml"
    config.write_text("max_bacth = 3\n")
    for _ in range(8):  # more than systemd would start by default within ten seconds, before it gave the socket up
        with pytest.raises(Exception, match=r"."), client(installed) as one:
            one.ping()
    while (now := state(installed)).get("pid"):
        pass
    assert (now["listening"], now.get("failed")) == (True, None)
    (unit,) = [Path(file).name for file in now["files"] if file.endswith(".service")]
    assert installed.ctl("show", "--property=NRestarts", "--value", unit).stdout.strip() == "0"
    assert "max_bacth" in mlxd(installed, "service", "status").stderr
    assert "max_bacth" in mlxd(installed, "service", "install", ok=False).stderr
    config.unlink()
    with client(installed) as one:
        one.ping()


def test_logs_are_at_hand(installed: UserSystemd) -> None:
    with client(installed) as one:
        one.ping()
    assert '"daemon started"' in mlxd(installed, "service", "logs").stdout
    assert mlxd(installed, "service", "logs", "-n", "1").stdout.count("\n") == 1


def test_uninstalled_it_leaves_what_is_the_users(systemd: UserSystemd) -> None:
    home = Path(systemd.env["MLXD_HOME"])
    mlxd(systemd, "service", "install")
    (home / "config.toml").write_text("max_batch = 3\n")
    (home / "mine.txt").write_text("not the daemon's\n")
    with client(systemd) as one:
        one.ping()
        pid = one.status().pid
    assert len(units(systemd)) == 3  # two units, and the link that enables one
    mlxd(systemd, "service", "uninstall")
    assert units(systemd) == []
    assert not Path(f"/proc/{pid}").exists()
    assert sorted(path.name for path in home.iterdir()) == ["config.toml", "mine.txt"]
    assert "no service" in mlxd(systemd, "service", "uninstall").stdout
    (home / "mine.txt").unlink()
    mlxd(systemd, "service", "uninstall", "--purge")
    assert not home.exists()


def test_uninstalled_it_leaves_nothing_beside_a_home_whose_socket_is_elsewhere(systemd: UserSystemd) -> None:
    """A path too long for a socket, which then lies in /tmp; and a daemon that ran there by hand, with its lock."""
    home = systemd.folder / ("m" * 100)
    where = {"MLXD_HOME": str(home)}
    socket = Path(mlxd(systemd, "config", "get", "socket", **where).stdout.strip())
    assert socket.parent.parent == Path("/tmp")
    mlxd(systemd, "status", **where)  # starts one
    assert socket.with_name(f"{socket.name}.lock").exists()
    mlxd(systemd, "service", "install", **where)
    with Client(socket, name="tests", start=False, timeout_s=PATIENCE_S) as one:
        one.ping()
    mlxd(systemd, "service", "uninstall", "--purge", **where)
    assert list(socket.parent.glob(f"*{socket.name}*")) == []
    assert not home.exists()


def test_the_daemon_has_the_time_that_it_needs_to_stop(installed: UserSystemd) -> None:
    """Also where that became more after the units were written: systemd is told of it when it is needed."""
    (unit,) = [Path(file) for file in state(installed)["files"] if file.endswith(".service")]
    unit.write_text(re.sub("TimeoutStopSec=.*", "TimeoutStopSec=1", unit.read_text()))
    installed.ctl("daemon-reload")
    with client(installed) as one, ThreadPoolExecutor(1) as pool:
        one.config_set({"drain_s": 60})
        long = {"type": "string", "minLength": 5000}  # it does not end by itself
        with one.stream_process("so um", max_tokens=900, schema=long) as stream:
            next(iter(stream))
            stopped = pool.submit(mlxd, installed, "service", "stop")
            assert list(stream)
            assert stream.result.finish_reason == "length"
        stopped.result(PATIENCE_S)
    assert installed.ctl("show", "--property=Result", "--value", unit.name).stdout.strip() == "success"


def test_a_daemon_that_was_started_by_hand_gives_way(systemd: UserSystemd) -> None:
    mlxd(systemd, "status")  # starts one
    with client(systemd) as one:
        by_hand = one.status().pid
    mlxd(systemd, "service", "install")
    try:
        with client(systemd) as one:
            assert one.status().pid != by_hand
        assert not runs(by_hand)
    finally:
        mlxd(systemd, "service", "uninstall", "--purge")


def test_what_is_not_installed_cannot_be_started(systemd: UserSystemd) -> None:
    for action in ("start", "stop", "restart"):
        assert "not installed" in mlxd(systemd, "service", action, ok=False).stderr
    assert state(systemd, ok=False)["installed"] is False
