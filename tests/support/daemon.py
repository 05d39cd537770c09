"""A real daemon as a process of its own, in a folder of its own; every end-to-end test has one."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from mlxd.settings import Settings
from mlxd_client import Client
from mlxd_client.errors import ConnectFailed
from mlxd_client.sync import EventStream
from mlxd_client.types import Event
from support import fake_model

BAD_CHILD = Path(__file__).parent / "bad_child.py"
PATIENCE_S = 60.0


@functools.cache
def kernels() -> Path:
    """One TMPDIR for the real workers of all daemons of a test run, so that MLX compiles its kernels once."""
    folder = Path(tempfile.mkdtemp(prefix="mlxd-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Daemon:
    """`with Daemon() as daemon:` starts it; leaving stops it, and fails if it left anything behind or ended badly.

    Args:
        settings: by their names; they go to the environment as MLXD_ variables.
        bad_child: workers are tests/support/bad_child.py instead of real ones, in this mode.
        files: how many descriptors it may have.
        steps: a bad_child's `!slow` generations take no step before `step` lets them, and one that is `late` stays so.
        program: what is run, before `serve`, in place of `python -m mlxd`.
    """

    def __init__(
        self,
        *,
        bad_child: str | None = None,
        steps: bool = False,
        files: int | None = None,
        program: Sequence[str] = (sys.executable, "-m", "mlxd"),
        env: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        assert settings.keys() <= set(Settings.__struct_fields__), settings
        self.home = Path(tempfile.mkdtemp(prefix="mlxd-"))  # short: a socket's path holds about a hundred bytes
        self.socket = self.home / "mlxd.sock"
        if bad_child is not None:
            settings["worker_command"] = f"{sys.executable} {BAD_CHILD} --mode {bad_child}"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("MLXD_")}
        self.env |= {"MLXD_HOME": str(self.home), "HF_HUB_CACHE": str(self.home / "hub"), "HF_HUB_OFFLINE": "1"}
        self.env |= {f"MLXD_{name.upper()}": str(value) for name, value in settings.items()} | (env or {})
        if bad_child is None:
            (self.home / "run").mkdir(mode=0o700)
            (self.home / "run" / "tmp").symlink_to(kernels())
        if steps:
            (self.home / "steps").mkdir()
            self.env["BAD_CHILD_STEPS"] = str(self.home / "steps")
        self.files = files
        self.program = list(program)
        self.process: subprocess.Popen[str] | None = None
        self.expect_exit: int | None = 0

    def start(self) -> Self:
        """Start it, and wait until it serves."""
        command = [*self.program, "serve"]
        if self.files is not None:
            command = ["/bin/sh", "-c", f'ulimit -n {self.files} && exec "$@"', "sh", *command]
        self.process = subprocess.Popen(
            command, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            try:
                with self.client(start=self._check_alive) as client:  # it tries again, for some seconds
                    client.ping()
                    return self
            except ConnectFailed:
                assert time.monotonic() < give_up_at, "the daemon does not serve"

    def _check_alive(self) -> None:
        assert self.process is not None
        if self.process.poll() is not None:
            assert self.process.stderr is not None
            raise AssertionError(f"the daemon ended with {self.process.returncode}: {self.process.stderr.read()}")

    def client(self, **options: Any) -> Client:
        return Client(self.socket, **{"name": "tests", "timeout_s": PATIENCE_S} | options)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    # --- what tests do to it and its models -----------------------------------------------------------------------

    def model(self, name: str, weights_bytes: int = 0) -> str:
        """A new folder that a bad_child can load. Returns the model's id."""
        return fake_model.build(self.home / "models" / name, weights_bytes=weights_bytes)

    def step(self, *numbers: int) -> None:
        """Let a bad_child take these steps; needs `steps=True`."""
        for number in numbers:
            (self.home / "steps" / f"step-{number}").touch()

    def worker(self) -> psutil.Process:
        """The only child that there is."""
        (child,) = self.children()
        return child

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def log(self) -> str:
        file = self.home / "logs" / "mlxd.log"
        return file.read_text() if file.exists() else ""

    def restart(self, *, crash: bool = False) -> None:
        """End it, by SIGKILL or in good order, and start another one in the same folder."""
        if crash:
            self.kill()
        else:
            self.stop()
        self._close_output()
        self.expect_exit = 0
        self.start()

    def _close_output(self) -> None:
        assert self.process is not None
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def kill(self) -> None:
        """As a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self.expect_exit = -signal.SIGKILL

    def stop(self) -> int:
        """Ask it to go by SIGTERM, and wait. Returns its exit status."""
        assert self.process is not None
        children = self.children() if self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        _, alive = psutil.wait_procs(children, timeout=10)
        for child in alive:
            child.kill()
        assert not alive, f"the daemon left children behind: {alive}"
        return self.process.returncode

    def remove(self) -> None:
        """Delete its folder; done by leaving the `with` block too."""
        shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            if self.process is not None:
                self.process.kill()
                self.process.communicate()
            self.remove()
            raise

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            status = self.stop()
            if kind is None and self.expect_exit is not None:
                assert status == self.expect_exit, f"the daemon ended with {status}"
        finally:
            if kind is not None:
                print(self.log()[-8000:])
            self.remove()


def until(events: EventStream, *names: str, **facts: Any) -> list[Event]:
    """Read events up to the first of one of these names whose model has these facts. Returns all of them."""
    seen: list[Event] = []
    while True:
        event = events.get(PATIENCE_S)
        assert event is not None, "the stream was closed"
        seen.append(event)
        if event.name in names and all(getattr(event.model, name) == value for name, value in facts.items()):
            return seen


def active(events: EventStream, running: int, waiting: int = 0) -> list[Event]:
    """Read events until a model says that so many of its requests run and wait."""
    return until(events, "queue", active=running, waiting=waiting)
