"""One child process from spawn to reaping: its frames, its signs of life, its end.

The life of a child:

    starting ──ready frame──→ ready ──→ ended           `stop` may be called, and any end may come, in each state
        └────────────────────────────────↗

Whatever goes wrong is first a verdict (why), then SIGKILL, then the reaping; only the reaping ends a child, and it
alone calls `on_exit`. Signals are sent to the pid only before the reaping, which happens here and nowhere else, so
that they can never reach a stranger who got the same pid.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import msgspec

from mlxd_client.codec import encode

from ..childwire import Heartbeat, Ready
from .death import Cause, Death, signal_name
from .exitwatch import ExitWatch
from .interface import ChildHandler, ChildSettings, ChildSpec, Log
from .lastwords import LastWords
from .pipe import FramePipe

__all__ = ["Child", "Spawned"]

# Without an exit watch, how often an exit is looked for: while one is expected, and otherwise.
_POLL_DYING_S = 0.005
_POLL_LIVING_S = 0.25
# A timer that fires this much late says that the daemon itself stood still (suspended, stopped, starved): the
# children's silence proves nothing.
_STALL_S = 1.0

_STOP_FRAME = encode({"jsonrpc": "2.0", "method": "stop", "params": {}})


class Spawned(msgspec.Struct, frozen=True):
    """A process that was just started, and the daemon's ends of what it holds."""

    process: subprocess.Popen[bytes]
    sock: socket.socket
    stderr_fd: int


