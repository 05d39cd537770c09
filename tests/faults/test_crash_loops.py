"""Workers that keep dying are left alone for a while; the model comes back by itself, or at once by command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxd.cli import exits
from mlxd_client import Client, errors
from support.daemon import BAD_CHILD, PATIENCE_S, Daemon

CLEANUP = "mlxd/cleanup"


def mlxd(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlxd", *words]
    return subprocess.run(command, env=daemon.env, capture_output=True, text=True, timeout=PATIENCE_S)


def loop(client: Client, prompt: str = "!segfault") -> float:
    """Die until that is refused. Returns: the seconds that the refusal names."""
    for _ in range(9):
        with pytest.raises(errors.WorkerDied) as died:
            client.process(prompt)
        if died.value.details["cause"] == "crash_loop":
            return float(died.value.details["retry_after_s"])
    raise AssertionError("nothing stops it")


def test_it_comes_back_by_itself() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client:
        retry_after_s = loop(client)
        assert 0 < retry_after_s <= 5.0
        spawned = daemon.log().count("child spawned")
        with pytest.raises(errors.WorkerDied):
            client.process("all is well")
        assert daemon.log().count("child spawned") == spawned, "it was tried all the same"
        time.sleep(retry_after_s)  # what is tested is that time alone heals it
        assert client.process("all is well").text == "all is well"
        assert client.status().workers[0].breaker == "closed"


def test_a_command_brings_it_back_at_once() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client:
        loop(client)
        refused = mlxd(daemon, "run", "x")
        assert refused.returncode == exits.MODEL_FAILED
        assert "mlxd load" in refused.stderr, "it does not say what would help"
        assert CLEANUP in mlxd(daemon, "status").stdout
        assert mlxd(daemon, "load", CLEANUP).returncode == 0
        done = mlxd(daemon, "run", "all is well")
        assert (done.returncode, done.stdout) == (0, "all is well\n")
        assert client.status().workers[0].breaker == "closed"


def test_what_was_wrong_is_mended_and_loaded_again() -> None:
    """The program that workers are is broken, and then it is not; loads that are asked for by name are always tried."""
    broken = Daemon()
    script = Path(broken.home) / "worker.sh"
    script.write_text("#!/bin/sh\nexit 7\n")
    script.chmod(0o700)
    with Daemon(worker_command=str(script)) as daemon, daemon.client() as client:
        assert loop(client) > 0
        failed = mlxd(daemon, "load", CLEANUP)
        assert failed.returncode == exits.MODEL_FAILED
        aside = script.with_suffix(".new")
        aside.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{BAD_CHILD}" --mode worker "$@"\n')
        aside.chmod(0o700)
        os.replace(aside, script)
        assert mlxd(daemon, "load", CLEANUP).returncode == 0
        assert client.process("all is well").text == "all is well"
    broken.remove()
