"""Downloads from a hub on loopback: whole, hashed and published, against curl and huggingface_hub, which hash nothing.

The hub is the one of the tests, and computes what it sends, so that no disk is read. Each run begins with an empty
cache and ends when the file is whole; ours and huggingface_hub's include the start of their processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .processes import Daemon, environment
from .table import Row, paired

if TYPE_CHECKING:
    from support.hub import Hub

TESTS = Path(__file__).resolve().parents[2] / "tests"
REPO = "bench/model"
_SNAPSHOT = "import sys, huggingface_hub as h; h.snapshot_download(sys.argv[1])"


def download_rows(temp: Path, megabytes: int, rounds: int) -> Iterator[Row]:
    sys.path.insert(0, str(TESTS))
    from support.hub import Hub

    with Hub() as hub:
        commit = hub.synthetic(REPO, shard_bytes=megabytes * 1_000_000)
        cache = temp / "hub-of-downloads"
        with Daemon(**hub.env(cache)) as daemon:
            ours = _timed(megabytes, cache, lambda: _pull(daemon))
            others: dict[str, Callable[[], float]] = {}
            if shutil.which("curl"):
                url = f"{hub.endpoint}/{REPO}/resolve/{commit}/model.safetensors"
                others["curl"] = _timed(megabytes, cache, lambda: _run(["curl", "-sSfL", "-o", str(temp / "out"), url]))
            others["huggingface_hub"] = _timed(megabytes, cache, lambda: _snapshot(hub, temp, cache))
            for name, theirs in others.items():
                pairs = [(ours(), theirs()) for _ in range(rounds)]
                yield paired("download", f"{megabytes:,} MB from loopback, hashed; {name}", pairs, "MB/s")
        shutil.rmtree(cache, ignore_errors=True)
        (temp / "out").unlink(missing_ok=True)


def _timed(megabytes: int, cache: Path, run: Callable[[], Any]) -> Callable[[], float]:
    def measure() -> float:
        shutil.rmtree(cache, ignore_errors=True)
        began = time.perf_counter()
        run()
        return megabytes / (time.perf_counter() - began)

    return measure


def _pull(daemon: Daemon) -> None:
    with daemon.client() as client:
        ended = client.wait_job(client.download(REPO))
        if ended.state != "done":
            raise RuntimeError(f"the download ended as {ended.state}: {ended.error}")


def _snapshot(hub: Hub, temp: Path, cache: Path) -> None:
    _run([sys.executable, "-c", _SNAPSHOT, REPO], environment(temp, **hub.env(cache)))


def _run(command: list[str], env: dict[str, str] | None = None) -> None:
    subprocess.run(command, env=os.environ if env is None else env, check=True, stderr=subprocess.DEVNULL)
