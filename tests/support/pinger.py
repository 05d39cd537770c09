"""`python -m support.pinger SOCKET`: another client, in a process of its own, that pings until its stdin ends.

Prints the times then, in seconds, as one line of JSON.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from pathlib import Path

from mlxd_client import Client

PAUSE_S = 0.005


class Pinger:
    """The process, as a context; `stop` gives what it measured."""

    def __init__(self, socket: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.pinger", str(socket)], cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Pinger:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "pinging\n"
        return self

    def stop(self) -> list[float]:
        out, _ = self._process.communicate(timeout=30)
        return list(json.loads(out))

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def main(socket: str) -> None:
    times: list[float] = []
    with Client(socket, name="pinger") as client:
        client.ping()
        print("pinging", flush=True)
        while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
            began = time.perf_counter()
            client.ping()
            times.append(time.perf_counter() - began)
    print(json.dumps(times))


if __name__ == "__main__":
    main(sys.argv[1])
