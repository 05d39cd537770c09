"""The demo, from its first line to the last, and that it leaves nothing behind however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.daemon import PATIENCE_S

ROOT = Path(__file__).parents[2]
DEMO = [sys.executable, str(ROOT / "tools" / "demo.py")]


def left_over(home: str) -> list[int]:
    """Processes that were given this home, and are still there."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MLXD_HOME") == home and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


class Demo:
    """A demo that runs, line by line."""

    def __init__(self, stdin: str | None = None) -> None:
        self.process = subprocess.Popen(
            DEMO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        if stdin is not None:
            self.process.stdin.write(stdin)
            self.process.stdin.close()
        self.shown = ""
        self.home = self.until(r"starts in (\S+)")[1]

    def until(self, pattern: str) -> re.Match[str]:
        assert self.process.stdout is not None
        while True:
            line = self.process.stdout.readline()
            assert line, f"{pattern!r} never came:\n{self.shown}"
            self.shown += line
            if found := re.search(pattern, line):
                return found

    def end(self) -> int:
        assert self.process.stdout is not None
        self.shown += self.process.stdout.read()
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def demos() -> Iterator[list[Demo]]:
    made: list[Demo] = []
    yield made
    for demo in made:
        if demo.process.poll() is None:
            demo.process.kill()
        demo.end()


@pytest.mark.model
def test_from_start_to_end(demos: list[Demo]) -> None:
    demos.append(demo := Demo(stdin="so this one was uh piped in\n"))
    assert demo.end() == 0, demo.shown
    states = re.findall(r"(?:mlxd/cleanup is|→) (\w+)", demo.shown)
    assert list(dict.fromkeys(states)) == ["Downloaded", "Loading", "Ready"]
    assert demo.shown.count("  written  ") == 7
    assert "so this one was uh piped in" in demo.shown
    assert re.search(r"7 transcripts: \d+ tokens/s, first token after \d+\.\d ms", demo.shown)
    assert demo.shown.endswith("no process and no file of it is left.\n")
    assert not os.path.exists(demo.home)
    assert left_over(demo.home) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(demos: list[Demo], how: signal.Signals) -> None:
    demos.append(demo := Demo())
    demo.until("loading_started")
    demo.process.send_signal(how)
    assert demo.end() == 130, demo.shown
    assert "Traceback" not in demo.shown
    assert not os.path.exists(demo.home)
    assert left_over(demo.home) == []


def test_a_pipe_where_nothing_comes_is_not_waited_for() -> None:
    """Checked on the function, as the demo would take its time: a pipe whose writer is silent, then one with a line."""
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import demo; print(list(demo.from_stdin()))"
    reader, writer = os.pipe()
    try:
        silent = subprocess.run(
            [sys.executable, "-c", script], stdin=reader, capture_output=True, text=True, check=True
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert silent.stdout == "[]\n"
    spoken = subprocess.run(
        [sys.executable, "-c", script], input="a b\n\n c\n", capture_output=True, text=True, check=True
    )
    assert spoken.stdout == "['a b', 'c']\n"
