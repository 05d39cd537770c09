"""Conversations for a live daemon: sound requests of every method, and what is done to them."""

from __future__ import annotations

import copy
import random
from typing import Any

import msgspec

from mlxd_client.codec import Encoding, encode

from .codec_inputs import mutated_bytes

__all__ = ["Line", "Talk", "changed", "invented"]

MODEL = "mlxd/cleanup"
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
# Never `shutdown`, which ends the daemon as it should.
SAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("hello", {"protocol": [1, 1], "client": {"name": "fuzz", "version": "1"}}),
    ("ping", {}),
    ("status", {}),
    ("rpc.discover", {}),
    ("models.list", {"updates": False}),
    ("models.get", {"model": MODEL}),
    ("models.load", {"model": MODEL, "keep_alive": 60, "prewarm": "Be brief."}),
    ("models.unload", {"model": MODEL}),
    ("models.acquire", {"model": MODEL}),
    ("models.release", {"lease": "lease-1"}),
    ("models.plan", {"model": MODEL, "context_length": 512}),
    ("models.download", {"model": "org/none", "revision": "main"}),
    ("models.delete", {"model": "org/none"}),
    ("models.verify", {"model": "org/none"}),
    ("models.catalog", {}),
    ("cache.list", {}),
    ("cache.clear", {"model": MODEL}),
    ("jobs.list", {}),
    ("jobs.get", {"job": "download-1"}),
    ("jobs.wait", {"job": "load-1"}),
    ("jobs.cancel", {"job": "load-1"}),
    ("process", {"prompt": "um so hello", "stream": True, "max_tokens": 4, "temperature": 0.0}),
    ("process", {"prompt": "!slow 5", "stream": True, "timeout_s": 5}),
    ("process", {"prompt": "a", "schema": {"type": "object"}, "stop": ["b"], "logit_bias": {"1": 2.0}, "n": 2}),
    ("process", {"prompt": "!error", "priority": "batch", "seed": 1, "top_p": 0.5, "thinking": False}),
    ("chat", {"messages": TURNS, "stream": True, "context_policy": "drop_oldest", "kv_bits": 8, "logprobs": 2}),
    ("chat", {"messages": TURNS, "tools": [TOOL], "tool_choice": "required"}),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "grammar": "start: /a/"}),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image", "data": "iVBORw0KGgo="}]}]}),
    ("tokens.count", {"messages": TURNS, "tools": [TOOL]}),
    ("tokens.count", {"text": "how many"}),
    ("tokens.encode", {"text": "some text", "special": True, "pieces": True}),
    ("tokens.decode", {"tokens": [65, 66, 67]}),
    ("embed", {"input": ["a", "b"], "encoding": "base64", "dimensions": 1, "timeout_s": 5}),
    ("cancel", {"id": 1}),
    ("events.subscribe", {"topics": ["models", "jobs", "queue"], "models": [MODEL]}),
    ("events.subscribe", {"since": {"epoch": "x", "rev": 0}}),
    ("events.unsubscribe", {"subscription": 1}),
]
# What makes a process start, which takes longer than all else.
COSTLY = ("models.unload", "models.download")
DEEP: Any = "deep"
for _ in range(70):
    DEEP = [DEEP]
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**53 + 1, -(2**63), 2**64 - 1, 0.0, -0.0, 1.5, 1e308, float("inf"),
    float("nan"), "", "x", "x" * 300, "x" * 5000, "\x00", "\ud7ff", "a\nb", "../..", "/", "~", "none", "auto", MODEL,
    "org/none", "mlxd/", "!slow 2", "load-1", "lease-1", "1", [], {}, [[]], [None], ["x"] * 40, {"": None}, {"a": {}},
    DEEP, b"\xff\xfe", b"",
]  # fmt: skip
IDS: list[Any] = [0, 1, 2, 3, -1, 2**53, "a", "b", "", "x" * 256, "x" * 257, None, True, 1.5, [1], {"a": 1}]
MOST_FRAMES, MOST_LINES = 48, 4


class Line(msgspec.Struct):
    """What one connection sends.

    Attributes:
        json: JSON lines rather than msgpack frames.
        frames: messages (maps, encoded as they are), or the bytes of a body.
        cut: so many bytes at the end are not sent.
        finish: it says that nothing more will come, and waits; else it hangs up once it has its answers.
    """

    json: bool
    frames: list[Any]
    cut: int = 0
    finish: bool = False

    def data(self) -> bytes:
        parts = [self._framed(frame) for frame in self.frames]
        data = b"".join(parts)
        return data[: len(data) - self.cut] if self.cut else data

    def _framed(self, frame: Any) -> bytes:
        if isinstance(frame, bytes):
            return frame + b"\n" if self.json else len(frame).to_bytes(4, "big") + frame
        return encode(frame, Encoding.JSON if self.json else Encoding.MSGPACK)


