"""Followers of a real daemon's events, that lag, leave, resume and outlive it; each has to hold the daemon's state.

One loop, for the suite and for tools/faults.py. A step is one thing that the daemon is asked, that befalls it, or that
a follower does. All is drawn from one seed; the moments are the machine's.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from mlxd_client import codec
from mlxd_client.codec import Encoding
from mlxd_client.mirror import Mirror
from mlxd_client.types import ACTIVITY_FIELDS, Event, Model, Snapshot, SubscribeResult
from support import fake_model
from support.daemon import PATIENCE_S, Daemon
from support.hub import Hub

# Small enough that whoever looks away lags, and whoever was away for long has to begin anew.
SETTINGS: dict[str, Any] = {
    "subscriber_events": 20, "event_log": 60, "max_batch": 16, "drain_s": 0.2, "keep_alive_s": 0.3,
}  # fmt: skip
MODELS = ("one", "two", "three")
REPO = "org/followed"
ALL_TOPICS = {"models", "queue", "jobs", "generation", "system"}
# Topic sets whose events keep all the state true that they show.
TOPICS = (
    None, ["models"], ["models", "queue"], ["models", "jobs"], ["jobs"], ["system"], ["models", "queue", "generation"],
)  # fmt: skip
MOST_FOLLOWERS = 8


def may_see(state: Snapshot, topics: list[str] | None, models: list[str] | None) -> Snapshot:
    """What a subscription shows of a state: written from the documented rule, not from the log's code."""
    told = set(topics or ALL_TOPICS)
    shown = state.models if "models" in told else []
    if "queue" not in told:
        shown = [_without_activity(model) for model in shown]
    return Snapshot(
        models=[model for model in shown if models is None or model.id in models],
        jobs=[job for job in state.jobs if "jobs" in told and (models is None or job.model in models)],
        stopping=state.stopping and "system" in told,
        memory_pressure=state.memory_pressure if "system" in told else "normal",
    )


def _without_activity(model: Model) -> Model:
    plain = {name: value for name, value in msgspec.to_builtins(model).items() if name not in ACTIVITY_FIELDS}
    return msgspec.convert(plain, Model)


def _sorted(state: Snapshot) -> Snapshot:
    """As a mirror gives it: the order of models and jobs is no part of the state."""
    models = sorted(state.models, key=lambda model: model.id)
    return msgspec.structs.replace(state, models=models, jobs=sorted(state.jobs, key=lambda job: job.job))


def _difference(wanted: Snapshot, held: Snapshot) -> list[str]:
    others = [(name, getattr(wanted, name), getattr(held, name)) for name in ("stopping", "memory_pressure")]
    lines = [f"{name}: {there} there, {here} here" for name, there, here in others if there != here]
    lines += [f"there {one}" for one in [*wanted.models, *wanted.jobs] if one not in [*held.models, *held.jobs]]
    return lines + [f"here {one}" for one in [*held.models, *held.jobs] if one not in [*wanted.models, *wanted.jobs]]


class Gone(Exception):
    """The connection has ended."""


