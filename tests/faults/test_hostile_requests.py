"""Hostile requests to a real daemon and worker: each is refused by name, and soon, while another answer goes on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxd_client import Client, errors
from support import tiny_adapter, tiny_model, tool_templates
from support.daemon import PATIENCE_S, Daemon
from support.mix import TOOLS

pytestmark = pytest.mark.model

TURNS = [{"role": "user", "content": "hello"}]
SLOW = {"temperature": 0, "logit_bias": {"2": -1000}}  # it does not end by itself
# How long a refusal may take, and the other's answer may stand still, on a busy machine.
SOON_S, GAP_S = 20.0, 2.0
BOMBS = ["{{ 'x' * 10**10 }}", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"]
REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "remote reference": ({"schema": {"$ref": "https://example.org/schema.json"}}, "schema"),
    "large schema": ({"schema": {"type": "object", "description": "x" * (10 * 1024 * 1024)}}, "schema"),
    "empty grammar": ({"grammar": "start: nothing"}, "grammar"),
    "grammar that nothing fits": ({"grammar": "start: A\nA: /a/ & /b/"}, "grammar"),
    "schema that nothing fits": ({"schema": {"type": "integer", "minimum": 5.2, "maximum": 5.8}}, "schema"),
    "tools with one name": ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
}


class World:
    def __init__(self, folder: Path) -> None:
        self.model = str(tiny_model.build(folder / "model", context=32_000))
        other = tiny_model.build(folder / "other", hidden=128)
        self.adapter = str(tiny_adapter.build(folder / "adapter", other))
        self.caller = str(tool_templates.build(folder / "caller", "json_tools"))
        self.stranger = str(tiny_model.build(folder / "stranger", vocabulary=320))
        self.bombs = [
            str(tiny_model.build(folder / f"bomb-{number}", chat_template=text)) for number, text in enumerate(BOMBS)
        ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("models").resolve())


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as one:
        yield one


class Stream:
    """Another client's answer, which nothing may hold up."""

    def __init__(self, daemon: Daemon, model: str) -> None:
        self.gap = 0.0
        self._went_on = False
        self._begun, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._read, args=(daemon, model))

    def _read(self, daemon: Daemon, model: str) -> None:
        with (
            daemon.client() as client,
            client.stream_chat(TURNS, model=model, max_tokens=30_000, speculation="off", **SLOW) as stream,
        ):
            at = time.monotonic()
            for number, _ in enumerate(stream):
                if number > 3:
                    self._begun.set()
                    self.gap = max(self.gap, time.monotonic() - at)
                at = time.monotonic()
                if self._over.is_set():
                    self._went_on = True
                    break

    def __enter__(self) -> Stream:
        self._thread.start()
        assert self._begun.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        assert self._went_on, "it ended before what was to hold it up was over"
        assert self.gap < GAP_S, f"it stood still for {self.gap:.1f} s"


def refuse(client: Client, model: str, **options: Any) -> errors.RpcError:
    began = time.monotonic()
    with pytest.raises(errors.RpcError) as refused:
        client.call("chat", {"messages": TURNS, "model": model} | options)
    assert time.monotonic() - began < SOON_S
    return refused.value


def test_each_is_refused_by_name_beside_a_stream(daemon: Daemon, world: World) -> None:
    with daemon.client() as client, Stream(daemon, world.model):
        for name, (options, field) in REQUESTS.items():
            error = refuse(client, world.caller if "tools" in options else world.model, **options)
            assert isinstance(error, errors.InvalidParams), (name, error)
            assert str(error.details.get("field")).startswith(field), (name, error, error.details)
        error = refuse(client, world.model, adapter=world.adapter)
        assert (type(error), error.details["field"]) == (errors.InvalidParams, "adapter")
        with pytest.raises(errors.InvalidParams) as refused:
            client.load(world.model, draft_model=world.stranger)
        assert refused.value.details["field"] == "draft_model"


def test_an_exploding_regex_is_refused_or_followed(daemon: Daemon, world: World) -> None:
    rule = {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}
    with daemon.client() as client, Stream(daemon, world.model):
        began = time.monotonic()
        made: Any = None
        with contextlib.suppress(errors.InvalidParams):
            made = client.chat(TURNS, model=world.model, schema=rule, max_tokens=8)
        assert made is None or set(made.text) <= {'"', "a"}
        assert time.monotonic() - began < SOON_S


def test_templates_that_explode_cost_nobody_else(daemon: Daemon, world: World) -> None:
    """Their models are others, and so are their workers, which go on."""
    with daemon.client() as client, Stream(daemon, world.model):
        for folder in world.bombs:
            for _ in range(2):
                assert isinstance(refuse(client, folder), errors.ModelInvalid)
            assert client.model(folder).state == "Ready"
            client.unload(folder)
