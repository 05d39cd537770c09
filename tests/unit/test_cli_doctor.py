"""`mlxd doctor`: what it finds wrong, and what it advises."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlxd.batch.header import FILE
from mlxd.batch.store import Store
from mlxd.cli import doctor, exits
from mlxd.cli.main import main
from mlxd_client import types
from support.scripted_daemon import PATIENCE_S, ScriptedDaemon


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in list(os.environ):
        if name.startswith(("MLXD_", "HF_")):
            monkeypatch.delenv(name)
    folder = tmp_path / "m"
    monkeypatch.setenv("MLXD_HOME", str(folder))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder.mkdir(mode=0o700)
    return folder


def findings(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    status = main(["doctor", "--json"])
    return status, {found["check"]: found for found in json.loads(capsys.readouterr().out)}


def test_a_sound_machine_is_sound(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = findings(capsys)
    assert status == exits.OK
    checks = ["python", "packages", "engine", "gpu", "settings", "home", "files", "socket", "daemon", "service", "disk",
              "memory", "batches", "hub"]  # fmt: skip
    assert list(found) == checks
    assert {found[name]["state"] for name in checks if name not in ("engine", "disk")} == {"ok"}
    assert "Device" in found["engine"]["told"]  # a real product was computed
    assert found["hub"]["told"] == "not asked: HF_HUB_OFFLINE is set"
    assert not list(Path(os.environ["MLXD_HOME"]).iterdir())  # no daemon was started


def test_files_of_batch_jobs_are_looked_at(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_ENGINE", "print('Device(cpu, 0)')")
    file = home / FILE
    file.with_name(f"{FILE}.damaged-20260101-120000").touch()
    _, found = findings(capsys)
    assert found["batches"]["state"] == "warning"
    assert "damaged-20260101-120000" in found["batches"]["told"]
    Store(file, 1 << 20).close()
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    status, found = findings(capsys)
    assert (status, found["batches"]["state"]) == (exits.FAILED, "failed")
    assert "version 99" in found["batches"]["told"]


def test_what_is_wrong_is_named_with_advice(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_ENGINE", "import os; os.abort()")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("MLXD_MEMORY_BUDGET_BYTES", str(2**60))
    home.chmod(0o755)
    status, found = findings(capsys)
    assert status == exits.FAILED
    assert found["engine"]["state"] == "failed"
    assert "signal 6" in found["engine"]["told"]
    assert found["home"]["state"] == found["hub"]["state"] == found["memory"]["state"] == "warning"
    assert found["hub"]["told"] == "http://127.0.0.1:1 cannot be reached: Connection refused"
    assert all(found[name]["advice"] for name in ("engine", "home", "hub", "memory"))


def test_why_the_hub_is_of_no_use_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(endpoint: str) -> str:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        return str(findings(capsys)[1]["hub"]["told"])

    monkeypatch.setattr(doctor, "_ENGINE", "print('Device(cpu, 0)')")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert told("hub") == "hub cannot be reached: unknown url type: 'hub/api/models?limit=1'"
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # one that knows no GET
        server.timeout = PATIENCE_S
        endpoint = f"http://127.0.0.1:{server.server_port}"
        answering = threading.Thread(target=server.handle_request)
        answering.start()
        assert told(endpoint) == f"{endpoint} answers 501 Unsupported method ('GET')"
        answering.join()


def test_a_wrong_configuration_is_a_finding(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "config.toml").write_text("max_bacth = 3\n")
    status, found = findings(capsys)
    assert status == exits.FAILED
    assert "did you mean max_batch?" in found["settings"]["told"]


@pytest.mark.parametrize(("version", "advice"), [("0.0.9", "`mlxd restart`"), ("9.9.9", "update this mlxd")])
def test_a_daemon_of_another_version_is_seen(
    capsys: pytest.CaptureFixture[str], home: Path, version: str, advice: str
) -> None:
    with ScriptedDaemon(str(home / "mlxd.sock")) as daemon:
        status = types.Status(
            version=version, pid=1, uptime_s=1, rss_bytes=1, clients=1, subscribers=0, workers=[],
            models=types.StatusModels(known=0, loaded=0), queue=types.StatusQueue(waiting=0, running=0),
            memory=types.Memory(budget_bytes=1, used_bytes=0),
        )  # fmt: skip
        daemon.on("status", lambda _connection, _request: status)
        _, found = findings(capsys)
    assert found["daemon"]["state"] == "warning"
    assert version in found["daemon"]["told"]
    assert found["daemon"]["advice"].startswith(advice)


def test_people_read_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == exits.OK
    assert "python" in capsys.readouterr().out


def test_files_that_others_may_write_are_found(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "config.toml").write_text("")
    (home / "config.toml").chmod(0o666)
    (home / "mlxd.sock").write_text("no socket")
    status, found = findings(capsys)
    assert status == exits.FAILED
    assert "config.toml (others may write it)" in found["files"]["told"]
    assert "is no socket" in found["socket"]["told"]
    assert found["files"]["advice"]
    assert found["socket"]["advice"]


def test_a_path_that_no_socket_can_have_is_a_finding(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXD_SOCKET", "/" + "x" * 200)
    status, found = findings(capsys)
    assert status == exits.FAILED
    assert found["settings"]["state"] == "failed"


def test_a_mac_without_a_gpu_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._gpu("Device(gpu, 0)", "Apple M9", "26000000000").told == "Apple M9, 26 GB of memory at most"
    assert doctor._gpu("Device(cpu, 0)", "", "0").state == ("warning" if sys.platform == "darwin" else "ok")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert doctor._gpu("Device(cpu, 0)", "", "0").state == "warning"
