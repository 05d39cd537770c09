"""tools/dev.py: what it does on old Pythons, when it sets up, when it does not, and how it survives being cut short.

A stand-in `uv` plays the installer in a scratch copy of the repository; real installs are in tests/e2e/test_install.py.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEV = ROOT / "tools" / "dev.py"

# Makes a .venv whose python is the one that runs the tests, and writes down each install. What it does during an
# install is the test's to say, in the file `during`.
UV = """#!/bin/sh
echo "$1 $2" >> "{here}/calls"
case "$1" in
    venv) for last; do :; done
          mkdir -p "$last/bin" && ln -sf "{python}" "$last/bin/python" ;;
    pip)  . "{here}/during" ;;
esac
"""


class Scratch:
    """A copy of what dev.py needs, and a stand-in for the installer."""

    def __init__(self, here: Path) -> None:
        self.here = here
        self.root = here / "repo"
        for name in ("tools/dev.py", "requirements.lock", "client/pyproject.toml", "daemon/pyproject.toml"):
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        (here / "bin").mkdir()
        uv = here / "bin" / "uv"
        uv.write_text(UV.format(here=here, python=sys.executable))
        uv.chmod(0o755)
        self.during("true")

    def during(self, script: str) -> None:
        (self.here / "during").write_text(script + "\n")

    def calls(self) -> list[str]:
        """What the installer was asked to do since the last time anybody looked."""
        path = self.here / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.root / "tools" / "dev.py"), *arguments]

    def env(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.here / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.env(), capture_output=True, text=True, check=False, timeout=60
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments), env=self.env(), stderr=subprocess.PIPE, text=True, start_new_session=True
        )


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    return Scratch(tmp_path)


ALL = ["venv --quiet", "pip install", "pip install"]


def test_old_pythons_get_one_sentence() -> None:
    ast.parse(DEV.read_text(), feature_version=(3, 6))
    script = f"import sys, runpy; sys.version_info = (3, 8, 10); runpy.run_path({str(DEV)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "needs Python 3.11" in done.stderr
    assert "3.8" in done.stderr


def test_sets_up_once(scratch: Scratch) -> None:
    assert scratch.run("setup").returncode == 0
    assert scratch.calls() == ALL
    done = scratch.run("setup")
    assert (done.returncode, done.stderr) == (0, "")
    assert scratch.calls() == []


@pytest.mark.parametrize("name", ["requirements.lock", "client/pyproject.toml", "daemon/pyproject.toml"])
def test_a_change_installs_again_in_the_same_environment(scratch: Scratch, name: str) -> None:
    scratch.run("setup")
    scratch.calls()
    with (scratch.root / name).open("a") as file:
        file.write("# changed\n")
    assert scratch.run("setup").returncode == 0
    assert scratch.calls() == ALL[1:]


def test_a_failed_install_leaves_no_stamp_and_keeps_the_environment(scratch: Scratch) -> None:
    scratch.during("echo no route to anywhere >&2; exit 3")
    done = scratch.run("exec", "true")
    assert done.returncode == 1
    assert "no route to anywhere" in done.stderr
    assert "Traceback" not in done.stderr
    scratch.calls()
    scratch.during("true")
    assert scratch.run("setup").returncode == 0
    assert scratch.calls() == ALL[1:]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_set_up_starts_afresh(scratch: Scratch, how: signal.Signals) -> None:
    ready = scratch.here / "ready"
    os.mkfifo(ready)
    scratch.during(f"echo > {ready}; exec sleep 600")
    process = scratch.start("setup")
    with ready.open():
        os.killpg(process.pid, how)
    assert process.wait(30) != 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    scratch.during("true")
    scratch.calls()
    assert scratch.run("setup").returncode == 0
    assert scratch.calls() == ALL


@pytest.mark.parametrize("damage", ["python -> nowhere", "python is no program", "a file", "moved", "another Python"])
def test_an_unusable_environment_is_built_anew(scratch: Scratch, damage: str) -> None:
    scratch.run("setup")
    scratch.calls()
    python, stamp = scratch.root / ".venv/bin/python", scratch.root / ".venv/.mlxd-stamp"
    if damage == "python -> nowhere":
        python.unlink()
        python.symlink_to("/nowhere/python")
    elif damage == "python is no program":
        python.unlink()
        python.write_text("")
        stamp.unlink()
    elif damage == "a file":
        shutil.rmtree(scratch.root / ".venv")
        (scratch.root / ".venv").write_text("")
    elif damage == "moved":
        scratch.root = scratch.root.rename(scratch.here / "elsewhere")
    else:
        lines = stamp.read_text().split("\n")
        stamp.write_text("\n".join([lines[0], "3.10", *lines[2:]]))
    assert scratch.run("setup").returncode == 0
    assert scratch.calls() == ALL


def test_an_environment_made_by_hand_is_taken_over(scratch: Scratch) -> None:
    python = scratch.root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert scratch.run("setup").returncode == 0
    assert scratch.calls() == ALL[1:]


def test_two_at_once_set_up_once(scratch: Scratch) -> None:
    gate = scratch.here / "gate"
    os.mkfifo(gate)
    opened = scratch.here / "opened"
    scratch.during(f"[ -e {opened} ] || {{ read go < {gate}; touch {opened}; }}")
    processes = [scratch.start("setup"), scratch.start("setup")]
    lines: list[str] = []
    for process in processes:  # each says something before it installs, and before it waits
        assert process.stderr is not None
        lines.append(process.stderr.readline())
    assert sum("waiting for another" in line for line in lines) == 1
    gate.write_text("go\n")  # gets past the open only when the installer reads
    assert [process.wait(30) for process in processes] == [0, 0]
    assert scratch.calls() == ALL


def test_exec_becomes_the_command(scratch: Scratch) -> None:
    scratch.run("setup")
    done = scratch.run("exec", "sh", "-c", "echo $PATH; echo $VIRTUAL_ENV; exit 7")
    assert done.returncode == 7
    assert done.stdout.splitlines()[0].startswith(str(scratch.root / ".venv/bin") + os.pathsep)
    assert done.stdout.splitlines()[1] == str(scratch.root / ".venv")
    missing = scratch.run("exec", "no-such-command")
    assert missing.returncode == 127
    assert "Traceback" not in missing.stderr
    assert scratch.run("exec").returncode == 2
    assert scratch.run("no-such-command").returncode == 2


def test_started_again_it_adds_little(scratch: Scratch) -> None:
    scratch.run("setup")

    def best(command: list[str]) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run(command, env=scratch.env(), check=True)
            times.append(time.perf_counter() - began)
        return min(times)

    added = best(scratch.command("exec", "true")) - best([sys.executable, "-c", "pass"])
    assert added < 0.25


def test_the_lock_is_pinned_hashed_and_names_no_place() -> None:
    text = (ROOT / "requirements.lock").read_text()
    requirements = re.findall(r"^([a-z].*?)(?=^[a-z]|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(requirements) > 20
    for requirement in requirements:
        assert re.match(r"[a-z0-9-]+==\S+", requirement), requirement
        assert "--hash=sha256:" in requirement
    assert not re.search(r"://|--(extra-)?index|find-links|(^|\s)[./~]\S*/", text, re.MULTILINE)
    assert not re.search(r"^mlxd", text, re.MULTILINE)


def test_ci_runs_what_a_person_types() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert 'exec python3 tools/dev.py test "$@"' in script.read_text()
