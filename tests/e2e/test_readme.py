"""What the README shows works as it stands."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

from support.daemon import PATIENCE_S, Daemon

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


def test_the_files_it_names_exist() -> None:
    for path in re.findall(r"\]\((?!http)(.*?)\)", README):
        assert (ROOT / path).exists(), path
