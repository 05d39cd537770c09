"""A daemon that ends when idle, and whoever connects at that very moment."""

from __future__ import annotations

import asyncio
import socket
import time

from mlxd.live import IdleExit
from mlxd.settings import Settings
from support.loops import run
from support.serving import Served, serving

PING = b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n'
PONG = b'{"jsonrpc":"2.0","id":1,"result":{}}\n'


class Idle:
    """The idle exit of a server that nobody is connected to; as long as no time is set, it stays.

    Attributes:
        stopped: the daemon would end now.
        left: whenever it left, how many had been accepted by then, and whether that had been heard of.
    """

    def __init__(self, served: Served) -> None:
        self.served = served
        self.stopped = asyncio.Event()
        self.left: list[tuple[int, bool]] = []
        self.settings = Settings(home="/nowhere", socket="/nowhere/mlxd.sock", idle_exit_s=0)
        self._stop_accepting = served.server.stop_accepting
        served.server.stop_accepting = self._leaves  # type: ignore[method-assign]
        self._exit = IdleExit(served.server, served.runtime, self.settings, self.stopped.set)  # type: ignore[arg-type]

    def _leaves(self) -> None:
        server = self.served.server
        self.left.append((server.client_totals.accepted, not server.deserted))
        self._stop_accepting()

    def run_out(self) -> None:
        """Hold the loop until the time is over, so that it finds that and whoever has connected by now in one turn."""
        self.settings.idle_exit_s = 0.001
        self._exit.anew()
        time.sleep(0.003)

    def connect(self) -> socket.socket:
        """As another process does it: the kernel lets it wait, and the loop hears of it in its next turn."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.served.path))
        sock.sendall(PING)
        sock.setblocking(False)
        return sock


async def heard(sock: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(sock, 4096)


def test_who_is_accepted_in_the_turn_of_leaving_is_served() -> None:
    async def main() -> None:
        async with serving() as served:
            idle = Idle(served)
            with idle.connect() as first:
                idle.run_out()
                assert await heard(first) == PONG
                assert idle.left == [(1, False)]  # it was accepted, and nobody knew
                assert not idle.stopped.is_set()
                with idle.connect() as second:
                    assert await heard(second) == PONG
            await idle.stopped.wait()

    run(main())


def test_who_comes_later_is_left_to_the_next_daemon() -> None:
    async def main() -> None:
        async with serving() as served:
            idle = Idle(served)
            idle.run_out()
            await idle.stopped.wait()
            assert idle.left == [(0, False)]
            with idle.connect(), served.server._sock.accept()[0] as accepted:  # type: ignore[union-attr]
                assert await heard(accepted) == PING

    run(main())


def test_a_daemon_that_cannot_be_reached_again_ends() -> None:
    """It had left, was needed after all, and its socket is gone."""

    async def main() -> None:
        async with serving() as served:
            idle = Idle(served)
            with idle.connect() as first:
                idle.run_out()
                served.server._sock.close()  # type: ignore[union-attr]
                await idle.stopped.wait()
                assert await heard(first) == PONG

    run(main())
