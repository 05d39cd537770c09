"""Home and socket are private at every instant of a start; another user is hung up on before a byte is looked at."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import PATIENCE_S, Daemon

SUPPORT = Path(__file__).parents[1] / "support"
NOBODY = 65_534
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mlxd-") as name:
        yield Path(name)


def mode(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def stale_socket(path: Path, access: int) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    path.chmod(access)


@pytest.mark.parametrize("place", ["new", "deep", "loose", "linked", "elsewhere", "stale"])
def test_nobody_else_could_have_come_in_at_any_instant(folder: Path, place: str) -> None:
    """Before each line of listen.py and at each call to the system after it, with a umask that restricts nothing."""
    home = folder / "home"
    path = home / "mlxd.sock"
    if place == "deep":
        home = folder / "not" / "there" / "home"
        path = home / "mlxd.sock"
    elif place == "elsewhere":
        path = folder / "sockets" / "mlxd.sock"
    elif place != "new":
        real = folder / "real" if place == "linked" else home
        real.mkdir()
        real.chmod(0o777)
        if place == "linked":
            home.symlink_to(real)
        if place == "stale":  # in a folder that is private already, as one of ours would be
            real.chmod(0o700)
            stale_socket(path, 0o600)
    looks = folder / "looks"
    program = [sys.executable, str(SUPPORT / "looking_start.py"), str(looks)]
    daemon = Daemon(bad_child="worker", program=program, env={"MLXD_HOME": str(home), "MLXD_SOCKET": str(path)})
    daemon.socket = path
    with daemon:
        assert (mode(home.resolve()), mode(path.parent.resolve()), mode(path)) == (0o700, 0o700, 0o600)
    found = looks.read_text().splitlines()
    assert [line for line in found if line.startswith("WRONG")] == []
    for step in ("prepare_home:", "_lock:", "_bind:", "socket.bind", "os.rename", "os.chmod"):
        assert any(f" {step}" in line for line in found), f"it did not look at {step}"
    assert all(mode(parent) & 0o022 == 0 for parent in home.parents if folder in parent.parents)


def start(home: Path) -> tuple[int, str]:
    """The status and last words of a daemon that does not get to serve."""
    spare = Daemon(bad_child="worker")
    env = spare.env | {"MLXD_HOME": str(home), "MLXD_SOCKET": str(home / "mlxd.sock")}
    command = [sys.executable, "-m", "mlxd", "serve"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    spare.remove()
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@ROOT
@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_of_another_user_is_not_taken(folder: Path, linked: bool) -> None:
    theirs = folder / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, NOBODY, NOBODY)
    home = folder / "link" if linked else theirs
    if linked:
        home.symlink_to(theirs)
    status, told = start(home)
    assert status == 1
    assert f"belongs to user {NOBODY}" in told
    assert list(theirs.iterdir()) == []
    assert mode(theirs) == 0o700


_STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
told = b""
for number in range({times}):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout({patience})
    try:
        sock.connect(sys.argv[1])
        for _ in range(1 + number % 2 * 64):
            sock.sendall([{ping!r}, b"\\xff" * 65536, b'{{"jsonrpc":"2.0"}}\\n'][number % 3])
    except (BrokenPipeError, ConnectionResetError):
        pass
    try:
        told += sock.recv(65536)
    except ConnectionResetError:
        pass
    sock.close()
print("told", len(told))
"""


@ROOT
def test_another_user_is_hung_up_on_before_a_byte_is_read(folder: Path) -> None:
    """Folder and socket are opened to all on purpose: what is left then is who the kernel says it is."""
    fed = folder / "fed"
    program = [sys.executable, str(SUPPORT / "feeding.py"), str(fed)]
    times = 60
    script = _STRANGER.format(nobody=NOBODY, times=times, patience=PATIENCE_S, ping=b'{"jsonrpc":"2.0","id":1}\n')
    with Daemon(bad_child="worker", program=program) as daemon, daemon.client() as client:
        client.ping()
        daemon.home.chmod(0o711)
        daemon.socket.chmod(0o666)
        before = fed.read_text()
        assert before, "the owner's bytes are seen by what counts them"
        command = [sys.executable, "-c", script, str(daemon.socket)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert (done.returncode, done.stdout) == (0, "told 0\n"), done.stderr
        assert fed.read_text() == before, "a stranger's bytes have reached the codec"
        assert client.status().clients == 1
        refused = [line for line in daemon.log().splitlines() if '"event":"client_refused"' in line]
        assert len(refused) == times
        assert all("another user" in line for line in refused)


def test_descriptors_of_strangers_are_not_kept(folder: Path) -> None:
    """Those who come and go at once are forgotten at once; see also the crowd."""
    import psutil

    with Daemon(bad_child="worker") as daemon, daemon.client() as client:
        client.ping()
        process = psutil.Process(daemon.pid)
        before = process.num_fds()
        for _ in range(300):
            with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
                sock.connect(str(daemon.socket))
                sock.sendall(b"\xff" * 10)
        give_up_at = time.monotonic() + PATIENCE_S
        while client.status().clients > 1 or process.num_fds() > before + 1:  # the last bytes are written after that
            assert time.monotonic() < give_up_at, "some are never forgotten"
