"""What the README shows works as it stands."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.daemon import PATIENCE_S, Daemon
from support.hub import Hub

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_what_it_shows() -> None:
    """With a programmable child for the built-in model's worker: it echoes, a word a step."""
    (script,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (message,) = re.findall(r"\$ echo '(.*?)'", README)
    with Daemon(bad_child="worker") as daemon:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=daemon.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "um so can you uh hear me"
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(PATIENCE_S)
            raw.connect(str(daemon.socket))
            raw.sendall(message.encode() + b"\n")
            raw.shutdown(socket.SHUT_WR)  # as nc does at the end of its input
            with raw.makefile() as lines:
                answers = [json.loads(line) for line in lines]
    assert answers[-1]["result"]["text"] == "um so hello"
    assert {answer.get("method") for answer in answers[:-1]} == {"stream"}


def test_the_loop_is_five_lines() -> None:
    (script,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in script.splitlines() if line]) <= 5


@pytest.mark.model
def test_the_tour(tmp_path: Path) -> None:
    """Line by line, with the daemon that the first one starts, and a tiny model at the hub under the name it shows."""
    lines = re.findall(r"^    (.*\bmlxd (?!status).*)$", README.partition("## On the command line")[2], re.MULTILINE)
    for name, script in (("mlxd", f'exec {sys.executable} -m mlxd "$@"'), ("pbpaste", "echo um so hello")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    with Hub() as hub:
        hub.model("mlx-community/Qwen3-1.7B-4bit")
        daemon = Daemon(env=hub.env())  # for its folder and environment; it is not started here
        env = daemon.env | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        try:
            for line in lines:
                command, _, promised = line.partition("# → ")
                told = _shown(command.partition("#")[0].strip(), env)
                assert not promised or told == f"{promised}\n"
            assert lines[-1].startswith("mlxd stop")
            assert not daemon.socket.exists()
        finally:
            subprocess.run(["mlxd", "stop"], env=env, capture_output=True, timeout=PATIENCE_S, check=False)
            daemon.remove()


def _shown(command: str, env: dict[str, str]) -> str:
    """What a command prints. One that goes on until ctrl-C gets that, once it has said something."""
    endless = command == "mlxd events"
    made = subprocess.Popen(
        f"exec {command}" if endless else command, shell=True, env=env, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    if endless:
        assert made.stdout is not None
        assert select.select([made.stdout], [], [], PATIENCE_S)[0], f"{command} says nothing"
        made.stdout.readline()
        os.killpg(made.pid, signal.SIGINT)
    told, complaints = made.communicate(None if endless else "um so hello\n", timeout=PATIENCE_S)
    assert made.returncode == (130 if endless else 0), (command, told, complaints)
    return told
