"""What is made from the code is as the code has it: references, man pages, types, service files, quotations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRAW = [sys.executable, str(ROOT / "tools" / "draw.py")]


def test_everything_is_up_to_date() -> None:
    done = subprocess.run([*DRAW, "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + "run: python3 tools/dev.py draw"


def test_what_is_out_of_date_is_named() -> None:
    """A page whose command has changed, and one of a command that is new; nothing is written by --check."""
    script = (
        "import draw, draw_man\n"
        "folder, real = draw_man.FOLDER, draw_man.files()\n"
        "draw_man.files = lambda: {**real, folder / 'mlxd-run.1': b'other', folder / 'mlxd-new.1': b'x'}\n"
        "print(draw.main(['--check']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "tools", capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["out of date: daemon/man/mlxd-run.1", "out of date: daemon/man/mlxd-new.1", "1"]
