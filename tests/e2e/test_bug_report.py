"""`mlxd bug-report`: what helps is in it, secrets and what people said are not, whatever state the daemon is in."""

from __future__ import annotations

import json
import os
import platform
import stat
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest

from mlxd.cli import doctor, evidence, exits
from mlxd.cli.main import main
from mlxd_client import errors
from support.daemon import PATIENCE_S, Daemon
from support.scripted_daemon import ScriptedDaemon

TOKEN, PASSWORD, SIGNATURE, STORED = "hf_PlantedTokenPlanted", "sesame-open", "sig-4711", "from-a-token-file"
DIARY = "dear diary I confess"
SECRETS = (TOKEN, PASSWORD, SIGNATURE, STORED, DIARY, "PlantedToken", "confess")


def unpacked(path: Path) -> dict[str, Any]:
    """Each part by its name; the log as a list."""
    parts: dict[str, Any] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            name, data = member.name.removeprefix("mlxd-bug-report/"), file.read().decode()
            parts[name] = list(map(json.loads, data.splitlines())) if name == "log.jsonl" else json.loads(data)
            assert (member.uid, member.uname) == (0, "")
    return parts


def everything(path: Path) -> str:
    with tarfile.open(path) as archive:
        return "".join(
            member.name + archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in archive
        )


@pytest.fixture
def person(tmp_path: Path) -> Path:
    """A home folder with a token in it."""
    home = tmp_path / "home" / "anna-lena"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text(STORED)
    return home


def plant(daemon: Daemon, person: Path) -> None:
    """Lines as a daemon with log_prompts, and one whose parts misbehave, might write them."""
    lines: list[Any] = [
        {"event": "planted", "prompt": DIARY, "messages": [{"role": "user", "content": DIARY}]},
        {"event": "planted", "reason": f"401 from https://hub/x?X-Amz-Signature={SIGNATURE} with {TOKEN}"},
        {"event": "planted", "line": f"ValueError: {DIARY}", "logger": "mlxd.children"},
        {"event": "planted", "exception": f"Traceback (most recent call last):\n  File \"a.py\"\nKeyError: '{DIARY}'"},
        {"event": "planted", "path": str(person / "models" / "mine")},
    ]
    with open(daemon.home / "logs" / "mlxd.log", "a") as log:
        for line in lines:
            log.write(json.dumps(line) + "\n")
        log.write(f'{{"event": "torn", "prompt": "{DIARY}\n')


