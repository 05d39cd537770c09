"""The log: what a line holds, what it never holds, and that a disk which takes nothing stops nobody."""

from __future__ import annotations

import io
import json
import logging
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxd import logs


@pytest.fixture
def configure() -> Iterator[Callable[..., logs.Logs]]:
    made: list[logs.Logs] = []

    def _configure(*args: Any, **kwargs: Any) -> logs.Logs:
        made.append(logs.configure(*args, **kwargs))
        return made[-1]

    yield _configure
    for each in made:
        each.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_json_and_carries_what_was_bound(tmp_path: Path, configure: Callable[..., logs.Logs]) -> None:
    path = tmp_path / "logs" / "mlxd.log"
    configure(path)
    logs.get("mlxd.x", model="mlxd/cleanup").bind(request=7).info("generation finished", seconds=0.5, where=tmp_path)
    (line,) = lines(path)
    assert line["at"].endswith("Z")
    del line["at"]
    assert line == {
        "level": "info",
        "event": "generation finished",
        "logger": "mlxd.x",
        "model": "mlxd/cleanup",
        "request": 7,
        "seconds": 0.5,
        "where": str(tmp_path),
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_levels(tmp_path: Path, configure: Callable[..., logs.Logs]) -> None:
    path = tmp_path / "log"
    made = configure(path, level="warning")
    log = logs.get("mlxd.x")
    log.info("no")
    log.warning("yes")
    made.set_level("debug")
    log.debug("now")
    logging.getLogger("asyncio").info("others begin at warning")
    logging.getLogger("asyncio").warning("slow callback")
    assert [line["event"] for line in lines(path)] == ["yes", "now", "slow callback"]


def test_text_is_left_out_unless_asked_for(tmp_path: Path, configure: Callable[..., logs.Logs]) -> None:
    path = tmp_path / "log"
    made = configure(path)
    logs.get("mlxd.x").info("got", prompt="my secret", messages=[1, 2], text=None)
    assert "secret" not in path.read_text()
    assert lines(path)[0]["prompt_length"] == 9
    assert lines(path)[0]["messages_length"] == 2
    made.close()
    configure(path, prompts=True)
    logs.get("mlxd.x").info("got", prompt="my secret")
    assert lines(path)[1]["prompt"] == "my secret"


def test_tokens_are_never_written(tmp_path: Path, configure: Callable[..., logs.Logs]) -> None:
    path = tmp_path / "log"
    configure(path, prompts=True)
    logs.get("mlxd.x").error("download failed", error=ValueError("bad token hf_" + "a1" * 17 + " given"))
    assert lines(path)[0]["error"] == "bad token hf_*** given"


def test_odd_values_are_no_reason_to_fail(tmp_path: Path, configure: Callable[..., logs.Logs]) -> None:
    path = tmp_path / "log"
    made = configure(path)
    inside: list[Any] = []
    inside.append(inside)
    log = logs.get("mlxd.x")
    log.info("keys", odd={(1, 2): 3})
    log.info("surrogate", name="a\udc80b")
    log.info("circle", inside=inside)
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        log.exception("failed")
    assert [line["event"] for line in lines(path)] == ["keys", "surrogate", "circle", "failed"]
    assert "ZeroDivisionError" in lines(path)[3]["exception"]
    assert made.dropped == 0


def test_a_terminal_gets_human_lines(tmp_path: Path, configure: Callable[..., logs.Logs]) -> None:
    terminal = io.StringIO()
    configure(None, console=True, stderr=terminal)
    logs.get("mlxd.x", model="mlxd/cleanup").info("loaded", prompt="my secret")
    assert "loaded" in terminal.getvalue()
    assert "model=mlxd/cleanup" in terminal.getvalue()
    assert "secret" not in terminal.getvalue()
    other = io.StringIO()
    configure(None, stderr=other)
    logs.get("mlxd.x").info("nobody sees this")
    assert other.getvalue() == ""


def test_rotation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    handler = logs.LogFile(path, sys.stderr, file_bytes=1000, files_kept=2)
    for number in range(100):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, f"line {number:095}", None, None))
    handler.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert all(each.stat().st_size < 1200 for each in tmp_path.iterdir())
    assert path.read_text().splitlines()[-1].endswith("99")
    assert handler.dropped == 0


def test_a_folder_that_cannot_be_made(tmp_path: Path, configure: Callable[..., logs.Logs]) -> None:
    (tmp_path / "logs").write_text("in the way")
    stderr = io.StringIO()
    made = configure(tmp_path / "logs" / "mlxd.log", stderr=stderr)
    for _ in range(3):
        logs.get("mlxd.x").info("going on")
    assert made.dropped == 3
    assert stderr.getvalue().count("\n") == 1
    assert "lines are dropped" in stderr.getvalue()
    (tmp_path / "logs").unlink()
    logs.get("mlxd.x").info("better")
    assert made.dropped == 3
    assert json.loads((tmp_path / "logs" / "mlxd.log").read_text())["event"] == "better"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path, configure: Callable[..., logs.Logs]) -> None:
    path = tmp_path / "mlxd.log"
    path.symlink_to("/dev/full")
    stderr = io.StringIO()
    made = configure(path, stderr=stderr)
    for _ in range(3):
        logs.get("mlxd.x").info("going on")
    assert made.dropped == 3
    assert stderr.getvalue().count("No space left") == 1
    made.close()


def test_the_daemon_does_not_pay_for_rich() -> None:
    script = "import sys, mlxd.logs; print([m for m in sys.modules if m.split('.')[0] == 'rich']); import rich.console"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
