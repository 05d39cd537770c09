"""Real workers that die of each cause in the middle of decoding, and how long it takes until that is told.

For tests/faults/test_deaths.py and tools/faults.py. Times run from the moment at which the kernel says that the process
has ended, so that they are the daemon's own; from the fault where the process lives on.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mlxd.children.exitwatch import ExitWatch
from mlxd_client import errors
from support.daemon import PATIENCE_S, Daemon, until
from support.faulty_child import tell

FAULTY_CHILD = Path(__file__).with_name("faulty_child.py")
HEARTBEAT_S = 2.0
MIB = 1024 * 1024
# An answer that does not end by itself.
ENDLESS: dict[str, Any] = {"temperature": 0, "logit_bias": {"2": -1000}, "max_tokens": 500_000, "speculation": "off"}
CGROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cause:
    """What is done to a worker, and what has to be told of it, and how soon, in seconds.

    Attributes:
        lives: the process does not end by itself.
    """

    fault: str
    facts: dict[str, Any]
    within_s: float = 1.0
    lives: bool = False


CAUSES = {
    "segfault": Cause("segfault", {"cause": "signal", "signal": "SIGSEGV"}),
    "abort": Cause("abort", {"cause": "signal", "signal": "SIGABRT"}),
    "exit": Cause("exit", {"cause": "exit", "exit_code": 3}),
    "SIGKILL": Cause("SIGKILL", {"cause": "signal", "signal": "SIGKILL"}),
    "address space limit": Cause("limit", {"cause": "exit", "exit_code": 1}),
    "out of memory": Cause("eat", {"cause": "signal", "signal": "SIGKILL"}),
    "garbage on its pipe": Cause("garbage", {"cause": "garbage"}, lives=True),
    "interpreter locked": Cause("hold", {"cause": "hang"}, HEARTBEAT_S + 1.0, lives=True),
    "stopped": Cause("freeze", {"cause": "hang"}, HEARTBEAT_S + 1.0, lives=True),
}
LINUX_ONLY = {"address space limit", "out of memory"}


class Dying:
    """One daemon whose workers are real and do as they are told.

    Args:
        model: an id that a real worker can load.
    """

    def __init__(self, daemon: Daemon, model: str) -> None:
        self.daemon, self.model = daemon, model

    @staticmethod
    def daemon_of(*, heartbeat_s: float = HEARTBEAT_S, **settings: Any) -> Daemon:
        """A daemon with such workers, not started yet."""
        daemon = Daemon(heartbeat_s=heartbeat_s, worker_command=f"{sys.executable} {FAULTY_CHILD} worker", **settings)
        daemon.env["FAULTY_CHILD"] = str(daemon.home / "fault")
        return daemon

    def die(self, name: str) -> float:
        """Have it die while it decodes two answers, and see that both are told, and that the next one works.

        Returns: seconds until both were told.
        """
        cause, told = CAUSES[name], dict[int, tuple[float, errors.MlxdError]]()
        with self.daemon.client() as client, client.events() as events:
            client.load(self.model)  # also heals the breaker, which three deaths have opened
            worker = self._worker()
            threads = [threading.Thread(target=self._decode, args=(number, told)) for number in range(2)]
            with _bounded(worker) if cause.fault == "eat" else contextlib.nullcontext():
                for thread in threads:
                    thread.start()
                until(events, "queue", id=self.model, active=2)
                at = self._strike(worker, cause)
                for thread in threads:
                    thread.join(PATIENCE_S)
            assert sorted(told) == [0, 1], f"{name}: only {sorted(told)} were told"
            for _, error in told.values():
                assert isinstance(error, errors.WorkerDied), f"{name}: {error!r}"
                assert cause.facts.items() <= error.details.items(), f"{name}: {error.details}"
            assert client.model(self.model).state == "Downloaded"
            client.load(self.model)
            assert client.process("all is well", model=self.model, max_tokens=4).usage.completion_tokens > 0
        return max(when for when, _ in told.values()) - at

    def _worker(self) -> psutil.Process:
        (worker,) = [child for child in self.daemon.children() if FAULTY_CHILD.name in " ".join(child.cmdline())]
        return worker

    def _decode(self, number: int, told: dict[int, tuple[float, errors.MlxdError]]) -> None:
        try:
            with self.daemon.client(reconnect=False) as client:
                for _ in client.stream_process("on and on", model=self.model, **ENDLESS):
                    pass
        except errors.MlxdError as error:
            told[number] = time.monotonic(), error

    def _strike(self, worker: psutil.Process, cause: Cause) -> float:
        """Returns when the time begins to run."""
        watch = ExitWatch(worker.pid)
        try:
            if cause.fault == "SIGKILL":
                worker.kill()
            else:
                tell(self.daemon.home / "fault", worker.pid, cause.fault)
            if not cause.lives:
                assert select.select([watch.fileno], [], [], PATIENCE_S)[0], "it does not die"
            return time.monotonic()
        finally:
            watch.close()


@contextlib.contextmanager
def _bounded(worker: psutil.Process) -> Iterator[None]:
    """A control group that lets it have a little more than it has; then the kernel ends it.

    Raises OSError where this process may not make one.
    """
    root, name = memory_group()
    group = root / f"mlxd-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(worker.pid))
        (group / name).write_text(str(worker.memory_info().rss + 64 * MIB))
        yield
    finally:
        _empty(group, root)


def _empty(group: Path, root: Path) -> None:
    for pid in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(OSError):
            (root / "cgroup.procs").write_text(pid)
    for _ in range(100):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)


def memory_group() -> tuple[Path, str]:
    """Where control groups of memory can be made, and the name of their limit. Raises OSError where they cannot."""
    for root in CGROUPS:
        name = "memory.limit_in_bytes" if root.name == "memory" else "memory.max"
        trial = root / f"mlxd-trial-{os.getpid()}"
        try:
            trial.mkdir()
        except OSError:
            continue
        usable = (trial / name).exists()
        trial.rmdir()
        if usable:
            return root, name
    raise OSError("no control groups of memory can be made here")


def possible(name: str) -> bool:
    """Whether this system lets it be done."""
    if name in LINUX_ONLY and sys.platform != "linux":
        return False
    if CAUSES[name].fault == "eat":
        try:
            memory_group()
        except OSError:
            return False
    return True
