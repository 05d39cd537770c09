"""What clients may send by mistake or malice: a typed refusal each time, before anything is loaded for it."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxd_client import Client, errors
from mlxd_client.codec import MAX_DEPTH, MAX_FRAME_BYTES, encode
from support import fake_model
from support.daemon import PATIENCE_S, Daemon

CLEANUP = "mlxd/cleanup"
ASK = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One for all: whatever a test sends must leave it as it was."""
    with Daemon(bad_child="worker") as one:
        yield one


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as one:
        yield one
        assert daemon.children() == [], "a worker was started for a request that could be refused without one"
        assert not [line for line in daemon.log().splitlines() if '"level":"error"' in line]


def refused(client: Client, method: str, params: Any) -> errors.RpcError:
    with pytest.raises(errors.RpcError) as caught:
        client.call(method, params)
    assert caught.value.message
    assert "Traceback" not in str(caught.value.to_wire())
    return caught.value


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ref",
    [
        "../../etc/passwd", "mlxd/../cleanup", "mlxd/..", "..", ".", "a/..", "org/../../x", "mlxd/cleanup/..", "a/b/c",
        "~", "~/models", "models--org--name", "org\\name", "/nowhere/at/all", "\x00", "a\nb", "a" * 4097, "🦙/🦙",
        "https://example.org/x", "file:///etc", "org/name@main", " mlxd/cleanup", "mlxd/Cleanup", "-", "/",
    ],
)  # fmt: skip
def test_names_that_lead_nowhere(client: Client, ref: str) -> None:
    for method, params in (
        ("models.get", {"model": ref}),
        ("models.load", {"model": ref}),
        ("models.acquire", {"model": ref}),
        ("models.unload", {"model": ref}),
        ("process", {"prompt": "x", "model": ref}),
        ("chat", ASK | {"model": ref}),
        ("tokens.count", {"text": "x", "model": ref}),
    ):
        error = refused(client, method, params)
        assert error.kind in ("model_not_found", "model_invalid", "invalid_params"), error


