"""Style and types are tests like any other: one command checks all, and its last line speaks for all."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    " ".join(Path(word).name for word in command[:3]): command
    for command in runpy.run_path(str(ROOT / "tools" / "dev.py"))["lint_commands"]()
}


@pytest.mark.parametrize("name", COMMANDS)
def test_static(name: str) -> None:
    done = subprocess.run(COMMANDS[name], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
