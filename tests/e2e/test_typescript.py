"""The TypeScript client: its own tests pass against a real daemon, where Node is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.daemon import Daemon
from support.restarts import Relay

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "clients" / "typescript"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("there is no Node here")
    folder = tmp_path_factory.mktemp("typescript") / "client"
    shutil.copytree(CLIENT, folder, ignore=shutil.ignore_patterns("node_modules", "dist"))
    npm("install", "--no-audit", "--no-fund", "--no-package-lock", folder=folder, optional=True)
    npm("run", "build", folder=folder)
    return folder


def npm(*words: str, folder: Path, optional: bool = False) -> None:
    done = subprocess.run(["npm", *words], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if optional and done.returncode and "network" in done.stderr:
        pytest.skip("the compiler cannot be fetched here")
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_tests_pass(built: Path) -> None:
    with Daemon() as daemon, Relay() as restarted:
        command = built / "mlxd"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m mlxd "$@"\n')
        command.chmod(0o755)
        env = os.environ | daemon.env | {"MLXD_SOCKET": str(daemon.socket), "MLXD_COMMAND": str(command)}
        env["MLXD_RESTARTED"] = str(restarted.home)
        done = subprocess.run(
            ["node", "--test", "test/"], cwd=built, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "# skipped 0" in done.stdout
