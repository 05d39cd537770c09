"""Where the folder and the socket are, for each platform and environment."""

from __future__ import annotations

import os
import socket

import pytest

from mlxd_client import paths
from mlxd_client.errors import SocketPathTooLong


@pytest.mark.parametrize(
    ("env", "platform", "expected"),
    [
        ({"HOME": "/u"}, "linux", "/u/.local/share/mlxd"),
        ({"HOME": "/u", "XDG_DATA_HOME": "/d"}, "linux", "/d/mlxd"),
        ({"HOME": "/u", "XDG_DATA_HOME": "d"}, "linux", "/u/.local/share/mlxd"),
        ({"HOME": "/u", "XDG_DATA_HOME": ""}, "linux", "/u/.local/share/mlxd"),
        ({"HOME": "/u", "XDG_DATA_HOME": "/d"}, "darwin", "/u/Library/Application Support/mlxd"),
        ({"HOME": "/u", "MLXD_HOME": "/m/"}, "darwin", "/m"),
        ({"HOME": "/u", "MLXD_HOME": "~/m"}, "linux", "/u/m"),
        ({"HOME": "/u", "MLXD_HOME": "~"}, "linux", "/u"),
        ({"HOME": "/u", "MLXD_HOME": ""}, "linux", "/u/.local/share/mlxd"),
    ],
)
def test_home(env: dict[str, str], platform: str, expected: str) -> None:
    assert paths.home(env, platform) == expected


def test_a_relative_home_is_made_absolute() -> None:
    assert paths.home({"MLXD_HOME": "here"}) == os.path.join(os.getcwd(), "here")


def test_the_socket_lies_in_the_home_unless_it_is_named() -> None:
    assert paths.socket_path({"MLXD_HOME": "/m"}, "linux") == "/m/mlxd.sock"
    assert paths.socket_path({"MLXD_HOME": "/m", "MLXD_SOCKET": "/s/x"}, "linux") == "/s/x"


@pytest.mark.parametrize(("platform", "limit"), [("linux", 107), ("darwin", 103)])
def test_a_home_too_long_for_a_socket_has_it_in_a_short_folder(platform: str, limit: int) -> None:
    fits = "/" + "h" * (limit - len("/" + "/mlxd.sock"))
    assert paths.socket_path({"MLXD_HOME": fits}, platform) == f"{fits}/mlxd.sock"
    short = paths.socket_path({"MLXD_HOME": fits + "h", "TMPDIR": "/elsewhere"}, platform, uid=501)
    assert short.startswith("/tmp/mlxd-501/")
    assert len(os.fsencode(short)) <= limit
    assert short == paths.socket_path({"MLXD_HOME": fits + "h", "XDG_RUNTIME_DIR": "/run/x"}, platform, uid=501)
    assert short != paths.socket_path({"MLXD_HOME": fits + "i"}, platform, uid=501)


def test_a_named_socket_that_is_too_long_is_refused() -> None:
    with pytest.raises(SocketPathTooLong, match="108 bytes, 107 is the limit"):
        paths.socket_path({"MLXD_SOCKET": "/" + "s" * 107}, "linux")
    with pytest.raises(SocketPathTooLong):
        paths.check_socket_path("/" + "é" * 60, "linux")


def test_the_limit_is_the_systems(tmp_path: object) -> None:
    longest = "/tmp/" + "x" * (paths.socket_limit() - 5)
    with socket.socket(socket.AF_UNIX) as one, pytest.raises(OSError) as refused:
        one.connect(longest + "x")
    assert "too long" in str(refused.value)
    with socket.socket(socket.AF_UNIX) as one, pytest.raises(FileNotFoundError):
        one.connect(longest)
