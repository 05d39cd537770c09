"""What launchd answers when it is asked for the socket, by a C function that answers as launch_activate_socket does."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxd.server.activation import LAUNCHD_SOCKET, handed_over
from mlxd.server.listen import SocketPathError, adopt

_INTS = ctypes.POINTER(ctypes.c_int)
_ACTIVATE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_INTS), ctypes.POINTER(ctypes.c_size_t))


class Libc:
    """Hands over `descriptors`, in memory from malloc as launch.h says, or fails with `number`."""

    def __init__(self, descriptors: list[int], number: int = 0) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.malloc.restype = ctypes.c_void_p
        self._descriptors, self._number = descriptors, number
        self.asked: list[bytes] = []
        self.held: set[int | None] = set()
        self.launch_activate_socket = _ACTIVATE(self._activate)

    def _activate(self, name: bytes, array: ctypes._Pointer, count: ctypes._Pointer) -> int:
        self.asked.append(name)
        if self._number:
            return self._number
        address = self._libc.malloc(ctypes.c_size_t(ctypes.sizeof(ctypes.c_int) * len(self._descriptors)))
        array[0] = ctypes.cast(address, _INTS)
        for index, descriptor in enumerate(self._descriptors):
            array[0][index] = descriptor
        count[0] = len(self._descriptors)
        self.held.add(address)
        return 0

    def free(self, pointer: ctypes._Pointer) -> None:
        self.held.discard(ctypes.cast(pointer, ctypes.c_void_p).value)
        self._libc.free(pointer)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "mlxd.sock"))
        made.listen()
        yield made


@pytest.fixture
def launchd(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """`launchd(libc)`: from now on this is macOS, with that library."""

    def here(libc: Any) -> Any:
        monkeypatch.setattr("mlxd.server.activation.sys", SimpleNamespace(platform="darwin"))
        monkeypatch.setattr("mlxd.server.activation.ctypes.CDLL", lambda name: libc)
        return libc

    return here


def test_its_socket_is_taken_and_its_memory_given_back(
    launchd: Callable[[Any], Any], listening: socket.socket, tmp_path: Path
) -> None:
    descriptor = os.dup(listening.fileno())
    os.set_inheritable(descriptor, True)
    libc = launchd(Libc([descriptor]))
    taken = handed_over({})
    assert taken is not None
    assert (libc.asked, libc.held) == ([LAUNCHD_SOCKET.encode()], set())
    assert (taken.fileno(), os.get_inheritable(descriptor)) == (descriptor, False)
    adopted = adopt(taken, tmp_path / "home")
    assert adopted.path is None  # it is launchd's to remove
    adopted.close()


@pytest.mark.parametrize("number", [errno.ESRCH, errno.ENOENT])
def test_who_is_not_its_child_or_has_no_such_socket_binds_one_itself(
    launchd: Callable[[Any], Any], number: int
) -> None:
    launchd(Libc([], number))
    assert handed_over({}) is None


def test_a_system_that_cannot_be_asked_has_none(launchd: Callable[[Any], Any]) -> None:
    launchd(object())
    assert handed_over({}) is None


@pytest.mark.parametrize("number", [errno.EALREADY, errno.EINVAL])
def test_whatever_else_it_answers_is_an_error_with_its_reason(launchd: Callable[[Any], Any], number: int) -> None:
    """EALREADY: this process has asked before and holds the socket. Binding another would split the clients."""
    launchd(Libc([], number))
    with pytest.raises(SocketPathError, match=os.strerror(number)):
        handed_over({})


def test_several_are_refused(launchd: Callable[[Any], Any], listening: socket.socket) -> None:
    launchd(Libc([os.dup(listening.fileno()), os.dup(listening.fileno())]))
    with pytest.raises(SocketPathError, match="2 sockets"):
        handed_over({})
