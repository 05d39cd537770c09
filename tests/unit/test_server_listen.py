"""Creating the socket: modes, locks, what is in the way, who is at the other end."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxd.server import listen as listening
from mlxd.server.listen import (
    AlreadyRunning,
    HomeError,
    Listener,
    Removed,
    SocketPathError,
    adopt,
    listen,
    peer_gone,
    peer_of,
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, since socket paths are limited to about 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="mlxd-") as name:
        yield Path(name)


def _mode(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def test_folder_and_socket_are_private(folder: Path) -> None:
    home = folder / "a" / "home"
    before = os.umask(0)
    try:
        listener = listen(home)
        assert os.umask(0) == 0  # put back
    finally:
        os.umask(before)
    assert (_mode(home), _mode(home / "mlxd.sock"), _mode(home / "mlxd.lock")) == (0o700, 0o600, 0o600)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(home / "mlxd.sock"))
    listener.close()
    assert not (home / "mlxd.sock").exists()
    listener.close()


def test_a_loose_mode_is_mended(folder: Path) -> None:
    folder.chmod(0o755)
    listen(folder).close()
    assert _mode(folder) == 0o700


def test_the_second_is_told_who_is_first(folder: Path) -> None:
    first = listen(folder)
    with pytest.raises(AlreadyRunning, match="already running") as caught:
        listen(folder)
    assert caught.value.pid == os.getpid()
    with pytest.raises(AlreadyRunning):
        listen(folder, folder / "other.sock")
    first.close()
    listen(folder).close()


def test_two_homes_cannot_share_a_socket(folder: Path) -> None:
    shared = folder / "shared"
    shared.mkdir(mode=0o700)
    first = listen(folder / "one", shared / "s")
    with pytest.raises(AlreadyRunning):
        listen(folder / "two", shared / "s")
    first.close()
    listen(folder / "two", shared / "s").close()


def test_a_homes_own_socket_is_locked_for_other_homes_too(folder: Path) -> None:
    """Else two that start at once could both find nobody there, and the later one take the socket of the other."""
    for name in ("mlxd.sock", "other.sock"):
        path = folder / "one" / name
        first = listen(folder / "one", path)
        path.unlink()  # so that only a lock can tell
        with pytest.raises(AlreadyRunning):
            listen(folder / "two", path)
        first.close()
        second = listen(folder / "two", path)
        path.unlink()
        with pytest.raises(AlreadyRunning):
            listen(folder / "one", path)
        second.close()


def test_a_stale_socket_and_leftovers_are_replaced(folder: Path) -> None:
    for name in ("mlxd.sock", ".mlxd.sock.12345"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(folder / name))
    listener = listen(folder)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(folder / "mlxd.sock"))
    assert sorted(os.listdir(folder)) == ["mlxd.lock", "mlxd.sock"]
    listener.close()


def test_a_live_socket_without_our_lock_is_not_stolen(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(folder / "mlxd.sock"))
        other.listen(1)
        with pytest.raises(AlreadyRunning):
            listen(folder)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(folder / "mlxd.sock"))
    listen(folder).close()  # the lock was given back


def test_a_file_in_the_way_is_kept(folder: Path) -> None:
    (folder / "mlxd.sock").write_text("precious")
    with pytest.raises(SocketPathError, match="is no socket"):
        listen(folder)
    assert (folder / "mlxd.sock").read_text() == "precious"


def test_a_path_too_long_says_how_long_it_may_be(folder: Path) -> None:
    with pytest.raises(SocketPathError, match=r"too long: at most \d+ bytes"):
        listen(folder / ("x" * 120))
    assert not list(folder.iterdir())


def test_a_home_that_is_no_folder(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(HomeError, match="not a folder"):
        listen(folder / "file")
    with pytest.raises(HomeError, match=r"cannot be used|not a folder"):
        listen(folder / "file" / "below")


def test_a_home_of_somebody_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(HomeError, match="belongs to user"):
        listen(folder)


def test_an_unwritable_home() -> None:
    with pytest.raises(HomeError, match="cannot be used"):
        listen(Path("/proc/mlxd-home") if sys.platform == "linux" else Path("/mlxd-home"))


def test_a_lock_that_cannot_be_made(folder: Path) -> None:
    (folder / "mlxd.lock").symlink_to("/dev/null")
    with pytest.raises(HomeError, match="lock file"):
        listen(folder)


def test_a_missing_socket_folder_is_made_private(folder: Path) -> None:
    listener = listen(folder / "home", folder / "sockets" / "a.sock")
    assert (_mode(folder / "sockets"), _mode(folder / "sockets" / "a.sock")) == (0o700, 0o600)
    listener.close()
    with pytest.raises(SocketPathError, match="cannot be used"):
        listen(folder / "home", folder / "not" / "there" / "a.sock")


def test_a_socket_folder_that_others_may_write(folder: Path) -> None:
    loose = folder / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    with pytest.raises(SocketPathError, match="writable by nobody else"):
        listen(folder / "home", loose / "s")
    listen(folder / "home").close()


def test_the_socket_of_a_successor_is_left_alone(folder: Path) -> None:
    listener = listen(folder)
    (folder / "mlxd.sock").unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(folder / "mlxd.sock"))
        listener.close()
        assert (folder / "mlxd.sock").exists()


def test_a_lock_that_cannot_be_signed_is_held_all_the_same(folder: Path) -> None:
    listener = listen(folder)
    locks, listener.locks = listener.locks, [os.open("/dev/null", os.O_RDWR)]
    listener.claim()
    listener.locks += locks
    with pytest.raises(AlreadyRunning):
        listen(folder)
    listener.close()


def test_a_removed_lock_file_keeps_nobody_out_for_long(folder: Path) -> None:
    first = listen(folder)
    (folder / "mlxd.lock").unlink()
    with pytest.raises(AlreadyRunning):  # the socket still answers
        listen(folder)
    first.close()


def test_a_removed_socket_is_made_again(folder: Path) -> None:
    path = folder / "mlxd.sock"
    listener = listen(folder)
    assert not listener.renew()  # it is there
    path.unlink()
    assert listener.renew()
    assert _mode(path) == 0o600
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        listener.sock.accept()[0].close()
    path.unlink()
    path.write_text("in the way")
    with pytest.raises(SocketPathError, match="is no socket"):
        listener.renew()
    path.unlink()
    assert listener.renew()
    with pytest.raises(AlreadyRunning):
        listen(folder)
    listener.close()
    assert not path.exists()


@pytest.mark.parametrize("beside", [False, True])
def test_a_socket_is_not_made_again_where_its_lock_is_gone(folder: Path, beside: bool) -> None:
    """The next daemon may be there by now."""
    (folder / "sockets").mkdir(mode=0o700)
    path = folder / "sockets" / "other.sock" if beside else folder / "home" / "mlxd.sock"
    listener = listen(folder / "home", path)
    shutil.rmtree(path.parent)
    with pytest.raises(Removed):
        listener.renew()
    path.parent.mkdir(mode=0o700)
    with listen(folder / "next", path).sock:
        with pytest.raises(Removed):
            listener.renew()
        listener.close()
        assert path.exists()


def test_a_socket_that_somebody_else_has_put_in_its_place_is_left_alone(folder: Path) -> None:
    path = folder / "mlxd.sock"
    listener = listen(folder)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:  # as a service manager does, which knows nothing of the lock
        other.bind(str(path))
        other.listen()
        with pytest.raises(AlreadyRunning):
            listener.renew()
        listener.close()
        assert path.exists()


def test_a_socket_that_was_hidden_or_given_away_is_not_made_again(folder: Path) -> None:
    for name, leave in (("a", Listener.hide), ("b", Listener.give_away)):
        listener = listen(folder / name)
        leave(listener)
        (folder / name / "mlxd.sock").unlink(missing_ok=True)
        assert not listener.renew()
        assert not (folder / name / "mlxd.sock").exists()
        listener.close()


def test_a_socket_handed_over(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(str(folder / "s"))
        with pytest.raises(SocketPathError, match="no listening"):
            adopt(given, folder / "home")
        given.listen(1)
        listener = adopt(given, folder / "home")
        with pytest.raises(AlreadyRunning):
            listen(folder / "home")
        listener.close()
        assert (folder / "s").exists()
    listen(folder / "home").close()


def test_peer_credentials_and_departure() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            assert peer_of(ours) == (os.geteuid(), os.getpid())
            assert not peer_gone(ours)
            theirs.shutdown(socket.SHUT_WR)
            assert not peer_gone(ours)
        assert peer_gone(ours)


_RACER = """
import sys, pathlib
from mlxd.server.listen import listen, AlreadyRunning
print("ready", flush=True)
sys.stdin.readline()
try:
    listener = listen(pathlib.Path(sys.argv[1]))
