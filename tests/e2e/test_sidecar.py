"""mlxd as an app's sidecar: the wire on standard input and output, an end with the parent, a shared daemon."""

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
from typing import Any

import psutil
import pytest

from mlxd_client import Client
from mlxd_client.codec import Decoder, encode
from support.daemon import PATIENCE_S, kernels

SERVE = [sys.executable, "-m", "mlxd", "serve"]


@pytest.fixture
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="mlxd-"))
    (folder / "run").mkdir(mode=0o700)
    (folder / "run" / "tmp").symlink_to(kernels())
    yield folder
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("MLXD_HOME") == str(folder):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def environment(home: Path) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLXD_")}
    return env | {"MLXD_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}


def start(home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*SERVE, *arguments], env=environment(home), stdin=pipe, stdout=pipe, stderr=pipe)


def ask(app: subprocess.Popen[bytes], method: str, **params: Any) -> dict[str, Any]:
    """One request as a JSON line, and its answer."""
    assert app.stdin is not None
    assert app.stdout is not None
    app.stdin.write(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\n")
    app.stdin.flush()
    return json.loads(app.stdout.readline())["result"]


def end(app: subprocess.Popen[bytes]) -> int:
    app.communicate(timeout=PATIENCE_S)
    return app.returncode


def test_it_speaks_on_its_standard_streams_and_ends_with_them(home: Path) -> None:
    app = start(home, "--stdio")
    assert ask(app, "ping") == {}
    assert ask(app, "process", prompt="all is well", temperature=0)["text"]
    with Client(home / "mlxd.sock", start=False) as client:  # and on its socket, for those who want to look inside
        assert client.status().pid == app.pid
    assert end(app) == 0
    assert not (home / "mlxd.sock").exists()


def test_what_was_asked_before_the_end_is_answered(home: Path) -> None:
    app = start(home, "--stdio")
    assert ask(app, "ping") == {}
    request = {"jsonrpc": "2.0", "id": 7, "method": "process", "params": {"prompt": "all is well", "temperature": 0}}
    out, _ = app.communicate(json.dumps(request).encode() + b"\n", timeout=PATIENCE_S)
    assert json.loads(out)["result"]["text"]
    assert app.returncode == 0


def test_large_frames_pass_both_ways(home: Path) -> None:
    app = start(home, "--stdio")
    assert app.stdin is not None
    assert app.stdout is not None
    long = "x" * 2_000_000
    frames = b"".join(encode({"jsonrpc": "2.0", "id": n, "method": f"{n}{long}"}) for n in range(3))
    frames += encode({"jsonrpc": "2.0", "id": 9, "method": "rpc.discover"})
    app.stdin.write(frames)
    app.stdin.flush()
    decoder, answers = Decoder(), []
    while len(answers) < 4:
        decoder.feed(os.read(app.stdout.fileno(), 65_536))
        answers += list(decoder)
    assert [answer["id"] for answer in answers] == [0, 1, 2, 9]
    assert end(app) == 0


@pytest.mark.parametrize("way", ["--stdio", "--parent-pid"])
def test_it_does_not_outlive_its_parent(home: Path, way: str) -> None:
    code = (
        "import os, subprocess, sys\n"
        f"arguments = {[*SERVE, way]!r} + ([str(os.getpid())] if {way!r} == '--parent-pid' else [])\n"
        "child = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment(home), stdout=subprocess.PIPE)
    assert parent.stdout is not None
    daemon = psutil.Process(int(parent.stdout.readline()))
    with Client(home / "mlxd.sock", start=lambda: None) as client:
        client.load("mlxd/cleanup")
        processes = [daemon, *daemon.children(recursive=True)]
    assert len(processes) == 2
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    assert alive == []


def test_a_parent_that_is_gone_already_is_not_waited_for(home: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    app = start(home, "--parent-pid", str(gone.pid))
    assert end(app) == 0


def test_the_app_hears_at_once_that_its_daemon_was_killed(home: Path) -> None:
    """A worker that goes on for a moment holds none of its pipes."""
    app = start(home, "--stdio")
    ask(app, "models.load", model="mlxd/cleanup")
    (worker,) = psutil.Process(app.pid).children()
    worker.suspend()
    app.send_signal(signal.SIGKILL)
    assert app.stdout is not None
    assert app.stdout.read() == b""
    worker.kill()
    end(app)


def test_two_apps_share_the_users_daemon(home: Path) -> None:
    one, other = start(home, "--stdio", "--join"), start(home, "--stdio", "--join")
    pid = ask(one, "status")["pid"]
    assert ask(other, "status")["pid"] == pid
    assert pid not in (one.pid, other.pid)
    assert end(one) == 0
    assert ask(other, "status")["clients"] == 1
    assert end(other) == 0
    with Client(home / "mlxd.sock", start=False) as client:
        assert client.status().pid == pid
        client.shutdown()


def test_a_daemon_that_is_there_already_is_named(home: Path) -> None:
    first = start(home, "--stdio")
    ask(first, "ping")
    second = start(home, "--stdio")
    out, err = second.communicate(timeout=PATIENCE_S)
    assert (second.returncode, out) == (8, b"")
    assert f"already running for {home} (pid {first.pid})" in err.decode()
    assert end(first) == 0


def test_join_needs_stdio(home: Path) -> None:
    app = start(home, "--join")
    _, err = app.communicate(timeout=PATIENCE_S)
    assert (app.returncode, b"--stdio" in err) == (2, True)
