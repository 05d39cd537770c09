"""What docs/security.md claims of a daemon as it runs: its ports, its files, its log, what its workers know."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import psutil
import pytest

from support.daemon import Daemon

SAID = "um so the quick brown fox uh jumps"
TOKEN = "hf_" + "a1B2" * 9

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(env={"HF_TOKEN": TOKEN, "SOME_API_KEY": TOKEN}, log_level="debug") as daemon, daemon.client() as client:
        assert "fox" in client.process(SAID).text
        yield daemon


def test_no_process_of_it_has_a_port(daemon: Daemon) -> None:
    for process in (psutil.Process(daemon.pid), daemon.worker()):
        assert process.net_connections("inet") == []


def test_nobody_else_gets_at_its_files(daemon: Daemon) -> None:
    assert stat.S_IMODE(daemon.home.stat().st_mode) == 0o700
    for name in ("mlxd.sock", "mlxd.lock", "logs/mlxd.log"):
        assert stat.S_IMODE((daemon.home / name).stat().st_mode) == 0o600, name


def test_the_log_holds_neither_what_was_said_nor_tokens(daemon: Daemon) -> None:
    log = daemon.log()
    assert "request ended" in log
    assert "fox" not in log
    assert TOKEN not in log


def test_workers_know_no_secrets_and_stay_offline(daemon: Daemon) -> None:
    environment = daemon.worker().environ()
    assert TOKEN not in environment.values()
    assert environment["HF_HUB_OFFLINE"] == "1"