except AlreadyRunning as error:
    print("lost", error.pid, flush=True)
else:
    print("won", flush=True)
    sys.stdin.readline()
"""


def test_of_racing_processes_exactly_one_wins(folder: Path) -> None:
    """Twice over, the second time after the winner of the first was killed and left its socket and lock behind."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", _RACER, str(folder / "home")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for _ in range(4)
        ]
        try:
            for racer in racers:
                assert racer.stdout is not None
                assert racer.stdout.readline() == "ready\n"
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write("go\n")
                racer.stdin.flush()
            said = {racer.pid: racer.stdout.readline().split() for racer in racers if racer.stdout}
            winners = [pid for pid, words in said.items() if words == ["won"]]
            assert len(winners) == 1
            assert all(words == ["lost", str(winners[0])] for pid, words in said.items() if pid != winners[0])
        finally:
            for racer in racers:
                racer.kill()
                racer.communicate()


def test_the_longest_path_that_is_allowed_works(folder: Path) -> None:
    spare = listening._MAX_PATH_BYTES - len(os.fsencode(folder / "x" / f".mlxd.sock.{os.getpid()}"))
    listen(folder / ("x" * (spare + 1))).close()
    with pytest.raises(SocketPathError):
        listen(folder / ("x" * (spare + 2)))
