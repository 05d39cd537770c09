"""What service managers are given, and how launchd is spoken to, by a launchctl that does what it is known to do."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlxd.cli.service import _remove
from mlxd.service.launchd import Launchd, property_list
from mlxd.service.spec import ServiceError, ServiceSpec, describe
from mlxd.service.systemd import service_unit, socket_unit
from mlxd.settings import load

ROOT = Path(__file__).resolve().parents[2]
# Keeps its state in files beside itself: `loaded` while the job is there, `refusals` to come, `calls` made.
LAUNCHCTL = f"""#!{sys.executable}
import sys
from pathlib import Path
here = Path(sys.argv[0]).parent
with open(here / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
loaded, refusals, leaving = here / "loaded", here / "refusals", here / "leaving"
match sys.argv[1]:
    case "print":
        if leaving.exists():
            leaving.unlink()
            loaded.unlink()
            sys.exit(0)
        if not loaded.exists():
            sys.exit(113)
        print("\\tstate = running\\n\\tpid = 4242\\n\\tlast exit code = 0")
    case "bootstrap":
        left = int(refusals.read_text()) if refusals.exists() else 0
        if left:
            refusals.write_text(str(left - 1))
            print("Bootstrap failed: 5: Input/output error", file=sys.stderr)
            sys.exit(5)
        loaded.touch()
    case "bootout":
        if not loaded.exists():
            sys.exit(3)
        leaving.touch()
    case "kickstart":
        sys.exit(0 if loaded.exists() else 113)
"""


@pytest.fixture
def spec(tmp_path: Path) -> ServiceSpec:
    return describe(
        load({"HOME": str(tmp_path), "MLXD_HOME": str(tmp_path / "home")}).settings, {"HOME": str(tmp_path)}
    )


@pytest.fixture
def launchctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "launchctl").write_text(LAUNCHCTL)
    (folder / "launchctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("mlxd.service.launchd._RETRY_S", 0.0)
    return folder


def calls(launchctl: Path) -> list[str]:
    made = (launchctl / "calls").read_text().splitlines()
    (launchctl / "calls").unlink()
    return [call.split()[0] for call in made]


def test_the_property_list_says_what_launchd_must_know(spec: ServiceSpec) -> None:
    told = plistlib.loads(property_list(spec))
    assert told["Sockets"] == {
        "Listeners": {
            "SockFamily": "Unix",
            "SockType": "stream",
            "SockPathName": spec.socket,
            "SockPathMode": 0o600,
        }
    }
    assert told["ProgramArguments"] == [sys.executable, "-m", "mlxd", "serve", "--managed"]
    assert told["ProcessType"] == "Interactive"
    assert told["LimitLoadToSessionType"] == "Aqua"
    assert told["ExitTimeOut"] > 5
    assert "RunAtLoad" not in told
    assert told["KeepAlive"] == {"Crashed": True}


def test_launchd_is_told_again_until_it_lets_go(spec: ServiceSpec, launchctl: Path) -> None:
    manager = Launchd(spec)
    (launchctl / "refusals").write_text("3")
    assert manager.install()
    assert calls(launchctl) == ["print", "enable", *["bootstrap"] * 4]
    assert manager.path.read_bytes() == property_list(spec)
    assert not manager.install()  # as it was
    assert calls(launchctl) == ["print"]
    manager.path.write_bytes(b"of another version")
    assert not manager.state().current
    assert manager.install()
    made = calls(launchctl)
    assert made.index("bootout") < made.index("bootstrap")
    state = manager.state()
    assert (state.installed, state.current, state.listening, state.pid, state.failed) == (True, True, True, 4242, None)
    manager.restart()
    assert manager.uninstall()
    assert not manager.path.exists()
    assert not manager.uninstall()


def test_launchd_that_never_takes_it_is_a_sentence(
    spec: ServiceSpec, launchctl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxd.service.launchd._RETRIES", 3)
    (launchctl / "refusals").write_text("1000")
    with pytest.raises(ServiceError, match="Input/output error"):
        Launchd(spec).install()


def test_two_homes_are_two_services(tmp_path: Path) -> None:
    def named(**env: str) -> ServiceSpec:
        env |= {"HOME": str(tmp_path)}
        return describe(load(env).settings, env)

    default, other = named(), named(MLXD_HOME=str(tmp_path / "other"), MLXD_MAX_BATCH="3")
    assert default.name == "mlxd"
    assert default.environment == {}
    assert other.name.startswith("mlxd-")
    assert other.environment["MLXD_HOME"] == str(tmp_path / "other")
    assert other.environment["MLXD_MAX_BATCH"] == "3"


def test_tokens_are_not_installed(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "HF_TOKEN": "hf_secret", "HF_HOME": "/models", "https_proxy": "http://proxy:1"}
    spec = describe(load(env).settings, env)
    assert spec.environment == {"HF_HOME": "/models", "https_proxy": "http://proxy:1"}


@pytest.mark.parametrize("odd", ["a b", 'quo"te', "per%cent", "dol$lar", "back\\slash", "ünï"])
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd is installed")
def test_systemd_reads_odd_paths(tmp_path: Path, odd: str) -> None:
    home = tmp_path / odd
    env = {"HOME": str(tmp_path), "MLXD_HOME": str(home), "HF_HOME": str(home)}
    spec = describe(load(env).settings, env)
    for name, text in ((f"{spec.name}.socket", socket_unit(spec)), (f"{spec.name}.service", service_unit(spec))):
        (tmp_path / name).write_text(text)
    command = ["systemd-analyze", "--user", "verify", *map(str, tmp_path.glob("mlxd*.*"))]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr
    assert not [line for line in told.splitlines() if str(tmp_path) in line], told


@pytest.mark.skipif(shutil.which("systemctl") is None, reason="no systemd is installed")
@pytest.mark.parametrize("action", ["install", "uninstall", "status"])
def test_where_systemd_runs_nothing_for_the_user_it_says_so_and_leaves_nothing(tmp_path: Path, action: str) -> None:
    env = {
        "PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "HOME": str(tmp_path),
        "XDG_RUNTIME_DIR": str(tmp_path / "none"), "MLXD_HOME": str(tmp_path / "m"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "mlxd", "service", action], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "loginctl enable-linger" in done.stderr
    assert not (tmp_path / ".config").exists()


def test_line_breaks_do_not_reach_a_unit(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "HF_HOME": "/x\n[Service]\nExecStart=/bin/false"}
    with pytest.raises(ServiceError, match="no service manager takes"):
        describe(load(env).settings, env)


def test_uninstalling_leaves_what_is_the_users_and_purging_what_the_daemon_did_not_make(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name in ("logs/mlxd.log", "run/children/1.json", "cache/prompts/x", "downloads.json", "mlxd.lock",
                 "config.toml", "batch.sqlite3", "batch.sqlite3-wal", "mine.txt", ".config.toml.7.new",
                 "batch.sqlite3.damaged-20310102-030405"):  # fmt: skip
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    assert _remove(home, purge=False)
    kept = ["batch.sqlite3", "batch.sqlite3-wal", "batch.sqlite3.damaged-20310102-030405", "cache", "config.toml",
            "mine.txt"]  # fmt: skip
    assert sorted(path.name for path in home.iterdir()) == kept
    assert _remove(home, purge=True)
    assert [path.name for path in home.iterdir()] == ["mine.txt"]
    (home / "mine.txt").unlink()
    _remove(home, purge=True)
    assert not home.exists()
