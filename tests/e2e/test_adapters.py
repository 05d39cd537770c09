"""Adapters through the daemon: by request and by load, by folder and by name, beside requests that have none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlxd_client import Client
from mlxd_client.errors import InvalidParams, ModelNotFound, RpcError
from support import tiny_adapter, tiny_model
from support.daemon import Daemon

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 12}
COMMIT = "a" * 40


class World:
    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self.daemon = daemon
        self.base = str(tiny_model.build(folder / "base").resolve())
        self.adapters = [str(tiny_adapter.build(folder / f"a{n}", folder / "base", seed=n).resolve()) for n in range(3)]
        # As `hf download` leaves it in the cache.
        repo = daemon.home / "hub" / "models--org--lora"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(COMMIT)
        shutil.copytree(self.adapters[2], repo / "snapshots" / COMMIT)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Daemon() as daemon:
        yield World(daemon, tmp_path_factory.mktemp("models"))


@pytest.fixture
def client(world: World) -> Iterator[Client]:
    with world.daemon.client() as client:
        yield client
        assert len(world.daemon.children()) == 1, "the base model was loaded anew, or its worker died"


def say(client: Client, world: World, adapter: str | None = None) -> Any:
    return client.process("hello", model=world.base, adapter=adapter, **GREEDY)


def test_requests_with_different_adapters_run_together(client: Client, world: World) -> None:
    plain = say(client, world)
    pid = world.daemon.worker().pid
    assert plain.adapter is None
    wanted = {adapter: say(client, world, adapter).text for adapter in world.adapters}
    assert len({plain.text, *wanted.values()}) == 4
    with ThreadPoolExecutor(8) as pool:
        asked = [*world.adapters, None] * 4
        made = list(pool.map(lambda adapter: say(client, world, adapter), asked))
    for adapter, done in zip(asked, made, strict=True):
        assert done.adapter == adapter
        assert done.text == (plain.text if adapter is None else wanted[adapter])
    assert world.daemon.worker().pid == pid


def test_an_adapter_of_the_hub(client: Client, world: World) -> None:
    done = say(client, world, "org/lora")
    assert done.adapter == "org/lora"
    assert done.text == say(client, world, world.adapters[2]).text
    stream = client.stream_process("hello", model=world.base, adapter="org/lora", **GREEDY)
    assert "".join(stream) == stream.result.text == done.text


def test_a_load_brings_the_adapter_of_those_who_name_none(client: Client, world: World) -> None:
    plain = say(client, world)
    pid = world.daemon.worker().pid
    model = client.load(world.base, adapter=world.adapters[0])
    assert model.state == "Ready"
    assert model.leases == 0
    assert model.adapter == world.adapters[0]
    assert {"process", "adapters"} <= set(model.capabilities or ())
    assert say(client, world).adapter == world.adapters[0]
    assert say(client, world).text == say(client, world, world.adapters[0]).text != plain.text
    assert say(client, world, world.adapters[1]).adapter == world.adapters[1]
    assert say(client, world, "none").text == plain.text
    assert say(client, world, "none").adapter is None
    client.load(world.base)  # says nothing of adapters
    assert say(client, world).adapter == world.adapters[0]
    assert client.load(world.base, adapter="none").adapter is None
    assert say(client, world).text == plain.text
    assert world.daemon.worker().pid == pid
    client.load(world.base, adapter=world.adapters[1])
    client.unload(world.base)
    assert say(client, world).text == plain.text


def test_those_that_do_not_fit(client: Client, world: World, tmp_path: Path) -> None:
    other = tiny_model.build(tmp_path / "other", hidden=96)
    foreign = str(tiny_adapter.build(tmp_path / "foreign", other))
    broken = tiny_adapter.edit(tiny_adapter.build(tmp_path / "broken", other), lora_parameters=[])
    before = say(client, world)
    for adapter in (foreign, str(broken)):
        for ask in (lambda adapter: say(client, world, adapter), lambda a: client.load(world.base, adapter=a)):
            with pytest.raises(InvalidParams) as caught:
                ask(adapter)
            assert caught.value.details["field"] == "adapter"
    # A folder that goes after it was found.
    gone = shutil.copytree(world.adapters[0], tmp_path / "gone")
    assert say(client, world, str(gone)).adapter == str(gone)
    shutil.rmtree(gone)
    with pytest.raises(ModelNotFound):
        say(client, world, str(gone))
    assert say(client, world).text == before.text
    assert client.model(world.base).leases == 0


def test_giving_up_while_one_is_wanted(client: Client, world: World) -> None:
    with pytest.raises(RpcError) as caught:
        client.process("hello", model=world.base, adapter=world.adapters[0], timeout_s=0.000_001)
    assert caught.value.kind == "deadline_exceeded"
    assert say(client, world, world.adapters[0]).adapter == world.adapters[0]
