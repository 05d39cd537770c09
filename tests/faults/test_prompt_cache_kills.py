"""Killed in the middle of writing prompts to disk, worker or daemon: the next one serves, with what was whole."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlxd import promptfiles
from support import tiny_model
from support.daemon import PATIENCE_S, Daemon, until

pytestmark = pytest.mark.model

MORTAL_WORKER = Path(__file__).parents[1] / "support" / "mortal_worker.py"
GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 8}
TURNS = [{"role": "user", "content": "so i think we should meet on monday at 3 pm " * 12}]
BUDGET_BYTES = 4 * 1024 * 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model.build(tmp_path_factory.mktemp("models") / "tiny", context=2048))


@pytest.mark.parametrize(("who", "deed"), [("worker", "rename"), ("worker", "write"), ("daemon", "write")])
def test_the_next_one_serves(model: str, who: str, deed: str) -> None:
    command = f"{sys.executable} {MORTAL_WORKER} {who} {deed}"
    with Daemon(worker_command=command, prompt_disk_cache_bytes=BUDGET_BYTES) as daemon:
        told = daemon.home / "died"
        daemon.env["MORTAL_WORKER"] = str(told)
        daemon.restart()
        with daemon.client() as client, client.events() as events:
            first = client.chat(TURNS, model=model, **GREEDY)  # written once it is idle
            if who == "worker":
                until(events, "worker_died")
        if who == "daemon":
            assert daemon.process is not None
            assert daemon.process.wait(PATIENCE_S) == -9
            daemon.restart(crash=True)
        assert told.exists()
        root = daemon.home / "cache" / "prompts"
        assert len(entries(root)) == 2  # the third was under way
        with daemon.client() as client:
            again = client.chat(TURNS, model=model, **GREEDY)
            assert again.text == first.text
            assert again.usage.cached_tokens > 0, "what was whole is of no use"
            client.chat([*TURNS, {"role": "assistant", "content": again.text}, *TURNS], model=model, **GREEDY)
            give_up_at = time.monotonic() + PATIENCE_S
            while len(entries(root)) <= 2 or unfinished(root):
                assert time.monotonic() < give_up_at, "nothing is written any more, or half of it lies there"
                time.sleep(0.05)
            found = client.cache()
            assert found.disk_bytes <= found.disk_budget_bytes == BUDGET_BYTES
            assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) <= BUDGET_BYTES


def entries(root: Path) -> list[Path]:
    return sorted(root.glob(f"*/*{promptfiles.SUFFIX}"))


def unfinished(root: Path) -> list[Path]:
    return sorted(root.glob(f"*/*{promptfiles.NEW}"))
