"""Daemons that start against each other, are stopped and killed at any step of it, and find what others left.

One loop, for the suite (a few starts) and for `tools/dev.py faults starts` (as many as one likes). After each round: at
most one daemon answers on the socket; none that served was cut off by another's start; those that did not serve said
why; and where none is left, the next start serves.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
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
from collections.abc import Callable
from pathlib import Path

from mlxd_client import Client
from mlxd_client.errors import ClientError
from support.daemon import PATIENCE_S, Daemon

__all__ = ["StartLoop"]

SCRIPT = Path(__file__).parent / "stopping_start.py"
FAILED, ALREADY_RUNNING = 1, 8
NOBODY = 65_534
# So many steps has a start; a few more than there are never come, and the daemon serves.
STEPS = 24


class Start:
    """One process, and what became of it: running, stopped, ended."""

    def __init__(self, how: str, env: dict[str, str], told: queue.Queue[tuple[Start, str]]) -> None:
        command = [sys.executable, str(SCRIPT), how, "serve"]
        self.how = how
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        self.state = "running"
        self.killed = False
        self._told = told
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def _watch(self) -> None:
        """The kernel tells of stops and of the end, in this order. The state is set by whom takes notice."""
        while True:
            _, status = os.waitpid(self.pid, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                self._told.put((self, "stopped"))
                continue
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self._told.put((self, "ended"))
            return

    def step(self) -> str:
        """The step that it stopped before."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def go_on(self) -> None:
        self.state = "running"
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.killed = True
        os.kill(self.pid, signal.SIGKILL)

    def last_words(self) -> str:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        with self.process.stdout, self.process.stderr:
            return self.process.stderr.read().decode()


