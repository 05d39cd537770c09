"""The processes that are measured: a daemon of our own in a throw-away folder, and the ones it is compared with."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil

from mlxd_client import Client
from mlxd_client.errors import ConnectFailed

TOOLS = Path(__file__).resolve().parent.parent
PATIENCE_S = 120.0


@contextlib.contextmanager
def folder(prefix: str = "mlxd-bench-") -> Iterator[Path]:
    """A throw-away folder with a short name, since a socket's path holds about a hundred bytes."""
    path = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def environment(temp: Path, **more: str) -> dict[str, str]:
    """What all compared processes get alike: no settings of the user's, no hub, a TMPDIR of their own for kernels."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLXD_")}
    return env | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(temp / "hub"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(TOOLS), os.environ.get("PYTHONPATH")))),
        "TMPDIR": str(temp),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",  # it minds that the end of text is no token
    } | more  # fmt: skip


def end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Daemon:
    """`with Daemon() as daemon:` has one that serves, with a log but nothing else to do. `more` is environment."""

    def __init__(self, **more: str) -> None:
        self._more = more
        self.home = Path(tempfile.mkdtemp(prefix="mlxd-bench-"))
        self.socket = self.home / "mlxd.sock"

    def __enter__(self) -> Self:
        self._stderr = open(self.home / "stderr", "w+")
        self._start()
        return self

    def restart(self) -> None:
        """End it in good order, and start another one in the same folder."""
        end(self.process)
        self._start()

    def _start(self) -> None:
        env = environment(self.home, MLXD_HOME=str(self.home), MLXD_KEEP_ALIVE_S="-1") | self._more
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlxd", "serve"], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=self._stderr,
        )  # fmt: skip
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            try:
                with self.client(start=self._check_alive) as client:  # it tries again, for some seconds
                    client.ping(wait_s=PATIENCE_S)
                    return
            except ConnectFailed:
                if time.monotonic() > give_up_at:
                    raise

    def _check_alive(self) -> None:
        if self.process.poll() is not None:
            self._stderr.seek(0)
            raise RuntimeError(f"the daemon ended with {self.process.returncode}: {self._stderr.read()}")

    def client(self, **options: Any) -> Client:
        return Client(self.socket, **{"name": "bench", "timeout_s": PATIENCE_S} | options)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def resident_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def __exit__(self, *failure: object) -> None:
        end(self.process)
        self._stderr.close()
        shutil.rmtree(self.home, ignore_errors=True)


class Echo:
    """`with Echo(temp) as echo:` has a bare echo server that listens on `echo.path`."""

    def __init__(self, temp: Path) -> None:
        self.path = temp / "echo.sock"
        command = [sys.executable, "-m", "benchmarks.echo", str(self.path)]
        self.process = subprocess.Popen(command, env=environment(temp), stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError("the echo server did not start")
        return self

    def __exit__(self, *failure: object) -> None:
        end(self.process)


class Reference:
    """mlx_lm in a process of its own, as an app would have it: reference.py, asked over its stdin.

    Args:
        model: the folder it loads.
    """

    def __init__(self, model: Path, temp: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.reference", str(model)]
        self._process = subprocess.Popen(
            command, env=environment(temp), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that runs mlx_lm ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        end(self._process)


@contextlib.contextmanager
def http_server(model: Path, temp: Path) -> Iterator[int]:
    """mlx_lm.server with `model` loaded, on a worker's BLAS. Gives its port on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.lm_server", "--model", str(model), "--port", str(port)]
    command += ["--log-level", "ERROR"]
    with open(temp / "http.log", "w+") as log:
        process = subprocess.Popen(command, env=environment(temp), stdout=log, stderr=log)
        try:
            _until_healthy(process, port, temp / "http.log")
            yield port
        finally:
            end(process)


def _until_healthy(process: subprocess.Popen[Any], port: int, log: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise RuntimeError(f"mlx_lm.server did not start: {log.read_text()[-2000:]}")
