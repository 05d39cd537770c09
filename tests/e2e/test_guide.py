"""What docs/clients.md shows works as it stands: each block of Python, against a real daemon and the built-in model."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import PATIENCE_S, Daemon

GUIDE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
LINES = re.findall(r"^```sh\n(.*?)\n```$", GUIDE, re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python(
    number: int, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A `print(…)  # TEXT` prints TEXT."""
    monkeypatch.setenv("MLXD_HOME", str(daemon.home))
    monkeypatch.delenv("MLXD_SOCKET", raising=False)
    exec(compile(BLOCKS[number], f"clients.md, block {number + 1}", "exec"), {"__name__": "__main__"})
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", BLOCKS[number], re.MULTILINE)
    assert promised
    assert capsys.readouterr().out.splitlines() == promised


@pytest.mark.skipif(shutil.which("nc") is None, reason="there is no nc here")
def test_shell(daemon: Daemon) -> None:
    (line,) = LINES
    done = subprocess.run(
        ["/bin/sh", "-c", line],
        env=daemon.env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert '"text":"Hello World."' in done.stdout
