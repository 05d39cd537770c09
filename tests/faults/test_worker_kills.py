"""Real workers, killed while they do each kind of thing: a typed error at once, and the next ones are served."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxd_client import Client, errors
from support import tiny_adapter, tool_templates
from support.daemon import PATIENCE_S, Daemon, until
from support.mix import TOOLS

pytestmark = pytest.mark.model

TURNS = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog " * 8}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


class World:
    def __init__(self, folder: Path) -> None:
        self.model = str(tool_templates.build(folder / "model", "json_tools"))
        self.draft = str(tool_templates.build(folder / "draft", "json_tools", layers=1))
        self.adapter = str(tiny_adapter.build(folder / "adapter", Path(self.model)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("models").resolve())


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as one:
        yield one


KINDS: dict[str, Callable[[Client, World], Any]] = {
    "tools": lambda client, world: client.chat(TURNS, model=world.model, tools=TOOLS, tool_choice="required", **GREEDY),
    "several": lambda client, world: client.chat(TURNS, model=world.model, n=3, **GREEDY),
    "rule": lambda client, world: client.chat(TURNS, model=world.model, schema={"type": "boolean"}, **GREEDY),
    "adapter": lambda client, world: client.chat(TURNS, model=world.model, adapter=world.adapter, **GREEDY),
    "embed": lambda client, world: client.embed(["a text", "another one"] * 20, model=world.model),
    "prewarm": lambda client, world: client.load(world.model, system="you are a helpful model " * 8),
    "attach": lambda client, world: client.load(world.model, draft_model=world.draft),
    "adapt": lambda client, world: client.load(world.model, adapter=world.adapter),
    "count": lambda client, world: client.count_tokens("a text", model=world.model),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_killed_at(daemon: Daemon, world: World, kind: str) -> None:
    with daemon.client() as client, daemon.client() as other, daemon.client().events() as events:
        client.load(world.model)
        (worker,) = [child for child in daemon.children() if "mlxd.worker" in child.cmdline()]
        worker.suspend()  # it has the request, and does nothing with it
        told: list[Any] = []

        def ask() -> None:
            try:
                KINDS[kind](client, world)
            except errors.MlxdError as error:
                told.append((time.monotonic(), error))

        asking = threading.Thread(target=ask)
        asking.start()
        for _ in range(20):  # by then it has gone through the daemon
            other.ping()
            other.status()
        killed_at = time.monotonic()
        worker.kill()
        until(events, "worker_died")
        asking.join(PATIENCE_S)
        assert not asking.is_alive(), "it was never answered"
        ((at, error),) = told
        assert isinstance(error, errors.WorkerDied), error
        assert at - killed_at < 1.0
        assert_as_before(daemon, other, world)


def assert_as_before(daemon: Daemon, client: Client, world: World) -> None:
    """The next ones are served, and what is said of the model is so."""
    assert client.chat(TURNS, model=world.model, **GREEDY).usage.completion_tokens > 0
    assert client.chat(TURNS, model=world.model, adapter=world.adapter, **GREEDY).adapter == world.adapter
    model = client.model(world.model)
    assert (model.state, model.active, model.waiting, model.leases) == ("Ready", 0, 0, 0)
    if model.draft_model is None:
        with pytest.raises(errors.Unsupported):
            client.chat(TURNS, model=world.model, speculation="draft", **GREEDY)
    else:
        assert client.chat(TURNS, model=world.model, speculation="draft", **GREEDY | {"max_tokens": 30}).speculation
    client.unload(world.model)
    leftovers = [path for path in (daemon.home / "cache").rglob("*") if path.is_file() and path.suffix not in (".kv",)]
    assert not [path for path in leftovers if "tmp" in path.name or "part" in path.name], leftovers
