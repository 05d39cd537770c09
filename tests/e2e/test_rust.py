"""The Rust example compiles with the standard library alone and prints what the daemon answers, where Rust is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.daemon import Daemon

SOURCE = Path(__file__).resolve().parents[2] / "clients" / "rust" / "process.rs"


@pytest.mark.skipif(shutil.which("rustc") is None, reason="there is no Rust here")
def test_the_example_prints_the_answer(tmp_path: Path) -> None:
    program = tmp_path / "process"
    subprocess.run(["rustc", "--edition", "2021", "-o", program, SOURCE], check=True, timeout=300)
    with Daemon() as daemon:
        env = os.environ | {"MLXD_SOCKET": str(daemon.socket)}
        said = 'so um she said "we should meet" on friday no wait on monday'
        done = subprocess.run([program, said], env=env, capture_output=True, text=True, timeout=60, check=True)
        with daemon.client() as client:
            assert done.stdout == client.process(said).text + "\n"  # the built-in model's own default is greedy
        env["MLXD_SOCKET"] = str(tmp_path / "nobody")
        assert subprocess.run([program, "x"], env=env, capture_output=True, timeout=60, check=False).returncode == 1