class Wire:
    """One connection: requests out, messages in, without waiting where nobody asks for it."""

    def __init__(self, path: Path, encoding: Encoding) -> None:
        """Raises OSError."""
        self.encoding = encoding
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(path))
        self._decoder = codec.Decoder(encoding)
        self._ids = itertools.count(1)

    def ask(self, method: str, **params: Any) -> int:
        """Raises Gone."""
        number = next(self._ids)
        message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        try:
            self.sock.settimeout(PATIENCE_S)
            self.sock.sendall(codec.encode(message, self.encoding))
        except OSError:
            raise Gone from None
        return number

    def read(self, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """What is there, waiting so long for the first of it. Raises Gone."""
        found = self._decoded()
        if found or not select.select([self.sock], [], [], wait_s)[0]:
            return found
        try:
            data = self.sock.recv(65_536)
        except OSError:
            raise Gone from None
        if not data:
            raise Gone
        self._decoder.feed(data)
        return self._decoded()

    def _decoded(self) -> list[dict[str, Any]]:
        return [message for message in self._decoder if isinstance(message, dict)]

    def close(self) -> None:
        self.sock.close()


class Follower:
    """What a client does: applies its answer and its events to a mirror, and remembers where it is."""

    def __init__(self, topics: list[str] | None, models: list[str] | None, encoding: Encoding) -> None:
        self.topics, self.models, self.encoding = topics, models, encoding
        self.mirror = Mirror()
        self.epoch = ""
        self.rev = -1
        self.wire: Wire | None = None
        self.tally: Counter[str] = Counter()
        self._subscription = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._early: list[Event] = []

    def connect(self, path: Path, *, resume: bool) -> None:
        """Subscribe, from where it was if that is asked. Raises OSError, Gone."""
        params: dict[str, Any] = {}
        if self.topics is not None:
            params["topics"] = self.topics
        if self.models is not None:
            params["models"] = self.models
        if resume and self.rev >= 0:
            params["since"] = {"epoch": self.epoch, "rev": self.rev}
        self.wire = Wire(path, self.encoding)
        self._subscription = 0  # of a connection that is no more
        answer = msgspec.convert(self.answer("events.subscribe", **params), SubscribeResult)
        self._subscription = answer.subscription
        if answer.snapshot is None:
            assert resume, "no snapshot, and nothing to go on from"
            assert (answer.epoch, answer.rev) == (self.epoch, self.rev)
            self.tally["resumed"] += 1
        else:
            self.mirror.replace(answer.snapshot)
            self.tally["began anew, though it asked to resume" if "since" in params else "began"] += 1
        self.epoch, self.rev = answer.epoch, answer.rev
        early, self._early = self._early, []
        for event in early:
            self._apply(event)

    def leave(self) -> None:
        if self.wire is not None:
            self.wire.close()
        self.wire = None
        self._answers.clear()
        self._early.clear()

    def read(self, wait_s: float = 0.0) -> None:
        """Raises Gone."""
        assert self.wire is not None
        for message in self.wire.read(wait_s):
            if message.get("method") == "event":
                event = msgspec.convert(message["params"], Event)
                if event.subscription == self._subscription:
                    self._apply(event)
                elif self._subscription == 0:
                    self._early.append(event)
            elif "id" in message:
                self._answers[message["id"]] = message

    def _apply(self, event: Event) -> None:
        assert event.rev > self.rev, f"revision {event.rev} after {self.rev}"
        self.rev = event.rev
        self.mirror.apply(event)
        self.tally["events"] += 1
        self.tally["lagged"] += event.name == "lagged"

    def answer(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask, and read until the answer is there. Raises Gone."""
        assert self.wire is not None
        number = self.wire.ask(method, **params)
        give_up_at = time.monotonic() + PATIENCE_S
        while number not in self._answers:
            assert time.monotonic() < give_up_at, f"no answer to {method}"
            self.read(1.0)
        message = self._answers.pop(number)
        assert "result" in message, message
        return dict(message["result"])

    def check(self) -> bool:
        """The mirror has to be what the daemon says that its state is. Raises Gone, AssertionError.

        Answers overtake events, so that events up to the state's revision may come after it, but before the answers
        to what is asked from then on. Events that wait are joined, so that between two of them a mirror may be ahead of
        any state that ever was: it is compared once nothing has come that is newer than the state.

        Returns: whether it was compared; it is not where the daemon does not come to rest.
        """
        for _ in range(40):
            state = msgspec.convert(self.answer("events.subscribe"), SubscribeResult)
            assert state.epoch == self.epoch
            assert state.snapshot is not None
            for _ in range(3):
                self.answer("ping")
            self.answer("events.unsubscribe", subscription=state.subscription)
            if self.rev <= state.rev:
                wanted, held = _sorted(may_see(state.snapshot, self.topics, self.models)), self.mirror.snapshot()
                assert held == wanted, f"at revision {state.rev}:\n" + "\n".join(_difference(wanted, held))
                self.tally["compared"] += 1
                return True
        return False


class Followed:
    """A daemon that much happens to, and its followers."""

    def __init__(self, daemon: Daemon, hub: Hub, seed: int) -> None:
        self.daemon, self.hub, self.seed = daemon, hub, seed
        self.draw = random.Random(seed)
        self.models = [daemon.model(name) for name in MODELS]
        hub.commit(REPO, fake_model.files(200_000))
        hub.throttle(2_000_000)
        self.followers: list[Follower] = []
        self.tally: Counter[str] = Counter()
        self._driver: Wire | None = None
        self._jobs: list[str] = []
        self.steps: dict[Callable[[], object], float] = {
            self._ask: 40, self._burst: 0.4, self._cancel_job: 2, self._kill_worker: 0.4, self._kill_fetcher: 0.5,
            self._restart: 0.15, self._follow: 2, self._read_a_little: 30, self._catch_up: 12, self._look_away: 3,
            self._leave: 4, self._come_back: 8,
        }  # fmt: skip
        self._away: set[Follower] = set()  # they do not read

    def run(self, steps: int) -> Counter[str]:
        """Returns what was done. Raises AssertionError, which names the seed."""
        try:
            self._run(steps)
        except Exception as error:
            raise AssertionError(f"seed {self.seed}: {type(error).__name__}: {error}") from error
        return self.tally

    def _run(self, steps: int) -> None:
        acts, weights = list(self.steps), list(self.steps.values())
        for _ in range(steps):
            self.draw.choices(acts, weights)[0]()
        for follower in self.followers:
            self._away.discard(follower)
            give_up_at = time.monotonic() + PATIENCE_S
            while not self._agrees(follower):
                assert time.monotonic() < give_up_at, "the daemon does not come to rest"
            self.tally += follower.tally
            follower.leave()
        self.tally["steps"] += steps

    # --- what befalls the daemon ----------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Nobody waits for the answer."""
        draw, model = self.draw, self.draw.choice(self.models)
        job = draw.choice(self._jobs) if self._jobs else "none"
        asks: list[tuple[str, dict[str, Any], float]] = [
            ("process", {"prompt": draw.choice(("a b c", "!slow 5", "!error")), "model": model}, 10),
            ("process", {"prompt": "!slow 50", "model": model, "timeout_s": 0.05}, 2),
            ("models.load", {"model": model}, 5), ("models.unload", {"model": model}, 4),
            ("models.acquire", {"model": model}, 2), ("models.load", {"model": "/no/such"}, 0.5),
            ("models.download", {"model": REPO}, 2), ("models.delete", {"model": REPO}, 1.5),
            ("jobs.get", {"job": job}, 0.2), ("process", {"prompt": "!segfault", "model": model}, 0.1),
        ]  # fmt: skip
        method, params, _ = draw.choices(asks, [weight for *_, weight in asks])[0]
        self.tally[method] += 1
        try:
            if self._driver is None:
                self._driver = Wire(self.daemon.socket, Encoding.MSGPACK)
            self._driver.ask(method, **params)
            for message in self._driver.read():
                if "job" in (message.get("result") or {}) and len(message["result"]) == 1:
                    self._jobs = [*self._jobs[-9:], message["result"]["job"]]
            if draw.random() < 0.02:  # its leases go with it, and what it asked for
                self._hang_up()
        except (OSError, Gone):
            self._hang_up()

    def _burst(self) -> None:
        """More events than the sockets of those hold who look away."""
        with contextlib.suppress(OSError, Gone):
            wire = Wire(self.daemon.socket, Encoding.MSGPACK)
            wire.ask("models.load", model=self.models[0])
            left = 1 + sum(wire.ask("process", prompt="a", model=self.models[0]) > 0 for _ in range(120))
            while left:
                left -= len(wire.read(PATIENCE_S))
            wire.close()
            self.tally["bursts"] += 1

    def _hang_up(self) -> None:
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def _cancel_job(self) -> None:
        if self._driver is not None and self._jobs:
            with contextlib.suppress(Gone):
                self._driver.ask("jobs.cancel", job=self.draw.choice(self._jobs))

    def _kill_worker(self) -> None:
        self._kill("bad_child")

    def _kill_fetcher(self) -> None:
        self._kill("mlxd.fetch")

    def _kill(self, what: str) -> None:
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            found = [child for child in self.daemon.children() if what in " ".join(child.cmdline())]
            if found:
                os.kill(self.draw.choice(found).pid, signal.SIGKILL)
                self.tally[f"{what} killed"] += 1

    def _restart(self) -> None:
        crash = self.draw.random() < 0.5
        self.tally["daemons killed" if crash else "daemons stopped"] += 1
        self._hang_up()
        self.daemon.restart(crash=crash)

    # --- what followers do ----------------------------------------------------------------------------------------

    def _follow(self) -> None:
        if len(self.followers) >= MOST_FOLLOWERS:
            old = self.followers.pop(self.draw.randrange(len(self.followers)))
            self.tally += old.tally
            self._away.discard(old)
            old.leave()
        draw = self.draw
        models = draw.choice((None, None, draw.sample([*self.models, REPO], draw.randint(1, 3))))
        self.followers.append(Follower(draw.choice(TOPICS), models, draw.choice(list(Encoding))))
        self._connect(self.followers[-1], resume=False)

    def _connect(self, follower: Follower, *, resume: bool) -> None:
        try:
            follower.connect(self.daemon.socket, resume=resume)
        except (OSError, Gone):
            follower.leave()

    def _with(self, follower: Follower, act: Callable[[], object]) -> None:
        """The daemon may have gone meanwhile."""
        try:
            act()
        except Gone:
            follower.leave()
            self.tally["lost the daemon"] += 1

    def _some(self, *, connected: bool) -> Follower | None:
        found = [one for one in self.followers if (one.wire is not None) is connected]
        return self.draw.choice(found) if found else None

    def _read_a_little(self) -> None:
        follower = self._some(connected=True)
        if follower is not None and follower not in self._away:
            self._with(follower, follower.read)

    def _catch_up(self) -> None:
        follower = self._some(connected=True)
        if follower is not None and follower not in self._away:
            self._with(follower, follower.check)

    def _look_away(self) -> None:
        """Or come back to oneself."""
        follower = self._some(connected=True)
        if follower is not None:
            (self._away.discard if self.draw.random() < 0.3 else self._away.add)(follower)

    def _leave(self) -> None:
        follower = self._some(connected=True)
        if follower is not None:
            self._away.discard(follower)
            follower.leave()

    def _come_back(self) -> None:
        follower = self._some(connected=False)
        if follower is not None:
            self._away.discard(follower)
            self._connect(follower, resume=self.draw.random() < 0.9)

    def _agrees(self, follower: Follower) -> bool:
        """Compare, in the end; the daemon that it is connected to may be no more."""
        if follower.wire is None:
            self._connect(follower, resume=True)
        try:
            return follower.wire is not None and follower.check()
        except Gone:
            follower.leave()
            return False
