"""The client is installable alone: its wheel, in an environment of its own, with msgspec and nothing else."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from support.scripted_daemon import ScriptedDaemon, completion

CLIENT = Path(__file__).parents[2] / "client"

# Imports everything, speaks the types, and names what it would have to import besides msgspec.
PROBE = """
import sys
import mlxd_client, mlxd_client.aio, mlxd_client.sync, mlxd_client.mirror, mlxd_client.methods, mlxd_client.connect
from mlxd_client import Client, ConnectFailed
try:
    Client(sys.argv[1]).ping()
except ConnectFailed:
    print(*sorted({name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
"""


def test_the_readmes_first_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocking, waiting = re.findall(r"```python\n(.*?)```", (CLIENT / "README.md").read_text(), re.DOTALL)[:2]
    monkeypatch.setenv("MLXD_SOCKET", str(tmp_path / "s"))
    with ScriptedDaemon(str(tmp_path / "s")) as daemon:

        def reply(connection: Any, request: dict[str, Any]) -> Any:
            connection.stream(request["id"], 0, text="Rayleigh.")
            return completion("Rayleigh.")

        daemon.on("chat", reply)
        exec(blocking, {})
        code = "async def main():\n" + "".join(f"    {line}\n" for line in waiting.splitlines())
        space: dict[str, Any] = {}
        exec("from mlxd_client import AsyncClient\n" + code, space)
        asyncio.run(space["main"]())
    assert capsys.readouterr().out.count("Rayleigh.") == 2


def test_it_depends_on_msgspec_alone() -> None:
    project = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]
    assert [requirement.split(">")[0] for requirement in project["dependencies"]] == ["msgspec"]
    assert (CLIENT / "src" / "mlxd_client" / "py.typed").exists()


@pytest.mark.slow
def test_its_wheel_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """Without an index: hatchling and msgspec come from the environment that runs the tests."""
    pytest.importorskip("hatchling")
    quiet = {**os.environ, "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=CLIENT, env=quiet, capture_output=True, text=True, check=True
    )
    wheel = tmp_path / done.stdout.split()[-1]
    names = zipfile.ZipFile(wheel).namelist()
    assert "mlxd_client/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mlxd_client"}

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('platlib'))"
    site = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    zipfile.ZipFile(wheel).extractall(site)  # a pure wheel installs by being unpacked
    for part in {file.parts[0] for file in distribution("msgspec").files or []}:
        (site / part).symlink_to(Path(str(distribution("msgspec").locate_file(part))).resolve())

    done = subprocess.run(
        [python, "-I", "-c", PROBE, str(tmp_path / "s")], capture_output=True, text=True, env=quiet, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) - {"__main__"} == {"mlxd_client", "msgspec"}
