"""Handovers in which the old or the new daemon is killed, fails, hangs or is told to end, at each step of it.

One loop, for the suite (a few) and for `tools/dev.py faults handovers` (every step). After each: one daemon of the home
at most, and the next client is served, by it or by one that it starts; the lock and the socket are that one's; what was
accepted is answered once or its connection closed; no process is left; files are old or new, and a batch job goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import random
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from mlxd.cli.daemon import runs
from mlxd_client import Client, errors
from mlxd_client.codec import Encoding
from support.activator import Activator
from support.daemon import BAD_CHILD, PATIENCE_S
from support.failpoints import check_files
from support.ledger import Line, Traffic
from support.mortal_handover import DEEDS, NEW, OLD, SERVING
from support.restarts import Relay

__all__ = ["NOTHING", "PLACES", "Fault", "Handovers", "faults"]

PROGRAM = Path(__file__).with_name("mortal_handover.py")
PLACES = ("alone", "systemd", "launchd", "joined")
SETTINGS: dict[str, Any] = {"drain_s": 1, "max_batch": 4, "batch_slots": 2}
# How long children of a daemon that was killed may live on.
ORPHANS_S = 10.0


class Fault(NamedTuple):
    role: str
    step: str
    deed: str

    def __str__(self) -> str:
        return f"{self.deed} as the {self.role} one has {self.step}"


# Where the new one is only tried; it is ended as soon as it has said that it is ready.
TRIED = {"asked", "started", "heard ready", "born", "inherited", "met"}
# To wait for the last step of one that all goes well with.
NOTHING = Fault("new", "alone", "nothing happens")


def faults(place: str) -> list[Fault]:
    """All that can happen there."""
    found = []
    for role, steps in (("old", OLD), ("new", NEW)):
        for step in steps:
            if place == "launchd" and step not in TRIED:
                continue
            for deed in DEEDS:
                other = "old" if deed == DEEDS[0] else "new"
                if step == {"old": "alone", "new": "asked"}[other] or (deed == "the new fails" and role == "old"):
                    continue  # it is not there any more, or not yet; and fails by itself alone
                found.append(Fault(role, step, deed))
    return found


# --- places ---------------------------------------------------------------------------------------------------------


class Alone:
    """No manager: the next client starts the next daemon, as clients do."""

    def __init__(self, folder: Path) -> None:
        self._relay = Relay(bad_child="worker", env={"MORTAL_HANDOVER": str(folder)}, **SETTINGS)
        self.home, self.socket, self.env = self._relay.home, self._relay.socket, self._relay.env
        mine = {name: value for name, value in self.env.items() if os.environ.get(name) != value}
        named = [f"{name}={value}" for name, value in mine.items()]
        self.command = ["/usr/bin/env", *named, sys.executable, str(PROGRAM), "serve"]

    def client(self) -> Client:
        return Client(self.socket, start=self.command, name="tests", timeout_s=PATIENCE_S)

    def start_beside(self) -> int:
        """Start another. Returns its exit status."""
        return subprocess.run(self.command, capture_output=True, timeout=PATIENCE_S, check=False).returncode

    def model(self, name: str) -> str:
        return self._relay.model(name)

    def close(self) -> None:
        self._relay.remove()


class Managed(Activator):
    """A manager that follows the service's main process, and kills what is left of the service once that has ended."""

    def __init__(self, folder: Path, *, told: bool) -> None:
        worker = f"{sys.executable} {BAD_CHILD} --mode worker"
        super().__init__(program=[str(PROGRAM)], worker_command=worker, **SETTINGS)
        (self.home / "run" / "tmp").unlink()  # what real workers share is not for these
        self.env["MORTAL_HANDOVER"] = str(folder)
        self.socket = self.path
        if not told:
            del self.env["NOTIFY_SOCKET"]
        self.on_demand()

    def _watch(self) -> None:
        main = 0
        while not self._over.is_set():
            ready = select.select([self._heard] if main else [self._heard, self.sock], [], [], 0.02)[0]
            if self._heard in ready:
                message = self._heard.recv(4096).decode()
                main = int(message[8:]) if message.startswith("MAINPID=") and main else main
            elif main and not runs(main):
                for process in of_home(self.home):
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                self._reap()
                main = 0
            elif ready:
                self._reap()
                main = self.start().pid

    def _reap(self) -> None:
        if self.process is not None:
            self.process.wait(PATIENCE_S)
            assert self.process.stderr is not None
            self.process.stderr.close()

    def model(self, name: str) -> str:
        from support import fake_model

        return fake_model.build(self.home / "models" / name)

    def close(self) -> None:
        self.__exit__()


