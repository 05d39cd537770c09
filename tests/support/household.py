"""A daemon with a child in every state that children can be in, and how long each of them outlives its SIGKILL.

For tests/faults/test_orphans.py and tools/faults.py.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from mlxd_client import errors
from support import fake_model, tiny_model
from support.daemon import PATIENCE_S, Daemon, until
from support.deaths import ENDLESS, FAULTY_CHILD, Dying
from support.faulty_child import tell
from support.hub import Hub

# What the docs promise.
LIMIT_S = 10.0
MIB = 1024 * 1024
LONG = "the quick brown fox " * 20_000
# A rule that llguidance thinks about for as long as it is let, in a process of its own.
ENDLESS_RULE = {"allOf": [{"type": "string", "pattern": f"a{i}.*b{i}"} for i in range(100)]}


class Household:
    """
    Args:
        daemon: a running one from Dying.daemon_of, that downloads from `hub`.
        folder: where models are built.
    """

    def __init__(self, daemon: Daemon, hub: Hub, folder: Path) -> None:
        self.daemon, self.hub = daemon, hub
        self._model = tiny_model.build(folder / "model", context=500_000)
        self._folder = folder
        self._number = 0
        for name in ("moving", "stopped", "silent"):
            hub.commit(f"org/{name}", fake_model.files(8 * MIB))
        hub.throttle(200_000)

    @staticmethod
    def daemon_of(hub: Hub, **settings: Any) -> Daemon:
        """One that takes nobody for hung, not started yet."""
        return Dying.daemon_of(env=hub.env(), heartbeat_s=60, downloads=3, **settings)

    # --- filling it -----------------------------------------------------------------------------------------------

    def fill(self, *, small: bool = False) -> dict[str, psutil.Process]:
        """Have one of each at once, those that work last. Returns them by what they do.

        Args:
            small: leave out those that are most like others.
        """
        makers: dict[str, Callable[[], psutil.Process]] = {
            "stopped while decoding": lambda: self._stop(self._working(lambda it: self._ask(it, "on", **ENDLESS))),
            "with the interpreter locked": lambda: self._lock(self._working(self._load)),
            "stopped while downloading": lambda: self._stop(self._downloading("org/stopped")),
            "downloading": lambda: self._downloading("org/moving"),
            "whose hub is silent": lambda: self._downloading("org/silent", silent=True),
            "reading a long prompt": lambda: self._working(lambda it: self._ask(it, LONG)),
            "decoding": lambda: self._working(lambda it: self._ask(it, "on and on", **ENDLESS)),
            "compiling in a grandchild": self._grandchild,
            "loading": self._loading,
        }
        leave_out = {"whose hub is silent", "reading a long prompt"} if small else set()
        return {name: make() for name, make in makers.items() if name not in leave_out}

    def bury(self, children: dict[str, psutil.Process]) -> dict[str, float]:
        """Kill the daemon. Returns for how many seconds each child lived on; what lives for too long is in it, too."""
        everybody = {child.pid: child for child in self.daemon.children()}
        assert {child.pid for child in children.values()} <= set(everybody)
        began, names = time.monotonic(), {child.pid: name for name, child in children.items()}
        self.daemon.kill()
        lived: dict[str, float] = {}
        while everybody and time.monotonic() - began < LIMIT_S + 5:
            for pid, child in list(everybody.items()):
                if _is_gone(child):
                    lived[names.get(pid, f"{pid}")] = time.monotonic() - began
                    del everybody[pid]
            time.sleep(0.002)
        for pid, child in everybody.items():
            lived[names.get(pid, f"{pid}")] = float("inf")
            child.kill()
        return lived

    # --- single ones ----------------------------------------------------------------------------------------------

    def _new_model(self) -> str:
        """Another name of the same model: each is a worker's own."""
        self._number += 1
        folder = self._folder / f"copy-{self._number}"
        folder.mkdir()
        for file in self._model.iterdir():
            (folder / file.name).hardlink_to(file)
        return str(folder)

    def _new_child(self, before: set[int], what: str) -> psutil.Process:
        """The one that came since; waits for it."""
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            for child in self.daemon.children():
                with contextlib.suppress(psutil.Error):
                    if child.pid not in before and what in " ".join(child.cmdline()):
                        return child
            assert time.monotonic() < give_up_at, f"there is no new child of {what}"
            time.sleep(0.01)

    def _pids(self) -> set[int]:
        return {child.pid for child in self.daemon.children()}

    def _working(self, work: Callable[[str], None]) -> psutil.Process:
        """A worker of its own that does this."""
        before, model = self._pids(), self._new_model()
        with self.daemon.client() as client:
            client.load(model)
        child = self._new_child(before, FAULTY_CHILD.name)
        work(model)
        return child

    def _load(self, model: str) -> None:
        pass

    def _ask(self, model: str, prompt: str, **options: Any) -> None:
        """Returns once the worker has it, and has begun."""

        def ask() -> None:
            with contextlib.suppress(errors.MlxdError), self.daemon.client(reconnect=False) as client:
                client.process(prompt, model=model, **options)

        with self.daemon.client() as client, client.events() as events:
            threading.Thread(target=ask, daemon=True).start()
            until(events, "queue", id=model, active=1)

    def _stop(self, child: psutil.Process) -> psutil.Process:
        child.suspend()
        return child

    def _lock(self, child: psutil.Process) -> psutil.Process:
        tell(self.daemon.home / "fault", child.pid, "hold")
        return child

    def _grandchild(self) -> psutil.Process:
        before = self._pids()
        self._working(lambda model: self._ask(model, "x", schema=ENDLESS_RULE))
        return self._new_child(before, "mlxd.worker.trial")

    def _downloading(self, repo: str, *, silent: bool = False) -> psutil.Process:
        before = self._pids()
        with self.daemon.client() as client:
            client.download(repo)
        child = self._new_child(before, "mlxd.fetch")
        self.hub.wait_bytes("*.safetensors", 100_000, repo=repo, timeout_s=PATIENCE_S)
        if silent:
            self.hub.pause()
        return child

    def _loading(self) -> psutil.Process:
        before, model = self._pids(), self._new_model()

        def ask() -> None:
            with contextlib.suppress(errors.MlxdError), self.daemon.client(reconnect=False) as client:
                client.load(model)

        threading.Thread(target=ask, daemon=True).start()
        return self._new_child(before, FAULTY_CHILD.name)


def _is_gone(process: psutil.Process) -> bool:
    """Whether it runs no more. Whoever inherits orphans may take its time to bury them."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
