"""What the daemon tells of itself: statistics, metrics and the log of slow requests, of a real daemon."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlxd_client import errors
from support.daemon import PATIENCE_S, Daemon, active, until
from support.exposition import read
from support.terminal import Terminal

MLXD = [sys.executable, "-m", "mlxd"]


def run(daemon: Daemon, *arguments: str) -> str:
    done = subprocess.run(
        [*MLXD, *arguments], env=daemon.env, capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    assert done.stderr == ""
    return done.stdout


def widest(frame: str) -> int:
    """Columns of the longest line that a screen shows."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame).replace("\r", "")
    return max(map(len, plain.splitlines()))


def slow_lines(daemon: Daemon) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in daemon.log().splitlines()]
    return [line for line in lines if line["event"] == "slow request"]


def test_a_daemon_counts_what_happens() -> None:
    """One request of each fate, two models that do not fit together, a death: all of it in the figures."""
    with Daemon(bad_child="worker", steps=True, memory_budget_bytes=200 * 2**20) as daemon, daemon.client() as client:
        first, second = daemon.model("first"), daemon.model("second")
        with client.events() as events:
            client.process("three words here", model=first)
            client.process("two words", model=second)  # the first has to go
            until(events, "loading_completed", id=second)
            with client.stream_process("!slow 3", model=second):
                active(events, 1)
            active(events, 0)
            with pytest.raises(errors.WorkerDied):
                client.process("!segfault", model=second)
            with pytest.raises(errors.ModelNotFound):
                client.process("x", model="org/nowhere")
            assert client.count_tokens("one two", model=second) == 2
            for _ in range(2):
                with pytest.raises(errors.InvalidParams):
                    client.process("x", max_tokens=0)
            with pytest.raises(errors.DeadlineExceeded):
                client.process("!slow 9", model=second, timeout_s=0.5)
        stats = client.stats()
        nobody, one, two = stats.models
        assert (nobody.model, nobody.requests) == ("", {"process": {"model_not_found": 1}})
        assert (one.model, one.requests, one.unloads) == (first, {"process": {"stop": 1}}, {"room": 1})
        assert (one.prompt_tokens, one.completion_tokens) == (3, 3)
        outcomes = {"stop": 1, "cancelled": 1, "worker_died": 1, "deadline_exceeded": 1}
        assert two.requests == {"process": outcomes, "tokens.count": {"done": 1}}
        assert two.deaths == {"SIGSEGV": 1}
        assert two.load_s is not None
        assert two.load_s.count == 2
        assert two.total_s is not None
        assert two.total_s.count == 1
        assert two.queue_s is not None
        assert two.queue_s.count == 4
        assert stats.clients.refused_requests == {"process": {"invalid_params": 2}}
        assert stats.clients.accepted == 3  # whoever waited for the start, the events, and this one
        assert client.stats(second).models == [two] == client.stats(second).models
        found = read(client.metrics())
        assert found["mlxd_worker_deaths_total"].samples
        assert found["mlxd_requests_refused_total"].value(method="process", kind="invalid_params") == 2
        assert found["mlxd_clients_accepted_total"].value() == 3
        assert str(daemon.home) not in client.metrics()
        assert read(run(daemon, "metrics"))["mlxd_requests_total"].kind == "counter"
        assert "1 worker_died" in run(daemon, "stats", second)


def test_real_tokens_are_measured() -> None:
    with Daemon() as daemon, daemon.client() as client:
        made = client.process("um so i think we should uh meet on monday at three pm")
        (model,) = client.stats().models
        assert model.model == "mlxd/cleanup"
        assert model.completion_tokens == made.usage.completion_tokens > 2
        assert model.first_token_s is not None
        assert model.first_token_s.mean == pytest.approx(made.timings.first_token_s)
        assert model.tokens_per_s is not None
        assert model.tokens_per_s.p50 == pytest.approx(
            (made.usage.completion_tokens - 1) / made.timings.decode_s, rel=1e-6
        )
        daemon.worker().send_signal(signal.SIGSTOP)  # it says no more, and the daemon answers all the same
        assert client.stats().models[0].completion_tokens == model.completion_tokens
        daemon.worker().send_signal(signal.SIGCONT)