class Child:
    """A running child. Made by `Supervisor.spawn`; all methods are for the loop's thread and none blocks.

    Attributes:
        kind, name: from the spec. `name` may be changed, when a waiting child is given its work.
        pid: 0 where nothing could be spawned.
        started_at: the supervisor's clock at the spawn, seconds.
        ready: what the ready frame said; None before it.
        heartbeat: the latest; None before the first.
        death: None until the child has ended.
    """

    def __init__(
        self,
        spec: ChildSpec,
        handler: ChildHandler,
        *,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        settings: ChildSettings,
        log: Log,
        on_gone: Callable[[Child], None],
    ) -> None:
        self.kind = spec.kind
        self.name = spec.name
        self.pid = 0
        self.started_at = clock()
        self.ready: Ready | None = None
        self.heartbeat: Heartbeat | None = None
        self.death: Death | None = None
        self._handler = handler
        self._loop = loop
        self._clock = clock
        self._settings = settings
        self._log = log
        self._on_gone = on_gone
        self._ended: asyncio.Future[Death] = loop.create_future()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: FramePipe | None = None
        self._stderr: LastWords | None = None
        self._exit_watch: ExitWatch | None = None
        self._verdict: tuple[Cause, str] | None = None
        self._stopping = False
        self._terminated = False
        self._pipe_ended = False
        self._next_id = 0
        self._awaited_since = self.started_at
        self._last_sign = self.started_at
        self._silence_s = 0.0
        self._watch_timer: asyncio.TimerHandle | None = None  # for readiness, heartbeats and unread bytes
        self._watch_due = 0.0
        self._stop_timer: asyncio.Handle | None = None  # for the next step of the escalation
        self._stop_at = 0.0  # when the first of them is due
        self._poll_timer: asyncio.TimerHandle | None = None  # where there is no exit watch

    def __repr__(self) -> str:
        state = "ended" if self.death else "stopping" if self._stopping else "ready" if self.ready else "starting"
        return f"<Child {self.kind} {self.name!r} pid {self.pid} {state}>"

    @property
    def alive(self) -> bool:
        """Whether the process has not been reaped yet."""
        return self.death is None

    @property
    def usable(self) -> bool:
        """Whether it is ready, and neither ending nor asked to."""
        return self.ready is not None and self.death is None and self._verdict is None and not self._stopping

    # --- what callers do ---

    def send(self, message: dict[str, Any] | msgspec.Struct) -> None:
        """Send one frame; it waits for a child that does not read. To a child that is ending it is dropped.

        A child that leaves more than `send_buffer_bytes` unread, or anything for `heartbeat_s`, is killed as hung.
        """
        pipe = self._pipe
        if pipe is None or self._process is None or self._verdict is not None:
            return
        pipe.send(encode(message))
        if pipe.unsent_bytes > self._settings.send_buffer_bytes:
            self._condemn("hang", f"left {pipe.unsent_bytes} bytes on its pipe unread")
        elif pipe.stalled_at is not None:
            self._arm_watch()

    def request(self, method: str, params: Any) -> int:
        """Send a request. Returns: its id, unique for this child; the answer comes to `on_message`."""
        self._next_id += 1
        self.send({"jsonrpc": "2.0", "id": self._next_id, "method": method, "params": params})
        return self._next_id

    def notify(self, method: str, params: Any) -> None:
        """Send a notification, such as `cancel`."""
        self.send({"jsonrpc": "2.0", "method": method, "params": params})

    def expect_silence(self, seconds: float) -> None:
        """Bear up to `seconds` of silence (where that is more than `heartbeat_s`), until called again with 0."""
        self._silence_s = seconds
        if self.ready is not None and self._process is not None:
            self._be_patient()
            self._arm_watch()

    def stop(self, grace_s: float | None = None) -> None:
        """Ask it to go: `stop` and end of input, SIGTERM after `grace_s` seconds (default `stop_grace_s`), SIGKILL
        `term_grace_s` after that. Called again, the shorter of both graces counts; 0 means SIGTERM at once."""
        if self._process is None or self._pipe is None or self._terminated:
            return
        grace_s = self._settings.stop_grace_s if grace_s is None else grace_s
        if not self._stopping:
            self._stopping = True
            self._pipe.send(_STOP_FRAME)
            self._pipe.finish()
        elif self._stop_timer is not None and self._stop_at <= self._loop.time() + grace_s:
            return
        if self._stop_timer is not None:
            self._stop_timer.cancel()
        if grace_s <= 0:
            self._terminate()
        else:
            self._stop_at = self._loop.time() + grace_s
            self._stop_timer = self._loop.call_later(grace_s, self._on_grace_over)

    def kill(self) -> None:
        """End it at once by SIGKILL; the cause is `stopped`. For a child whose work is of no use any more."""
        if self._process is not None:
            self._stopping = True
            self._signal(signal.SIGKILL)

    async def wait(self) -> Death:
        """Wait until it has ended and `on_exit` has returned."""
        return await asyncio.shield(self._ended)

    # --- start ---

    def _start(self, spawned: Spawned, scratch: bytearray) -> None:
        self._process = spawned.process
        self.pid = spawned.process.pid
        self._stderr = LastWords(self._loop, spawned.stderr_fd, self._on_stderr_line)
        self._pipe = FramePipe(
            self._loop,
            spawned.sock,
            scratch,
            self._clock,
            on_data=self._on_data,
            on_message=self._on_frame,
            on_garbage=self._on_garbage,
            on_end=self._on_pipe_end,
        )
        self._arm_watch()
        try:
            self._exit_watch = ExitWatch(self.pid)
        except OSError as error:  # an old kernel, a sandbox, or it is dead already
            self._log.debug("no exit watch", pid=self.pid, reason=str(error))
            self._loop.call_soon(self._poll_exit)
        else:
            self._loop.add_reader(self._exit_watch.fileno, self._on_exit_watch)

    def _fail(self, reason: str) -> None:
        """There is no process. Reported in the loop's next turn, so that `spawn` has returned by then."""
        death = Death(cause="spawn_failed", kind=self.kind, name=self.name, detail=reason)
        self._loop.call_soon(self._end, death)

    # --- frames ---

    def _on_data(self) -> None:
        self._last_sign = self._clock()

    def _on_frame(self, message: dict[str, Any]) -> None:
        if self._verdict is not None:
            return None
        method = message.get("method")
        if method == "heartbeat" and self.ready is not None:
            try:
                self.heartbeat = msgspec.convert(message.get("params", {}), Heartbeat)
            except msgspec.ValidationError as error:
                return self._on_garbage(f"an odd heartbeat: {error}")
            return self._call(self._handler.on_heartbeat, self.heartbeat)
        if self.ready is None or method == "ready":
            return self._on_ready(message)
        if isinstance(method, str) or ("id" in message and ("result" in message or "error" in message)):
            return self._call(self._handler.on_message, message)
        return self._on_garbage("neither a notification nor a response")

    def _on_ready(self, message: dict[str, Any]) -> None:
        if self.ready is not None:
            return self._on_garbage("ready twice")
        if message.get("method") != "ready":
            return self._on_garbage("a message before the ready frame")
        try:
            self.ready = msgspec.convert(message.get("params"), Ready)
        except msgspec.ValidationError as error:
            return self._on_garbage(f"an odd ready frame: {error}")
        self._be_patient()
        self._arm_watch()
        self._log.info(
            "child ready",
            kind=self.kind,
            name=self.name,
            pid=self.pid,
            after_s=round(self._clock() - self.started_at, 3),
            versions=self.ready.versions,
        )
        return self._call(self._handler.on_ready, self.ready)

    def _on_garbage(self, reason: str) -> None:
        self._condemn("garbage", reason)

    def _call(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            callback(self, *args)
        except Exception as error:
            self._log.error("a child's handler failed", kind=self.kind, name=self.name, pid=self.pid, exc_info=error)
            # Whether the child sent nonsense or the handler has a bug: whoever waits for this message's effect would
            # wait for ever, while a dead child is told to all who wait.
            self._on_garbage(f"a message that could not be handled: {error!r}")

    def _on_stderr_line(self, line: str) -> None:
        if line:
            self._log.debug("child stderr", kind=self.kind, name=self.name, pid=self.pid, line=line)

    # --- signs of life ---

    def _limit(self) -> tuple[float, Cause, str]:
        """When patience ends, on the clock, and what it means then."""
        settings = self._settings
        if self.ready is None:
            due = self._awaited_since + settings.ready_s
            return due, "never_ready", f"no ready frame within {settings.ready_s:g} s"
        silence_s = max(settings.heartbeat_s, self._silence_s)
        silent = (self._last_sign + silence_s, "no sign of life")
        stalled_at = self._pipe.stalled_at if self._pipe else None
        unread = (stalled_at + silence_s, "its pipe unread") if stalled_at is not None else silent
        due, what = min(silent, unread)
        return due, "hang", f"{what} for {silence_s:g} s"

    def _arm_watch(self) -> None:
        """Set the timer anew. Not needed when a sign of life comes: the timer then finds that it came too early."""
        if self._watch_timer is not None:
            self._watch_timer.cancel()
        now = self._clock()
        self._watch_due = max(now, self._limit()[0])
        self._watch_timer = self._loop.call_later(self._watch_due - now, self._watch)

    def _watch(self) -> None:
        self._watch_timer = None
        if self._stopping or self._verdict is not None or self.death is not None:
            return
        now = self._clock()
        late = now - self._watch_due
        if late > _STALL_S:
            self._be_patient()
        if now >= self._limit()[0] and self._pipe is not None:
            self._pipe.poll()  # a busy loop runs its timers before it reads
            if self._reap():
                return
        due, cause, detail = self._limit()
        if now >= due:
            self._condemn(cause, detail)
        else:
            self._arm_watch()

    def _be_patient(self) -> None:
        """Count anew: what it did not do until now says nothing, since it could not, or the daemon stood still."""
        now = self._clock()
        self._awaited_since = self._last_sign = now
        if self._pipe is not None and self._pipe.stalled_at is not None:
            self._pipe.stalled_at = now

    # --- the end ---

    def _condemn(self, cause: Cause, detail: str) -> None:
        """Kill it for a reason, unless it is ending already."""
        if self._verdict is not None or self.death is not None:
            return
        if not self._stopping:
            self._verdict = (cause, detail)
            self._log.warning("killing child", kind=self.kind, name=self.name, pid=self.pid, cause=cause, detail=detail)
        self._signal(signal.SIGKILL)

    def _on_grace_over(self) -> None:
        if not self._reap():
            self._terminate()

    def _terminate(self) -> None:
        self._terminated = True
        self._log.info("child does not stop, SIGTERM", kind=self.kind, name=self.name, pid=self.pid)
        self._signal(signal.SIGTERM)
        self._stop_timer = self._loop.call_later(self._settings.term_grace_s, self._kill_stubborn)

    def _kill_stubborn(self) -> None:
        if self._reap():
            return
        self._log.warning("child ignores SIGTERM, SIGKILL", kind=self.kind, name=self.name, pid=self.pid)
        self._stop_timer = None
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process is None:
            return
        try:
            os.kill(self.pid, number)  # not reaped yet, so that the pid is still its own
        except ProcessLookupError:  # how macOS speaks of a zombie
            pass
        if self._exit_watch is None:
            self._loop.call_soon(self._poll_exit)

    def _on_pipe_end(self) -> None:
        """It closed its end: most often because it exits."""
        self._pipe_ended = True
        if self.death is None and not self._reap() and not self._stopping:
            self._loop.call_later(self._settings.eof_grace_s, self._condemn, "hang", "closed its pipe and did not exit")

    def _on_exit_watch(self) -> None:
        if not self._reap():
            # On macOS the notice may come a moment before the process can be reaped. The kqueue has told once.
            self._close_exit_watch()
            self._poll_exit()

    def _poll_exit(self) -> None:
        if self._poll_timer is not None:
            self._poll_timer.cancel()
            self._poll_timer = None
        if self.death is None and not self._reap():
            dying = self._pipe_ended or self._stopping or self._verdict is not None
            self._poll_timer = self._loop.call_later(_POLL_DYING_S if dying else _POLL_LIVING_S, self._poll_exit)

    def _reap(self) -> bool:
        """Whether the process has exited. If so, this is its end."""
        process = self._process
        if process is None:
            return True
        status = process.poll()
        if status is None:
            return False
        self._process = None
        mid_frame, last_words = self._release()
        self._end(self._judge(status, mid_frame, last_words))
        return True

    def _release(self) -> tuple[bool, str]:
        """Hand on what it still said, and let go of all that it held. Returns: (died in mid-frame, last words)."""
        assert self._pipe is not None
        assert self._stderr is not None
        self._pipe.drain()
        mid_frame = self._pipe.mid_frame
        self._pipe.close()
        self._stderr.close()
        self._close_exit_watch()
        for timer in (self._watch_timer, self._stop_timer, self._poll_timer):
            if timer is not None:
                timer.cancel()
        self._watch_timer = self._stop_timer = self._poll_timer = None
        return mid_frame, self._stderr.text()

    def _close_exit_watch(self) -> None:
        if self._exit_watch is not None:
            self._loop.remove_reader(self._exit_watch.fileno)
            self._exit_watch.close()
            self._exit_watch = None

    def _judge(self, status: int, mid_frame: bool, last_words: str) -> Death:
        """`status` as subprocess has it: an exit code, or a signal's number, negated."""
        cause: Cause = "exit" if status >= 0 else "signal"
        detail = "in the middle of a frame" if mid_frame else ""
        if self._stopping and self._verdict is None:
            cause, detail = "stopped", ""
        elif self._verdict is not None and (status == -signal.SIGKILL or self._verdict[0] == "garbage"):
            # Otherwise it went by itself just before the kill, and its own status is the better reason.
            cause, detail = self._verdict
        elif status == -signal.SIGKILL:
            detail = "not by mlxd; most often by the system, for lack of memory"
        return Death(
            cause=cause,
            kind=self.kind,
            name=self.name,
            pid=self.pid,
            uptime_s=self._clock() - self.started_at,
            exit_code=status if status >= 0 else None,
            signal=signal_name(-status) if status < 0 else None,
            detail=detail,
            last_words=last_words,
        )

    def _end(self, death: Death) -> None:
        self.death = death
        log = self._log.info if death.expected else self._log.warning
        log(
            "child ended",
            kind=self.kind,
            name=self.name,
            pid=self.pid,
            cause=death.cause,
            exit_code=death.exit_code,
            signal=death.signal,
            detail=death.detail,
            uptime_s=round(death.uptime_s, 3),
        )
        self._on_gone(self)
        self._call(self._handler.on_exit, death)
        self._ended.set_result(death)
