"""Both distributions install with pip alone into empty environments, and the client needs msgspec and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def pip(venv: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_two_distributions(tmp_path: Path) -> None:
    """First the client alone, then both, as `pip install ./client ./daemon` does; one environment saves a minute."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    probe = pip(venv, "download", "--quiet", "--no-deps", "--dest", str(tmp_path), "hatchling")
    if probe.returncode:
        pytest.skip("no packages can be fetched here")

    done = pip(venv, "install", "--quiet", "./client")
    assert done.returncode == 0, done.stdout + done.stderr
    names = {line.split("==")[0].split(" ")[0] for line in pip(venv, "freeze").stdout.splitlines()}
    assert names == {"mlxd-client", "msgspec"}
    script = "import mlxd_client, pathlib; print(pathlib.Path(mlxd_client.__file__).with_name('py.typed').exists())"
    shown = subprocess.run([str(venv / "bin" / "python"), "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "True\n"

    done = pip(venv, "install", "--quiet", "--no-compile", "./client", "./daemon")
    assert done.returncode == 0, done.stdout + done.stderr
    assert pip(venv, "check").returncode == 0
    shown = subprocess.run([str(venv / "bin" / "mlxd"), "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("mlxd ")