def test_slow_requests_are_told_and_nothing_that_was_said() -> None:
    settings = {"slow_request_s": 0.001, "slow_first_token_s": 0, "log_prompts": True}
    with Daemon(bad_child="worker", **settings) as daemon, daemon.client() as client:
        model = daemon.model("m")
        client.process("a secret of mine !mute 0.002", model=model)
        with pytest.raises(errors.DeadlineExceeded):
            client.process("!slow 1000 secret", model=model, timeout_s=0.5)
        client.process("patient !mute 0.002", model=model, priority="batch")  # may take its time
        answered, late = slow_lines(daemon)
        (counted,) = client.stats().models
        assert counted.slow_requests == 2
        assert counted.total_s is not None
        assert counted.total_s.count == 1
        assert counted.requests == {"process": {"stop": 2, "deadline_exceeded": 1}}
    assert answered["model"] == model
    assert answered["phase"] == "loading"  # a process had to start for it
    assert answered["total_s"] >= answered["loading_s"] > 0.01
    assert (answered["how"], answered["prompt_tokens"], answered["method"]) == ("stop", 6, "process")
    assert answered["request"].count(":") == 1
    assert (late["how"], late["phase"]) == ("deadline_exceeded", "decoding")
    assert "secret" not in json.dumps([answered, late])


def test_nothing_is_slow_where_that_is_turned_off() -> None:
    with Daemon(bad_child="worker", slow_request_s=0, slow_first_token_s=0) as daemon, daemon.client() as client:
        client.process("!mute 0.1", model=daemon.model("m"))
        assert slow_lines(daemon) == []


# --- top ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def terminals() -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def open_one(daemon: Daemon, *arguments: str, **environment: str) -> Terminal:
        made.append(Terminal(*arguments, **daemon.env | {"COLUMNS": ""} | environment))
        return made[-1]

    yield open_one
    for terminal in made:
        terminal.close()


LEFT = "\x1b[?1049l"  # back from the other screen, to the one with what was there before


def test_top_follows_the_daemon_and_leaves_the_terminal_as_it_was(terminals: Callable[..., Terminal]) -> None:
    with Daemon(bad_child="worker", steps=True) as daemon, daemon.client() as client:
        model = daemon.model("m")
        terminal = terminals(daemon, "top")
        before = terminal.modes()
        terminal.until("no model is loaded")
        assert terminal.modes() != before  # keys come as they are pressed
        client.load(model)  # and no key: it is shown all the same
        terminal.until("Ready")
        terminal.resize(40, 10)
        for _ in range(20):  # some that are as wide as before may have been under way
            terminal.until(" quit")
            if widest(terminal.shown.split("\x1b[H")[-2]) <= 40:
                break
        else:
            raise AssertionError("it does not take the new size")
        terminal.type("\x1b[Bu")  # the arrow chooses it
        terminal.until("unload /tmp")
        terminal.type("y")
        terminal.until("is unloaded")
        terminal.type("q")
        assert terminal.end() == 0
        assert LEFT in terminal.shown
        assert "\x1b[?25h" in terminal.shown  # the cursor is seen again
        assert terminal.modes() == before


def test_top_can_be_stopped_and_goes_on(terminals: Callable[..., Terminal]) -> None:
    with Daemon(bad_child="worker") as daemon:
        terminal = terminals(daemon, "top")
        before = terminal.modes()
        terminal.until("no model is loaded")
        terminal.process.send_signal(signal.SIGTSTP)  # ctrl-Z
        _, status = os.waitpid(terminal.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        terminal.until(LEFT)
        assert terminal.modes() == before
        terminal.process.send_signal(signal.SIGCONT)  # fg
        terminal.until("no model is loaded")
        assert terminal.modes() != before
        terminal.type("q")
        assert terminal.end() == 0


def test_top_outlives_the_daemon(terminals: Callable[..., Terminal]) -> None:
    with Daemon(bad_child="worker") as daemon:
        terminal = terminals(daemon, "top")
        before = terminal.modes()
        terminal.until("no model is loaded")
        daemon.stop()
        terminal.until("does not run")
        daemon.restart()
        terminal.until("no model is loaded")
        terminal.until(f"process {daemon.pid}")
        terminal.interrupt()
        assert terminal.end() == 130
        assert LEFT in terminal.shown
        assert terminal.modes() == before


def test_top_without_a_terminal_prints_the_state_once() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client:
        model = daemon.model("m")
        client.process("one two", model=model)
        shown = run(daemon, "top")
        assert "\x1b" not in shown
        assert shown.count("MODEL") == 1
        assert "1 answered, 0 failed" in shown
        told = json.loads(run(daemon, "top", "--json"))
        assert told["status"]["pid"] == daemon.pid
        assert told["stats"]["models"][0]["model"] == model