def test_what_helps_is_in_it_and_no_secret(tmp_path: Path, person: Path) -> None:
    env = {
        "HOME": str(person), "HF_TOKEN": TOKEN, "https_proxy": f"http://anna:{PASSWORD}@proxy:3128",
        "HF_ENDPOINT": f"https://hub.example/?token={SIGNATURE}",
    }  # fmt: skip
    made = Daemon(bad_child="worker", env=env, log_prompts=True, log_level="debug")
    (made.home / "config.toml").write_text(f'[personas.butler]\nsystem = "{DIARY}"\n')
    with made as daemon, daemon.client() as client:
        model = daemon.model("m")
        client.process(DIARY, model=model)
        with pytest.raises(errors.WorkerDied):
            client.process(f"!exit 7 {DIARY}", model=model)
        plant(daemon, person)
        done = subprocess.run(
            [sys.executable, "-m", "mlxd", "bug-report"], env=daemon.env, cwd=tmp_path, capture_output=True, text=True,
            check=True, timeout=PATIENCE_S,
        )  # fmt: skip
        (path,) = tmp_path.glob("mlxd-bug-report-*.tar.gz")
        parts = unpacked(path)
        assert parts["status.json"]["pid"] == daemon.pid
        assert parts["status.json"]["workers"][0]["last_death"]["details"]["exit_code"] == 7
        assert parts["crashes.json"][0]["exit_code"] == 7
        assert parts["stats.json"]["models"][0]["deaths"] == {"exit": 1}
        stories = {story["model"]: story["steps"] for story in parts["stories.json"]}
        assert [step["cause"] for step in stories[model]] == ["found", "load", "loaded", "worker_died"]
        assert parts["settings.json"]["log_prompts"] == {"value": True, "from": "the environment's MLXD_LOG_PROMPTS"}
        assert parts["settings.json"]["personas"]["value"] == ["butler"]
        assert parts["versions.json"]["packages"]["msgspec"]
        assert parts["versions.json"]["os"][0] == platform.system()
        assert {finding["check"] for finding in parts["doctor.json"]} >= {"python", "engine", "socket", "hub"}
        assert any(line.get("event") == "worker ended" for line in parts["log.jsonl"])
        assert parts["log.jsonl"].count({"left_out": "a line that is no JSON"}) == 1
        assert [line["path"] for line in parts["log.jsonl"] if "path" in line][-1] == "~/models/mine"
    whole = everything(path)
    for secret in (*SECRETS, "anna-lena"):
        assert secret not in whole
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert all(name in done.stdout for name in parts)
    assert "nothing was sent anywhere" in done.stdout


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell with a home of its own and no daemon; what doctor examines is not the point here."""
    for name in list(os.environ):
        if name.startswith(("MLXD_", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLXD_HOME", str(tmp_path / "m"))
    monkeypatch.setattr(doctor, "examine", list)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_needs_no_daemon_and_no_sound_configuration(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (alone / "m" / "logs").mkdir(parents=True)
    (alone / "m" / "config.toml").write_text("max_bacth = 3\n")
    (alone / "m" / "logs" / "mlxd.log").write_text('{"event": "the last thing it said"}\n')
    assert main(["bug-report", "-o", "x.tar.gz", "--json"]) == exits.OK
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(alone / "x.tar.gz")
    parts = unpacked(alone / "x.tar.gz")
    assert told["parts"].keys() == parts.keys()
    assert "did you mean max_batch?" in parts["settings.json"]["missing"]
    assert "no mlxd listens" in parts["status.json"]["missing"]
    assert parts["log.jsonl"] == [{"event": "the last thing it said"}]
    assert not (alone / "m" / "mlxd.sock").exists()


def test_it_overwrites_nothing(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (alone / "x").write_text("mine")
    (alone / "link").symlink_to(alone / "x")
    for name in ("x", "link", "nowhere/x"):
        assert main(["bug-report", "-o", name]) == exits.FAILED
    assert (alone / "x").read_text() == "mine"
    assert "not overwritten" in capsys.readouterr().err


def test_a_silent_daemon_is_waited_for_once(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "PATIENCE_S", 0.2)
    asked: list[str] = []
    silent = threading.Event()
    with ScriptedDaemon(str(alone / "s")) as daemon:
        daemon.on("status", lambda _connection, request: asked.append(request["method"]) or silent.wait(PATIENCE_S))
        try:
            assert main(["bug-report", "-o", "x", "--socket", daemon.path]) == exits.OK
        finally:
            silent.set()
    assert asked == ["status"]
    parts = unpacked(alone / "x")
    assert "missing" in parts["status.json"]
    assert parts["models.json"] == parts["status.json"]


def test_it_is_bounded(alone: Path) -> None:
    (alone / "m" / "logs").mkdir(parents=True)
    with open(alone / "m" / "logs" / "mlxd.log", "w") as log:
        for number in range(40_000):
            log.write(json.dumps({"event": "x" * 400, "number": number}) + "\n")
    assert main(["bug-report", "-o", "x", "-n", "1000000"]) == exits.OK
    parts = unpacked(alone / "x")
    assert len(json.dumps(parts["log.jsonl"])) < 1_100_000
    assert parts["log.jsonl"][-1]["number"] == 39_999  # the newest stays


def test_a_report_that_fails_leaves_no_file(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evidence, "pack", full)
    assert main(["bug-report", "-o", "x"]) == exits.FAILED
    assert "No space left" in capsys.readouterr().err
    assert not (alone / "x").exists()
