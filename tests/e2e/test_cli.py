"""The `mlxd` command as a process, against a real daemon. Models are programmable children, so that nothing is slow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mlxd.cli import exits
from support.daemon import BAD_CHILD, PATIENCE_S, Daemon, until

MLXD = [sys.executable, "-m", "mlxd"]


def run(env: dict[str, str], *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MLXD, *arguments], env=env, input=stdin, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon(bad_child="worker", steps=True) as made:
        yield made


def test_a_model_from_load_to_unload(daemon: Daemon) -> None:
    model = daemon.model("m")
    done = run(daemon.env, "load", model, "--keep-alive", "forever")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{model} is ready after ")
    (shown,) = json.loads(run(daemon.env, "ps", "--json").stdout)
    assert (shown["id"], shown["state"]) == (model, "Ready")
    assert "never" in run(daemon.env, "ps").stdout
    assert model in run(daemon.env, "list", "-q").stdout.split()
    assert run(daemon.env, "run", "-m", model, "three", "word", "prompt").stdout == "three word prompt\n"
    assert run(daemon.env, "run", "-m", model, stdin="from a pipe\n").stdout == "from a pipe\n"
    assert run(daemon.env, "chat", "-m", model, stdin="one\ntwo three\n").stdout == "one\ntwo three\n"
    assert run(daemon.env, "unload", model).stdout == f"{model} is unloaded\n"
    assert run(daemon.env, "ps").stdout == "no model is loaded\n"
    status = json.loads(run(daemon.env, "status", "--json").stdout)
    assert status["pid"] == daemon.pid


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["run", "-m", "org/nowhere", "x"], exits.NO_MODEL, "model_not_found"),
        (["run", "-m", "a/../b", "x"], exits.NO_MODEL, "model_not_found"),
        (["load", "/tmp"], exits.NO_MODEL, "model_invalid"),
        (["run", "--max-tokens", "0", "x"], exits.USAGE, "invalid_params"),
        (["run", "--schema", '{"type": "object"}', "--grammar", "start: /a/", "x"], exits.USAGE, "invalid_params"),
    ],
)
def test_failures(daemon: Daemon, arguments: list[str], code: int, kind: str) -> None:
    done = run(daemon.env, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"mlxd: {kind}: ")
    assert done.stderr.count("\n") == 1


def test_a_worker_that_dies_is_one_sentence(daemon: Daemon) -> None:
    done = run(daemon.env, "run", "-m", daemon.model("m"), "!segfault")
    assert done.returncode == exits.MODEL_FAILED
    assert done.stderr.startswith("mlxd: worker_died: ")
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_the_request_in_the_daemon(daemon: Daemon) -> None:
    model = daemon.model("m")
    with daemon.client() as client, client.events(models=[model]) as events:
        client.load(model)
        process = subprocess.Popen(
            [*MLXD, "run", "-m", model, "!slow 1000"], env=daemon.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        until(events, "queue", active=1)
        process.send_signal(signal.SIGINT)
        until(events, "queue", active=0)
        assert process.communicate(timeout=PATIENCE_S) == (b"", b"")
        assert process.returncode == exits.INTERRUPTED


def test_events_go_on_over_a_restart(daemon: Daemon) -> None:
    model = daemon.model("m")
    watcher = subprocess.Popen([*MLXD, "events", "--json"], env=daemon.env, stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    lines = (json.loads(line) for line in watcher.stdout)
    try:
        assert next(lines)["name"] == "snapshot"
        run(daemon.env, "load", model)
        assert any(line["name"] == "loading_completed" for line in lines)
        daemon.restart()
        assert any(line["name"] == "resync" for line in lines)
        run(daemon.env, "load", model)
        assert any(line["name"] == "loading_completed" and line["model_id"] == model for line in lines)
    finally:
        watcher.send_signal(signal.SIGINT)
        watcher.communicate(timeout=PATIENCE_S)
    assert watcher.returncode == exits.INTERRUPTED


def test_the_daemon_starts_by_itself_and_stops_on_request() -> None:
    home = tempfile.mkdtemp(prefix="mlxd-")
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLXD_")}
    env |= {"MLXD_HOME": home, "MLXD_WORKER_COMMAND": f"{sys.executable} {BAD_CHILD} --mode worker"}
    env["HF_HUB_CACHE"] = f"{home}/hub"
    try:
        refused = run(env, "status", "--no-start")
        assert refused.returncode == exits.NO_DAEMON
        assert not Path(home, "mlxd.sock").exists()
        pid = json.loads(run(env, "status", "--json").stdout)["pid"]
        daemon = psutil.Process(pid)
        assert json.loads(run(env, "status", "--json", "--no-start").stdout)["pid"] == pid
        assert daemon.terminal() is None
        second = run(env, "serve")
        assert second.returncode == exits.ALREADY_RUNNING
        assert second.stderr.count("\n") == 1
        assert run(env, "stop").stdout == "mlxd has stopped\n"
        assert not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE  # nobody's child any more
        assert not Path(home, "mlxd.sock").exists()
        assert run(env, "stop").stdout == "mlxd is not running\n"
    finally:
        run(env, "stop")
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_serve_in_the_foreground(how: signal.Signals) -> None:
    with Daemon(bad_child="worker") as daemon:
        assert daemon.process is not None
        daemon.process.send_signal(how)
        assert daemon.process.wait(PATIENCE_S) == 0
        assert not daemon.socket.exists()


def test_serve_where_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run({**os.environ, "MLXD_HOME": str(tmp_path / "file" / "home")}, "serve")
    assert done.returncode != 0
    assert done.stderr.startswith("mlxd: ")
    assert "Traceback" not in done.stderr