def broken(folder: Path, how: str) -> None:
    """Make a whole model a broken one."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    match how:
        case "empty folder":
            for file in folder.iterdir():
                file.unlink()
        case "no config":
            config.unlink()
        case "config is no json":
            config.write_text('{"model_type": "qwen3",')
        case "config is a list":
            config.write_text("[1]")
        case "config is nested":
            config.write_text("[" * 100_000)
        case "config is a fifo":
            config.unlink()
            os.mkfifo(config)
        case "weights truncated":
            os.truncate(weights, 4)
        case "weights shorter than their header says":
            fake_model.write_weights(weights, 1000)
            os.truncate(weights, weights.stat().st_size - 1)
        case "weights with a huge header":
            weights.write_bytes(struct.pack("<Q", 2**63) + b"{}")
        case "weights are pickle":
            weights.rename(folder / "pytorch_model.bin")
        case "weights are noise":
            weights.write_bytes(os.urandom(4096))
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "index leads out":
            index = {"weight_map": {"w": "../../secret.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = [
    "empty folder", "no config", "config is no json", "config is a list", "config is nested", "config is a fifo",
    "weights truncated", "weights shorter than their header says", "weights with a huge header", "weights are pickle",
    "weights are noise", "no tokenizer", "index leads out",
]  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_folders_that_are_no_models(client: Client, tmp_path: Path, how: str) -> None:
    folder = fake_model.build(tmp_path / "model")
    broken(Path(folder), how)
    error = refused(client, "process", {"prompt": "x", "model": folder})
    assert error.kind == "model_invalid"
    assert folder in error.message
    assert folder not in {model.id for model in client.models()}


def test_a_file_is_no_model(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refused(client, "models.load", {"model": str(tmp_path / "file")}).kind == "model_not_found"


def test_a_model_that_broke_after_it_was_found(client: Client, tmp_path: Path) -> None:
    """Downloaded is what the disk says now, not what it said once."""
    folder = fake_model.build(tmp_path / "model")
    assert client.model(folder).state == "Downloaded"
    with client.events() as events:
        broken(Path(folder), "weights truncated")
        assert refused(client, "models.load", {"model": folder}).kind == "model_invalid"
        lost = events.get(PATIENCE_S)
        assert lost is not None
        assert (lost.name, lost.model_id) == ("model_lost", folder)


# --- params -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 2**40}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "10"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": None}, "max_tokens"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["x"]}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x", "temperature": -0.1}, "temperature"),
        ({"prompt": "x", "temperature": 1e9}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "timeout_s": 0}, "timeout_s"),
        ({"prompt": "x", "keep_alive": -2}, "keep_alive"),
        ({"prompt": "x", "priority": "urgent"}, "priority"),
        ({"prompt": "x", "stop": [""]}, "stop[0]"),
        ({"prompt": "x", "stop": ["s"] * 17}, "stop"),
        ({"prompt": "x", "logit_bias": {"1": 1e6}}, "logit_bias[...]"),
        ({"prompt": "x", "model": ""}, "model"),
        ({"prompt": "x", "model": 5}, "model"),
        ({"prompt": "x", "temprature": 0.5}, "temprature"),
        ({"prompt": "x", "adapter": ""}, "adapter"),
        ({"prompt": "x", "draft_model": "a"}, "draft_model"),
    ],
)
def test_params_of_process(client: Client, params: dict, field: str) -> None:
    error = refused(client, "process", params)
    assert (error.kind, error.details["field"]) == ("invalid_params", field)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({}, "messages"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0].mood"),
        ({"messages": [None]}, "messages[0]"),
        (ASK | {"stream": "yes"}, "stream"),
        (ASK | {"tools": "clock"}, "tools"),
        (ASK | {"tools": [3]}, "tools[0]"),
        (ASK | {"tools": [{}] * 129}, "tools"),
        (ASK | {"tools": [{"name": "x" * 10_000_000}]}, "tools"),
        (ASK | {"tool_choice": "auto"}, "tool_choice"),
        (ASK | {"tools": [], "tool_choice": {"name": "clock"}}, "tool_choice"),
        (ASK | {"tools": [{}], "tool_choice": 3}, "tool_choice"),
        (ASK | {"thinking": False, "thinking_budget": 3}, "thinking_budget"),
        (ASK | {"thinking_budget": -1}, "thinking_budget"),
    ],
)
def test_params_of_chat(client: Client, params: dict, field: str) -> None:
    error = refused(client, "chat", params)
    assert error.kind == "invalid_params"
    assert error.details["field"] in (field, field.replace("[0]", "[...]"))


@pytest.mark.parametrize(
    "adapter", ["org/lora", "lora", "./lora", "../lora", "/no/such/folder", "/etc/passwd", "/", "a\nb", "mlxd/cleanup"]
)
def test_adapters_that_are_not_there(client: Client, adapter: str) -> None:
    for method, params in (("process", {"prompt": "x"}), ("chat", ASK), ("models.load", {"model": CLEANUP})):
        error = refused(client, method, {**params, "adapter": adapter})
        assert (error.kind, error.details["field"]) == ("model_not_found", "adapter")


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"schema": False}, "schema"),
        ({"schema": {}, "grammar": "start: /a/"}, "grammar"),
        ({"schema": {"description": "x" * 10_000_000}}, "schema"),
        ({"grammar": "x" * 300_000}, "grammar"),
        ({"schema": ["object"]}, "schema"),
        ({"grammar": ""}, "grammar"),
    ],
)
def test_rules_that_no_worker_is_asked_about(client: Client, params: dict, field: str) -> None:
    error = refused(client, "process", {"prompt": "x"} | params)
    assert (error.kind, error.details["field"]) == ("invalid_params", field)


def test_methods_that_do_not_exist_and_params_of_no_shape(client: Client) -> None:
    for name in ("models.drop", "", "process ", "__init__", "rpc.shutdown", "x" * 100_000):
        assert refused(client, name, {}).kind == "method_not_found"
    for params in ([], ["x"], "x", 5, None):
        assert refused(client, "process", params).kind == "invalid_params"
    for method, params in (
        ("ping", {"x": 1}), ("models.get", {}), ("models.release", {"lease": "none"}), ("jobs.get", {"job": "none"}),
        ("jobs.wait", {"job": ""}), ("jobs.cancel", {"job": 5}), ("cancel", {"id": None}), ("cancel", {"id": [1]}),
        ("events.subscribe", {"topics": ["weather"]}), ("events.subscribe", {"topics": []}),
        ("events.subscribe", {"since": {"epoch": "x"}}), ("events.unsubscribe", {"subscription": 99}),
        ("tokens.count", {}), ("tokens.count", {"text": "x", "messages": ASK["messages"]}), ("hello", {}),
        ("hello", {"protocol": [2, 1], "client": {"name": "x"}}),
    ):  # fmt: skip
        assert refused(client, method, params).kind in ("invalid_params", "not_found")


def test_a_lease_is_only_its_holders(daemon: Daemon) -> None:
    with daemon.client() as holder, daemon.client() as thief:
        lease = holder.acquire(CLEANUP)
        assert refused(thief, "models.release", {"lease": lease.lease}).kind == "not_found"
        assert holder.model(CLEANUP).leases == 1
        lease.release()
        holder.unload(CLEANUP)


# --- bytes --------------------------------------------------------------------------------------------------------


def connect(daemon: Daemon) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE_S)
    sock.connect(str(daemon.socket))
    return sock


def told(sock: socket.socket) -> bytes:
    """Everything until the daemon closes the connection."""
    parts = []
    try:
        while part := sock.recv(65_536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", MAX_FRAME_BYTES + 1),
        b"\xff" * 64,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        struct.pack(">I", 1_000_000) + b"\x81" * 1_000_000,
        b"{" * 100_000 + b"\n",
        b'{"jsonrpc": "2.0", "id": 1, "method": "ping"' + b" " * (MAX_FRAME_BYTES + 1),
        b'{"jsonrpc": "2.0", "id": 1, "method": "\xff"}\n',
        encode({"jsonrpc": "2.0", "id": 1, "method": "ping", "params": nested(MAX_DEPTH)}),
    ],
)
def test_bytes_that_are_no_frames_close_their_connection_with_an_error(daemon: Daemon, data: bytes) -> None:
    with connect(daemon) as sock, daemon.client() as other:
        try:
            sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was judged by its beginning
        assert b"parse_error" in told(sock)
        other.ping()


def test_a_frame_that_is_cut_off(daemon: Daemon) -> None:
    for cut in (1, 3, 4, 5, 30):
        with connect(daemon) as sock:
            sock.sendall(encode({"jsonrpc": "2.0", "id": 1, "method": "ping"})[:cut])
            sock.shutdown(socket.SHUT_WR)
            assert b"parse_error" in told(sock)
        with connect(daemon) as sock:
            sock.sendall(encode({"jsonrpc": "2.0", "id": 1, "method": "status"})[:cut])
    with daemon.client() as client:
        client.ping()


FRAMES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
METHODS = ["ping", "status", "models.list", "models.get", "jobs.list", "cancel", "events.subscribe", "hello", "chat"]
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | FRAMES,
        "id": st.integers(0, 9) | FRAMES,
        "method": st.sampled_from(METHODS) | FRAMES,
        "params": FRAMES | st.dictionaries(st.sampled_from(["model", "id", "messages", "topics"]), FRAMES),
        "extra": FRAMES,
    },
)


@given(st.lists(st.binary(min_size=1, max_size=200) | REQUESTS, min_size=1, max_size=8), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_bytes_and_frames(daemon: Daemon, parts: list[bytes | dict], lines: bool) -> None:
    """Whatever comes, the connection ends or answers, and the daemon serves the next one."""
    with connect(daemon) as sock:
        try:
            for part in parts:
                if isinstance(part, bytes):
                    sock.sendall(part)
                else:
                    sock.sendall(json.dumps(part).encode() + b"\n" if lines else encode(part))
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has closed
        try:
            sock.settimeout(0.05)  # a subscription rightly stays open
            told(sock)
        except TimeoutError:
            pass
    with daemon.client() as client:
        client.ping()


def test_and_it_is_as_before(client: Client, daemon: Daemon) -> None:
    status = client.status()
    assert (status.queue.waiting, status.queue.running, status.subscribers, status.models.loaded) == (0, 0, 0, 0)
    assert status.memory.used_bytes == 0
    assert [model.id for model in client.models()] == [CLEANUP]
