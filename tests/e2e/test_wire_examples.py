"""The examples in docs/wire.md, played in their order to a real daemon: what is shown is sent, and answered so."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxd.server.methods.examples import ANYTHING, CHANCE, EXAMPLES, NAMES, SUFFIXES, VALUES
from mlxd.server.methods.table import METHODS
from support.daemon import PATIENCE_S, Daemon
from support.hub import Hub

PAGE = (Path(__file__).parents[2] / "docs" / "wire.md").read_text("utf-8")
METHODS_PART = PAGE.partition("<!-- generated: methods -->")[2].partition("<!-- end -->")[0]


def test_every_method_has_an_example() -> None:
    missing = sorted(METHODS.keys() - EXAMPLES.keys())
    assert missing == [], "add them to daemon/src/mlxd/server/methods/examples.py"
    assert EXAMPLES.keys() <= METHODS.keys()


class Connection:
    """Speaks JSON lines, and puts this run's names in the place of those that the examples have."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.names: dict[str, str] = {}
        self.open()

    def open(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(self._path)
        self._lines = self._socket.makefile("r", encoding="utf-8")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(request)
        for shown, real in self.names.items():
            text = text.replace(json.dumps(shown), json.dumps(real))
        self._socket.sendall(text.encode() + b"\n")
        while True:
            message: dict[str, Any] = json.loads(self._lines.readline())
            if message.get("id") == request["id"]:
                return message

    def matches(self, shown: Any, got: Any, field: str = "", path: str = "result") -> None:
        """Fail unless `got` is what `shown` shows, but for what differs from run to run."""
        if shown == ANYTHING:
            return
        assert type(shown) is type(got) or {type(shown), type(got)} == {int, float}, f"{path}: {got!r}"
        if field in VALUES or field.endswith(SUFFIXES):
            return
        if field in NAMES:
            self.names[shown] = got
        elif isinstance(shown, dict):
            assert shown.keys() - CHANCE == got.keys() - CHANCE, path
            for name in shown.keys() & got.keys():
                self.matches(shown[name], got[name], name, f"{path}.{name}")
        elif isinstance(shown, list):
            if shown and shown[-1] == ANYTHING:
                shown, got = shown[:-1], got[: len(shown) - 1]
            assert len(shown) == len(got), path
            for place, (one, other) in enumerate(zip(shown, got, strict=True)):
                self.matches(one, other, field, f"{path}[{place}]")
        else:
            assert got == shown, path


@pytest.fixture
def connection() -> Iterator[Connection]:
    with Hub() as hub:
        hub.model("org/tiny")
        with Daemon(env=hub.env()) as daemon:
            made = Connection(str(daemon.socket))
            yield made
            made.close()


@pytest.mark.model
def test_they_are_answered_as_shown(connection: Connection) -> None:
    shown = {
        (request := json.loads(sent))["method"]: (request, json.loads(answer))
        for sent, answer in re.findall(r"^```\n-> (.*)\n<- (.*)\n```$", METHODS_PART, re.MULTILINE)
    }
    assert shown.keys() == EXAMPLES.keys()
    wrong = []
    for name, example in EXAMPLES.items():
        for number, (method, params) in enumerate(example.before):
            prepared = {"jsonrpc": "2.0", "id": f"before {number}", "method": method, "params": params}
            assert "result" in connection.ask(prepared), (name, method)
        request, answer = shown[name]
        got = connection.ask(request)
        try:
            connection.matches(answer["result"], got.get("result"), path=name)
        except AssertionError as error:
            wrong.append(f"{error}\n    {json.dumps(got)[:2000]}")
        if name == "restart":  # its connections are closed, and the next one is the new daemon's
            connection.close()
            connection.open()
            successor = psutil.Process(got["result"]["pid"])
    successor.wait(PATIENCE_S)  # the last of the examples ends it
    assert not wrong, "\n".join(wrong)


def test_what_differs_is_seen() -> None:
    connection = Connection.__new__(Connection)
    connection.names = {}
    connection.matches(
        {"a": 1, "b_s": 2, "job": "x", "c": [1, ANYTHING]}, {"a": 1, "b_s": 3.5, "job": "y", "c": [1, 2]}
    )
    assert connection.names == {"x": "y"}
    for shown, got in (
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {}),
        ({}, {"a": 1}),
        ({"b_s": 1}, {"b_s": "1"}),
        ([1], [1, 2]),
        ({"a": [{"b": 1}]}, {"a": [{"b": 2}]}),
    ):
        with pytest.raises(AssertionError):
            connection.matches(shown, got)