def of_home(home: Path) -> list[psutil.Process]:
    """All processes of it that run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("MLXD_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def daemons(home: Path) -> list[psutil.Process]:
    found = []
    for process in of_home(home):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "serve" in words and "--stdio" not in words:
                found.append(process)
    return found


# --- who asks -------------------------------------------------------------------------------------------------------


class Asking(threading.Thread):
    """Connections that ask all the while, and keep books. One of them asks for the restart, and one for something that
    takes the old one a second."""

    def __init__(self, path: Path, draw: random.Random, models: list[str]) -> None:
        super().__init__()
        self.traffic = Traffic(path, draw, models, connections=5, hostile=False)
        self.restart, self.restarted, self.fired = threading.Event(), threading.Event(), threading.Event()
        self.over = threading.Event()
        self._failed: BaseException | None = None
        self._path = path

    def run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._failed = error

    async def _main(self) -> None:
        asked: list[Line] = []
        while not self.over.is_set():
            await self.traffic.turn()
            await asyncio.sleep(0.03)
            if self.restart.is_set() and not asked:
                for method, params in (("process", {"prompt": "!slow 50", "stream": True}), ("restart", None)):
                    asked.append(Line(Encoding.JSON, self.traffic.tally))
                    await asked[-1].connect(self._path)
                    asked[-1].send(asked[-1].frame(method, params))
            if asked and (asked[-1].closed or not asked[-1].open):
                if self.fired.is_set() or asked[-1].closed or self.traffic.tally["answered restart"]:
                    self.restarted.set()
                else:  # refused: the one before has ended, and this is not known yet
                    asked[-1].send(asked[-1].frame("restart", None))
        self.traffic.lines += asked
        await self.traffic.settle()

    def end(self) -> None:
        """Raises what was wrong."""
        self.over.set()
        self.join(PATIENCE_S + 30)
        assert not self.is_alive(), "it never ends"
        if self._failed is not None:
            raise AssertionError("what was asked was not answered once") from self._failed


class App:
    """`mlxd serve --stdio --join`, with a request under way."""

    def __init__(self, place: Alone) -> None:
        self._process = subprocess.Popen(
            [*place.command, "--stdio", "--join"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, number: int, prompt: str) -> None:
        assert self._process.stdin is not None
        message = {"jsonrpc": "2.0", "id": number, "method": "process", "params": {"prompt": prompt}}
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def end(self, asked: int) -> list[dict[str, Any]]:
        """Ask nothing more. Returns the answers: each at most once, and all where the daemon did not hang up."""
        out, _ = self._process.communicate(timeout=PATIENCE_S)
        assert self._process.returncode == 0
        answers = [json.loads(line) for line in out.splitlines()]
        ids = [one["id"] for one in answers if one["id"] is not None]
        assert len(ids) == len(set(ids)), f"answered twice: {answers}"
        assert set(ids) <= set(range(1, asked + 1)), answers
        return [one for one in answers if one["id"] is not None]


# --- the loop -------------------------------------------------------------------------------------------------------


class Handovers:
    """All in one home, one after the other: a fault finds what the one before has left.

    Attributes:
        tally: what was done, and what came of it.
    """

    def __init__(self, place: str, seed: int) -> None:
        self.tally: Counter[str] = Counter()
        self._name = place
        self._draw = random.Random(seed)
        self._folder = Path(tempfile.mkdtemp(prefix="mlxd-"))
        self._told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._told.bind(str(self._folder / "told"))
        self._told.settimeout(PATIENCE_S)
        self.place = Managed(self._folder, told=place == "systemd") if self.managed else Alone(self._folder)
        self._models = [self.place.model(name) for name in ("one", "two")]

    @property
    def managed(self) -> bool:
        return self._name in ("systemd", "launchd")

    def __enter__(self) -> Handovers:
        return self

    def __exit__(self, *_: object) -> None:
        self._told.close()
        left = of_home(self.place.home)
        self.place.close()
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self._folder)

    def trace(self) -> list[str]:
        """The steps that were reached since the last fault was set."""
        return (self._folder / "trace").read_text().splitlines()

    def run(self, fault: Fault) -> None:
        """One handover. Raises AssertionError, which names the fault."""
        try:
            self._run(fault)
        except Exception as error:
            print(self._log())
            raise AssertionError(f"{self._name}: {fault}: {error}") from error
        self.tally[f"{self._name}: {fault.deed}"] += 1

    def _log(self) -> str:
        file = self.place.home / "logs" / "mlxd.log"
        lines = file.read_text().splitlines() if file.exists() else []
        return "\n".join(line for line in lines if "request ended" not in line and '"event":"child' not in line)[-6000:]

    def _run(self, fault: Fault) -> None:
        with self.place.client() as client:
            first = client.status().pid
            job = client.submit_batch([{"method": "process", "params": {"prompt": f"item {n}"}} for n in range(6)])
        inode = os.lstat(self.place.socket).st_ino
        app = None
        if isinstance(self.place, Alone) and self._name == "joined":
            app = App(self.place)
            app.ask(1, "one")
            app.ask(2, "!slow 50")
        (self._folder / "trace").write_text("")
        (self._folder / "fault.done").unlink(missing_ok=True)
        (self._folder / "fault").write_text(json.dumps(fault._asdict()))
        with self._asking() as asking:
            asking.restart.set()
            pids = json.loads(self._told.recv(4096))
            asking.fired.set()
            self._meanwhile(fault, pids.get("new", 0))
            self._join_anew(app)
            self._served()  # whatever becomes of the handover
            assert asking.restarted.wait(PATIENCE_S), "the restart is neither answered nor hung up on"
            last = self._last()
        if fault is NOTHING:
            assert last != first
        self._files(last, inode)
        with self.place.client() as client:
            ended = client.wait_job(job.job)
            assert (ended.state, ended.done_items, ended.failed_items) == ("done", 6, 0), ended
            results = [one.result.text for one in client.results(job.job) if one.result]
            assert results == [f"item {n}" for n in range(6)], results
        self.tally["served by the old one" if last == first else "served by another"] += 1

    @contextlib.contextmanager
    def _asking(self) -> Iterator[Asking]:
        asking = Asking(self.place.socket, self._draw, self._models)
        asking.start()
        try:
            yield asking
        finally:
            asking.end()

    def _meanwhile(self, fault: Fault, new: int) -> None:
        """One that serves and hangs keeps others out, and goes on in the end."""
        if fault.deed != "the new hangs" or fault.step not in SERVING:
            return
        stopped(new)
        if isinstance(self.place, Alone):
            assert self.place.start_beside() == 8
        os.kill(new, signal.SIGCONT)

    def _join_anew(self, app: App | None) -> None:
        """An app whose way to the old one has ended, or not, is served by whoever is there."""
        if app is None:
            return
        assert isinstance(self.place, Alone)
        self.tally[f"answers that came through the pipe that was there: {len(app.end(2))} of 2"] += 1
        for _ in range(10):
            later = App(self.place)
            later.ask(1, "all is well")
            told = later.end(1)
            if told and "result" in told[0]:
                assert told[0]["result"]["text"] == "all is well"
                return
            self.tally["apps that had to join once more"] += 1
        raise AssertionError("no app is served")

    def _served(self) -> int:
        """The next client is served. It may be hung up on by one that dies, but always finds or starts a daemon: it is
        never told that there is none. Returns whose it was."""
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            with self.place.client() as client, contextlib.suppress(errors.ConnectionLost, errors.ShuttingDown):
                assert client.process("all is well").text == "all is well"
                return client.status().pid
            self.tally["next clients that were hung up on"] += 1
            assert time.monotonic() < give_up_at

    def _last(self) -> int:
        """Returns the daemon that is left when all is over: the only one."""
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            pid = self._served()
            if self._only(pid):
                return pid
            assert time.monotonic() < give_up_at, f"{pid} is not the only one: {daemons(self.place.home)}"
            time.sleep(0.05)  # nobody tells of processes that are others' children

    def _only(self, pid: int) -> bool:
        """Whether no other daemon is left. No child may be that is not this one's."""
        if [one.pid for one in daemons(self.place.home)] != [pid]:
            return False
        give_up_at = time.monotonic() + ORPHANS_S
        while True:
            mine = {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
            left = [one for one in of_home(self.place.home) if one.pid not in mine]
            if not left:
                return True
            assert time.monotonic() < give_up_at, f"left behind: {[(one.pid, one.cmdline()) for one in left]}"
            time.sleep(0.05)

    def _files(self, pid: int, inode: int) -> None:
        """The socket, the lock and the state are this one's, and whole."""
        home, path = self.place.home, self.place.socket
        found = os.lstat(path)
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600
        if self.managed:
            assert found.st_ino == inode, "the manager's socket was replaced"
        with open(home / "mlxd.lock") as lock:
            assert lock.read() == f"{pid}\n"
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise AssertionError("nobody holds the lock")
            except BlockingIOError:
                pass
        for one in home.rglob(".mlxd.sock.*"):
            raise AssertionError(f"{one} was left")
        check_files(home)


def stopped(pid: int) -> None:
    """Wait until a process stands still, which its parent alone is told of."""
    give_up_at = time.monotonic() + PATIENCE_S
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < give_up_at
        time.sleep(0.01)
