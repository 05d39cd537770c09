"""Clients of protocol 1, as they were when it was written down: today's daemon answers them in words that they know,
and they bear with what is new.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxd_client import rpc, types
from mlxd_client.codec import Encoding, encode
from support import protocol

FOLDER = Path(__file__).parents[1] / "samples" / "protocol-1"
# Names that clients compare: they may never change. All else that is text is for people, or this run's own.
STABLE = {"kind", "state", "finish_reason", "source", "jsonrpc", "phase"}
BOTH = pytest.mark.parametrize("encoding", [Encoding.JSON, Encoding.MSGPACK], ids=["json", "msgpack"])


def name(encoding: Encoding) -> str:
    return "json" if encoding is Encoding.JSON else "msgpack"


def recorded(encoding: Encoding) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"heard.{name(encoding)}.jsonl").read_text().splitlines()]


def missing(old: Any, new: Any, where: str = "") -> list[str]:
    """Where `new` lacks what `old` has, or has it as another kind of value."""
    if isinstance(old, dict):
        if not isinstance(new, dict):
            return [where]
        return [
            lack
            for key, value in old.items()
            for lack in ([f"{where}.{key}"] if key not in new else missing(value, new[key], f"{where}.{key}"))
        ]
    if isinstance(old, list):
        if not isinstance(new, list) or (old and not new):
            return [where]
        return missing(old[0], new[0], f"{where}[0]") if old else []
    if where.rpartition(".")[2] in STABLE:
        return [] if old == new else [f"{where}: {old!r} is {new!r}"]
    number = (int, float)
    same = type(old) is type(new) or (isinstance(old, number) and isinstance(new, number) and type(old) is not bool)
    return [] if same else [f"{where}: {old!r} is {new!r}"]


@BOTH
def test_an_older_client_is_answered_as_it_was(encoding: Encoding) -> None:
    sent = protocol.split((FOLDER / f"sent.{name(encoding)}").read_bytes(), encoding)
    before = {message["id"]: message for message in recorded(encoding) if "id" in message}
    assert len(sent) == len(before)
    with protocol.daemon() as daemon:
        heard = protocol.talk(daemon, sent, encoding)
    now = {message["id"]: message for message in heard if "id" in message}
    lacks = {request: missing(answer, now[request]) for request, answer in before.items()}
    assert {request: lack for request, lack in lacks.items() if lack} == {}
    # Notifications: of the kinds that it knows, with the fields that it reads.
    for what in ("stream", "event"):
        old = [message["params"] for message in recorded(encoding) if message.get("method") == what]
        new = [message["params"] for message in heard if message.get("method") == what]
        for one in old:
            same = next((other for other in new if other.get("name") == one.get("name")), None)
            assert same is not None, f"nobody says {one} any more"
            assert one.keys() <= same.keys()
    assert {message["method"] for message in heard if "method" in message} == {"stream", "event"}


@BOTH
def test_what_it_sends_is_what_clients_sent(encoding: Encoding) -> None:
    """The sample holds a request of each kind: should the list grow, it is recorded under another name."""
    sent = (FOLDER / f"sent.{name(encoding)}").read_bytes()
    assert sent == b"".join(protocol.frames(encoding))


def with_more(value: Any) -> Any:
    """The same, as a newer daemon may say it: with members that nobody knows yet, at every level."""
    if isinstance(value, dict):
        return {key: with_more(item) for key, item in value.items()} | {"unheard_of": {"by": [1, "nobody"]}}
    return [with_more(item) for item in value] if isinstance(value, list) else value


RESULTS = {
    "hello": types.HelloResult, "status": types.Status, "models.list": types.ModelsResult, "models.get": types.Model,
    "events.subscribe": types.SubscribeResult, "models.load": types.Model, "models.acquire": types.Lease,
    "process": types.Completion, "chat": types.Completion, "tokens.count": types.TokensResult,
    "jobs.list": types.JobsResult, "jobs.get": types.Job, "cache.list": types.CacheResult,
    "models.catalog": types.CatalogResult, "models.unload": types.Model, "cancel": types.CancelResult,
}  # fmt: skip


@BOTH
def test_a_client_bears_with_what_it_does_not_know(encoding: Encoding) -> None:
    answers = {message["id"]: message for message in recorded(encoding) if "id" in message}
    session = rpc.Session("tests", encoding=encoding)
    calls = {}
    for number, (method, params) in enumerate(protocol.REQUESTS, 1):
        if method == "hello":
            session.greet()
            calls[number] = session.greeting
        else:
            calls[number] = session.start(method, params, RESULTS.get(method, Any))[0]
    for number, call in calls.items():
        answer = answers[number] | {"id": call.id}
        for part in ("result", "error"):
            if part in answer:
                answer[part] = with_more(answer[part]) if part == "result" else answer[part] | {"unheard_of": 1}
        session.receive(encode({"jsonrpc": "2.0", "method": "unheard_of", "params": {"at": 1}}, encoding))
        session.receive(encode(answer, encoding))
        assert call.done
        assert (call.error is None) == ("result" in answer), call.error
    assert session.closed is None
