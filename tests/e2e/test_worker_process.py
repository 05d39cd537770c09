"""A real worker process on a real socketpair: frames in, frames out, and how it ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxd_client.codec import Decoder, Encoding, encode
from support import tiny_model

pytestmark = pytest.mark.model

TIMEOUT_S = 120.0
GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One private TMPDIR for all workers of this module, so that kernels are compiled once."""
    return tmp_path_factory.mktemp("kernels")


class Child:
    """The daemon's side of one worker."""

    def __init__(self, tmpdir: Path) -> None:
        ours, theirs = socket.socketpair()
        env = {**os.environ, "TMPDIR": str(tmpdir), "HF_TOKEN": "secret"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlxd.worker", "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        theirs.close()
        ours.settimeout(TIMEOUT_S)
        self.socket = ours
        self._decoder = Decoder(Encoding.MSGPACK)
        self._ids = iter(range(1, 1_000_000))

    def send(self, method: str, params: Any, *, request: bool = True) -> int:
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
        number = next(self._ids) if request else 0
        if request:
            message["id"] = number
        self.socket.sendall(encode(message))
        return number

    def frames(self) -> Iterator[dict[str, Any]]:
        while True:
            message = self._decoder.next()
            if message is None:
                data = self.socket.recv(65536)
                if not data:
                    return
                self._decoder.feed(data)
            else:
                assert isinstance(message, dict)
                yield message

    def until(self, what: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The first frame that `what` accepts, and all frames before it."""
        seen = []
        for frame in self.frames():
            if what(frame):
                return frame, seen
            seen.append(frame)
        raise AssertionError(f"the worker ended: {self.process.communicate(timeout=TIMEOUT_S)[1].decode()}")

    def reply(self, number: int) -> dict[str, Any]:
        return self.until(lambda frame: frame.get("id") == number)[0]

    def call(self, method: str, params: Any) -> dict[str, Any]:
        return self.reply(self.send(method, params))

    def end(self) -> int:
        self.socket.close()
        return self.process.wait(timeout=TIMEOUT_S)


@pytest.fixture
def child(kernels: Path) -> Iterator[Child]:
    made = Child(kernels)
    yield made
    made.socket.close()
    made.process.kill()
    made.process.communicate()


def ask(text: str, stream: bool = True, **options: Any) -> dict[str, Any]:
    return {"kind": "chat", "messages": [{"role": "user", "content": text}], "stream": stream, "options": options}


def load(child: Child, path: Path) -> dict[str, Any]:
    return child.call("load", {"model": "tiny", "path": str(path)})


def test_a_request_from_ready_to_its_result(child: Child, tiny: Path) -> None:
    first = next(child.frames())
    assert first["method"] == "ready"
    assert first["params"]["kind"] == "worker"
    assert first["params"]["pid"] == child.process.pid
    assert set(first["params"]["versions"]) >= {"mlx", "mlx-lm"}

    number = child.send("load", {"model": "tiny", "path": str(tiny)})
    reply, before = child.until(lambda frame: frame.get("id") == number)
    assert reply["result"]["context_length"] == 512
    assert reply["result"]["memory_bytes"] > 0
    assert "chat" in reply["result"]["capabilities"]
    progress = [frame["params"]["progress"] for frame in before if frame.get("method") == "progress"]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0

    number = child.send("generate", ask("hello", max_tokens=20, **GREEDY))
    reply, before = child.until(lambda frame: frame.get("id") == number)
    steps = [frame["params"]["pieces"] for frame in before if frame.get("method") == "step"]
    result = reply["result"]
    assert result["completion_tokens"] == 20
    assert result["finish_reason"] == "length"
    assert "".join(piece[1] for pieces in steps for piece in pieces) == result["text"]
    assert {piece[0] for pieces in steps for piece in pieces} == {number}
    assert 0 < result["timings"]["prompt_s"] <= result["timings"]["first_token_s"]
    assert result["timings"]["decode_s"] > 0

    text = child.call("count", {"text": "hello"})["result"]["tokens"]
    assert 0 < text < child.call("count", {"messages": [{"role": "user", "content": "hello"}]})["result"]["tokens"]


def test_one_step_frame_serves_all_streams(child: Child, tiny: Path) -> None:
    load(child, tiny)
    numbers = {child.send("generate", ask(f"question {n}", max_tokens=30, **GREEDY)) for n in range(4)}
    ended, together = set(), 0
    while ended != numbers:
        frame, before = child.until(lambda frame: frame.get("id") in numbers)
        ended.add(frame["id"])
        together += sum(len(f["params"]["pieces"]) > 1 for f in before if f.get("method") == "step")
    assert together > 10


def test_cancel_gives_what_was_said_so_far(child: Child, tiny: Path) -> None:
    load(child, tiny)
    number = child.send("generate", ask("go on", max_tokens=400, **GREEDY))
    child.until(lambda frame: frame.get("method") == "step")
    child.send("cancel", {"id": number}, request=False)
    result = child.reply(number)["result"]
    assert result["finish_reason"] == "cancelled"
    assert 0 < result["completion_tokens"] < 400


def test_heartbeats_come_from_idle_workers_too(child: Child, tiny: Path) -> None:
    child.until(lambda frame: frame.get("method") == "heartbeat")
    load(child, tiny)
    beat, _ = child.until(lambda frame: frame.get("method") == "heartbeat" and frame["params"].get("memory_bytes", 0))
    assert beat["params"].get("active", 0) == 0


def test_heartbeats_tell_how_many_tokens_were_made(child: Child, tiny: Path) -> None:
    load(child, tiny)
    made = sum(child.call("generate", ask("hello"))["result"]["completion_tokens"] for _ in range(2))
    beat, _ = child.until(lambda frame: frame.get("method") == "heartbeat" and frame["params"].get("made_tokens", 0))
    while beat["params"]["made_tokens"] < made:  # one may have come between the two
        beat, _ = child.until(lambda frame: frame.get("method") == "heartbeat")
    assert beat["params"]["made_tokens"] == made


def test_errors_are_typed_and_the_worker_goes_on(child: Child, tiny: Path) -> None:
    assert child.call("generate", ask("too early"))["error"]["data"]["kind"] == "load_failed"
    assert child.call("sing", {})["error"]["data"]["kind"] == "method_not_found"
    assert child.call("load", {"model": "x"})["error"]["data"]["kind"] == "invalid_params"
    broken = child.call("load", {"model": "x", "path": str(tiny / "missing")})
    assert broken["error"]["data"]["kind"] == "model_invalid"
    assert "result" in load(child, tiny)
    tool = {"type": "function", "function": {"name": "clock"}}
    assert child.call("generate", {**ask("x"), "tools": [tool]})["error"]["data"]["details"]["option"] == "tools"
    assert child.call("generate", ask("x", tools=[tool]))["error"]["data"]["details"]["field"] == "tools"
    assert child.call("generate", ask("x", schema={"not": {}}))["error"]["data"]["details"]["option"] == "schema"
    assert child.call("generate", ask("x", grammar="x"))["error"]["data"]["details"]["field"] == "grammar"
    assert child.call("generate", {"kind": "chat"})["error"]["data"]["kind"] == "invalid_params"
    assert child.call("generate", ask("fine", max_tokens=3, **GREEDY))["result"]["completion_tokens"] == 3


def test_a_truncated_model_is_refused(child: Child, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    error = load(child, tmp_path / "cut")["error"]
    assert error["data"]["kind"] == "model_invalid"
    assert "truncated" in error["message"]


@pytest.mark.parametrize("way", ["eof", "stop", "sigterm", "eof while decoding"])
def test_every_peaceful_end_is_code_0(child: Child, tiny: Path, way: str) -> None:
    next(child.frames())
    if way == "eof while decoding":
        load(child, tiny)
        child.send("generate", ask("go on", max_tokens=400, **GREEDY))
        child.until(lambda frame: frame.get("method") == "step")
    if way == "stop":
        child.send("stop", {}, request=False)
        assert child.process.wait(timeout=TIMEOUT_S) == 0
    elif way == "sigterm":
        child.process.send_signal(signal.SIGTERM)
        assert child.process.wait(timeout=TIMEOUT_S) == 0
    else:
        assert child.end() == 0


def test_ctrl_c_is_for_the_parent(child: Child) -> None:
    next(child.frames())
    child.process.send_signal(signal.SIGINT)
    assert child.call("sing", {})["error"]["data"]["kind"] == "method_not_found"


def test_garbage_ends_the_worker(child: Child) -> None:
    next(child.frames())
    child.socket.sendall(b"\x00\x00\x00\x01\xc1")
    assert child.process.wait(timeout=TIMEOUT_S) == 0


def test_an_idle_worker_writes_what_it_keeps(child: Child, kernels: Path, tiny: Path, tmp_path: Path) -> None:
    asked = ask("so i think we should meet on monday at 3 pm " * 14, max_tokens=4, **GREEDY)
    params = {
        "model": "tiny", "path": str(tiny), "cache_bytes": 1 << 26, "disk_cache": str(tmp_path / "cache" / "prompts"),
        "disk_cache_bytes": 1 << 26,
    }  # fmt: skip
    assert "result" in child.call("load", params)
    first = child.call("generate", asked)["result"]
    blocks = (first["prompt_tokens"] + 3) // 64
    assert blocks >= 4
    for _ in range(100):
        child.until(lambda frame: frame.get("method") == "heartbeat")
        if len(list(tmp_path.rglob("*.kv"))) == blocks:
            break
    child.process.kill()  # it need not be asked to go for that
    other = Child(kernels)
    try:
        other.call("load", params)
        again = other.call("generate", asked)["result"]
        assert again["text"] == first["text"]
        assert again["cached_tokens"] == (first["prompt_tokens"] - 1) // 64 * 64
        stats = other.call("cache", {})["result"]
        assert (stats["hits"], stats["disk_hits"], stats.get("disk_failures", 0)) == (1, 1, 0)
    finally:
        other.end()