class StartLoop:
    """
    Args:
        say: told of each round, in a line.
    """

    def __init__(self, seed: int, say: Callable[[str], None] = print) -> None:
        self.tally: Counter[str] = Counter()
        self.starts = 0
        self._draw = random.Random(seed)
        self._say = say
        self._folder = Path(tempfile.mkdtemp(prefix="mlxd-"))
        self._base = Daemon(bad_child="worker")
        self._homes = [self._folder / name for name in "ab"]
        # In the first home, where that home's own lock is; or in neither.
        self.path = self._homes[0] / "mlxd.sock"
        self._told: queue.Queue[tuple[Start, str]] = queue.Queue()
        self._alive: list[Start] = []
        self._serving: Start | None = None
        self._watch: Client | None = None  # a client of it that was there before the others began
        self._epoch = ""

    def __enter__(self) -> StartLoop:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._alive:
            one.kill()
        self._reap(lambda: not self._alive)
        self._close_watch()
        self._base.remove()
        shutil.rmtree(self._folder)

    def run(self, starts: int) -> None:
        """Rounds until so many daemons were started. Raises AssertionError."""
        while self.starts < starts:
            self._round()

    # --- a round --------------------------------------------------------------------------------------------------

    def _round(self) -> None:
        if self._serving is None and self._draw.random() < 0.15:
            self._new_place()
        litter = self._leave_litter() if self._serving is None else self._disturb()
        before = self._serving
        crowd = [self._start() for _ in range(self._draw.choice((1, 1, 1, 2, 3, 5)))]
        steps = self._play(crowd)
        blocked = litter in BLOCKING
        self._check(crowd, blocked=blocked)
        if blocked:
            self._clean_up(litter)
        assert before is None or before is self._serving
        if self._serving is None:
            self._next_start_serves()
        fate = self._end_somehow()
        self.tally.update((f"left behind: {litter}", f"the one that served: {fate}"))
        self._say(f"{litter}; {len(crowd)} starts, stopped before {', '.join(steps) or 'nothing'}; then {fate}")

    def _new_place(self) -> None:
        """No folder, and a socket in the first home or outside of both."""
        for folder in self._folder.iterdir():
            shutil.rmtree(folder)
        self.path = self._draw.choice((self._homes[0] / "mlxd.sock", self._folder / "s" / "x.sock"))

    def _start(self, how: str | None = None, *, home: int | None = None) -> Start:
        if how is None:
            how = self._draw.choice(("0", "reused", *(str(self._draw.randint(1, STEPS)) for _ in range(8))))
        home = self._draw.choice((0, 0, 1)) if home is None else home
        env = self._base.env | {"MLXD_HOME": str(self._homes[home]), "MLXD_SOCKET": str(self.path)}
        self._homes[0].mkdir(mode=0o700, exist_ok=True)  # where the socket may be
        one = Start(how, env, self._told)
        self._alive.append(one)
        self.starts += 1
        return one

    def _play(self, crowd: list[Start]) -> list[str]:
        """See each of them to its end, or to serving: those that stop are killed or go on, at once or after others."""
        steps, later = [], list[Start]()
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            moving = [one for one in crowd if one.state == "running" and one is not self._serving]
            if not moving and later and self._told.empty():
                self._decide(later.pop(), at_once=True)
                continue
            if not moving and not later:
                return steps
            assert time.monotonic() < give_up_at, f"neither serving nor ended: {[one.how for one in moving]}"
            one = self._next_told(0.05)
            if one is None:
                self._see_who_serves()
            elif one.state == "stopped":
                steps.append(one.step())
                self.tally[f"stopped before: {steps[-1]}"] += 1
                if self._draw.random() < 0.5 or not self._decide(one, at_once=False):
                    later.append(one)
            elif one is self._serving:
                raise AssertionError("the one that served has ended by itself: " + one.last_words())

    def _decide(self, one: Start, *, at_once: bool) -> bool:
        """Kill it or let it go on. Returns whether that is done now."""
        if not at_once and self._draw.random() < 0.3:
            return False
        if self._draw.random() < 0.6:
            one.kill()
            self.tally["killed while starting"] += 1
            self._reap(lambda: one.state == "ended")
        else:
            one.go_on()
        return True

    def _next_told(self, timeout_s: float) -> Start | None:
        try:
            one, state = self._told.get(timeout=timeout_s)
        except queue.Empty:
            return None
        one.state = state
        if state == "ended" and one in self._alive:
            self._alive.remove(one)
        return one

    def _reap(self, over: Callable[[], bool]) -> None:
        """Take notice of ends until `over`; stops are put back for later."""
        give_up_at, stopped = time.monotonic() + PATIENCE_S, list[Start]()
        while not over():
            assert time.monotonic() < give_up_at, "a killed process does not end"
            one = self._next_told(0.05)
            if one is not None and one.state == "stopped":
                one.state = "running"
                stopped.append(one)
        for one in stopped:
            self._told.put((one, "stopped"))

    def _see_who_serves(self) -> None:
        """Who answers on the socket must be who answered before, unless that one was killed."""
        client = Client(self.path, start=False, reconnect=False, timeout_s=2.0)
        try:
            greeting = client.connect()
        except ClientError:
            client.close()  # nobody yet, or somebody who stopped meanwhile
            return
        pid, epoch = greeting.server.pid, greeting.epoch
        if self._serving is not None:
            client.close()
            assert (pid, epoch) == (self._serving.pid, self._epoch), (
                f"{pid} has taken the socket of {self._serving.pid}"
            )
            return
        (self._serving,) = [one for one in self._alive if one.pid == pid]
        self._epoch, self._watch = epoch, client
        assert stat.S_IMODE(os.lstat(self.path).st_mode) == 0o600

    def _check(self, crowd: list[Start], *, blocked: bool) -> None:
        """Whoever of them does not serve was killed, or said that another does, or what is in the way."""
        for one in crowd:
            if one is self._serving:
                assert not blocked
                continue
            assert one.state == "ended", f"{one.pid} is alive beside {self._serving and self._serving.pid}"
            words = one.last_words()
            if one.killed:
                continue
            assert "Traceback" not in words, words
            code = one.process.returncode
            assert code == ALREADY_RUNNING or (blocked and code == FAILED), (code, words)
            self.tally["refused: " + ("already running" if code == ALREADY_RUNNING else "something in the way")] += 1
        assert self._alive == ([self._serving] if self._serving else [])
        if self._watch is not None:
            self._watch.ping()  # on the connection that it had before the others began

    def _next_start_serves(self) -> None:
        one = self._start("0")
        self._play([one])
        assert self._serving is one, f"the next start does not serve: {one.process.returncode}, {one.last_words()}"
        self.tally["next start served"] += 1

    # --- the one that serves --------------------------------------------------------------------------------------

    def _end_somehow(self) -> str:
        """Kill the daemon that serves, end it in good order, or leave it for the next round. Returns which."""
        assert self._serving is not None
        fate = self._draw.choice(("stays", "stays", "killed", "killed", "killed", "killed", "terminated"))
        if fate == "stays":
            return fate
        one, self._serving = self._serving, None
        self._close_watch()
        if fate == "killed":
            one.kill()
        else:
            os.kill(one.pid, signal.SIGTERM)
        self._reap(lambda: one.state == "ended")
        words = one.last_words()
        if fate == "terminated":
            assert one.process.returncode == 0, words
            assert not self.path.exists()
        return fate

    def _close_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _disturb(self) -> str:
        """Do something to a daemon that serves, which the others' starts must not make use of."""
        assert self._serving is not None
        what = self._draw.choice(("nothing", "nothing", "no lock", "frozen", "another user"))
        if what == "no lock":
            for name in ("mlxd.lock", "x.sock.lock"):
                for folder in (*self._homes, self.path.parent):
                    (folder / name).unlink(missing_ok=True)
        elif what == "frozen":
            self._freeze()
        elif what == "another user" and os.geteuid() == 0:
            other = self._start(f"uid:{NOBODY}", home=0)
            self._reap(lambda: other.state == "ended")
            words = other.last_words()
            assert other.process.returncode not in (0, ALREADY_RUNNING), words
            assert "Traceback" not in words, words
            self.tally["another user, refused"] += 1
        return what

    def _freeze(self) -> None:
        """One that stands still keeps its socket, and goes on afterwards."""
        one = self._serving
        assert one is not None
        os.kill(one.pid, signal.SIGSTOP)
        assert self._next_told(PATIENCE_S) is one
        late = self._start("0")
        self._reap(lambda: late.state == "ended")
        assert late.process.returncode == ALREADY_RUNNING, late.last_words()
        one.go_on()

    # --- what is left behind --------------------------------------------------------------------------------------

    def _leave_litter(self) -> str:
        """Put something in the way of the next starts, beside what killed ones have left. Returns what."""
        what = self._draw.choice(LITTER)
        if what == "nothing":
            return what
        self._homes[0].mkdir(mode=0o700, exist_ok=True)
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        if what == "a dead socket":
            dead(self.path)
        elif what == "a file":
            self.path.write_text("precious")
        elif what == "a folder":
            self.path.mkdir()
        elif what == "a link to nothing":
            self.path.symlink_to(self._folder / "nothing")
        elif what == "a link to a dead socket":
            dead(self._folder / "elsewhere")
            self.path.symlink_to(self._folder / "elsewhere")
        elif what == "a lock of a living process":
            (self._homes[0] / "mlxd.lock").write_text(f"{os.getppid()}\n")
        elif what == "a lock full of noise":
            (self._homes[0] / "mlxd.lock").write_bytes(os.urandom(64))
        elif what == "a folder that is open to all":
            self._homes[0].chmod(0o755 if self.path.parent == self._homes[0] else 0o777)
        return what

    def _clean_up(self, litter: str) -> None:
        """What was in the way is as it was; then it goes."""
        found = os.lstat(self.path)
        if litter == "a file":
            assert self.path.read_text() == "precious"
        if stat.S_ISDIR(found.st_mode):
            self.path.rmdir()
        else:
            assert not stat.S_ISSOCK(found.st_mode)
            self.path.unlink()
        (self._folder / "elsewhere").unlink(missing_ok=True)


LITTER = (
    *["nothing"] * 8, "a dead socket", "a file", "a folder", "a link to nothing",
    "a link to a dead socket", "a lock of a living process", "a lock full of noise", "a folder that is open to all",
)  # fmt: skip
BLOCKING = {"a file", "a folder", "a link to nothing", "a link to a dead socket"}


def dead(path: Path) -> None:
    """A socket's file that nobody listens on."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(path))