class Talk(msgspec.Struct):
    """One input: connections that are open at the same time."""

    lines: list[Line]

    @property
    def frames(self) -> int:
        return sum(len(line.frames) for line in self.lines)


def invented(draw: random.Random) -> Talk:
    """A conversation that comes from no other: sound, but for a few frames."""
    lines = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        frames = [_request(draw, number) for number in range(draw.randrange(1, MOST_FRAMES))]
        lines.append(Line(draw.random() < 0.4, frames, finish=draw.random() < 0.5))
    talk = Talk(lines)
    return _changed_once(draw, talk, talk) if draw.random() < 0.8 else talk


def changed(draw: random.Random, talk: Talk, other: Talk) -> Talk:
    """A conversation with some of it changed, or taken from another."""
    made = copy.deepcopy(talk)
    for _ in range(draw.choice((1, 1, 2, 3, 6))):
        _changed_once(draw, made, other)
    return made


def _request(draw: random.Random, number: int) -> dict[str, Any]:
    method, params = draw.choice(SAMPLES)
    if method in COSTLY and draw.random() < 0.8:
        method, params = draw.choice(SAMPLES)
    message: dict[str, Any] = {"jsonrpc": "2.0", "id": number, "method": method, "params": copy.deepcopy(params)}
    if draw.random() < 0.05:
        message["id"] = draw.choice(IDS)
    if draw.random() < 0.3:
        _worsen(draw, message)
    return message


def _changed_once(draw: random.Random, talk: Talk, other: Talk) -> Talk:
    """Numbered: 0 lines, 1 a line's flags, 2 to 4 the order of frames, 5 and 6 one frame's bytes, else its content."""
    line = draw.choice(talk.lines)
    frames = line.frames
    at = draw.randrange(len(frames))
    match draw.randrange(12):
        case 0 if len(talk.lines) < MOST_LINES:
            talk.lines.append(copy.deepcopy(draw.choice(other.lines)))
        case 1:
            line.json, line.finish = draw.random() < 0.5, draw.random() < 0.5
            line.cut = draw.choice((0, 0, 1, 3, 5, 17))
        case 2 if len(frames) > 1:
            del frames[at]
        case 3:
            frames[at:at] = copy.deepcopy(draw.choice(other.lines).frames[: draw.randrange(1, 9)])
        case 4:
            frames[at:at] = [copy.deepcopy(frames[at])] * draw.randrange(1, 4)
        case 5 | 6 if draw.random() < 0.3:  # it may end the connection, and what comes after is not seen
            body = frames[at] if isinstance(frames[at], bytes) else _body(frames[at], line.json)
            frames[at] = mutated_bytes(draw, bytearray(body), draw.choice((1, 1, 2, 4)), line.json)
        case _:
            if isinstance(frames[at], dict):
                _worsen(draw, frames[at])
            else:
                frames[at] = _request(draw, at)
    del frames[MOST_FRAMES:]
    return talk


def _body(frame: Any, json: bool) -> bytes:
    data = encode(frame, Encoding.JSON if json else Encoding.MSGPACK)
    return data[:-1] if json else data[4:]


def _worsen(draw: random.Random, message: dict[str, Any]) -> None:
    """Change one thing about a message, mostly about its parameters."""
    params = message.get("params")
    match draw.randrange(9):
        case 0:
            message["id"] = draw.choice(IDS)
        case 1:
            message["method"] = draw.choice([*(name for name, _ in SAMPLES), "", "x" * 99, "models.drop"])
        case 2:
            message[draw.choice(("jsonrpc", "id", "method", "params", "extra"))] = draw.choice(HOSTILE)
        case 3:
            message.pop(draw.choice(("jsonrpc", "id", "method", "params")), None)
        case 4 if isinstance(params, dict):
            params |= copy.deepcopy(draw.choice(SAMPLES)[1])
        case _ if isinstance(params, dict | list) and params:
            _replace_within(draw, params)
        case _:
            message["params"] = copy.deepcopy(draw.choice(SAMPLES)[1])


def _replace_within(draw: random.Random, value: Any) -> None:
    """Put something else in the place of one value, at any depth."""
    while True:
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        inner = value[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.7:
            value = inner
            continue
        if draw.random() < 0.1:
            del value[key]
        else:
            value[key] = copy.deepcopy(draw.choice(HOSTILE))
        return
