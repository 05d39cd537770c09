"""A conversation as a client of protocol 1 has it, in both encodings: recorded once, and held up to later daemons.

    python tests/support/protocol.py FOLDER     records anew, with the mlxd that is on PYTHONPATH

What was recorded with an older mlxd stays as it is: it is what clients out there send, and what they can read.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from mlxd_client import codec
from mlxd_client.codec import Decoder, Encoding
from support.daemon import PATIENCE_S, Daemon

MODEL = "mlxd/cleanup"
REQUESTS: list[tuple[str, dict[str, Any] | None]] = [
    ("hello", {"protocol": [1, 1], "client": {"name": "an older app", "version": "0.1.0"}}),
    ("ping", None),
    ("status", {}),
    ("models.list", None),
    ("models.get", {"model": MODEL}),
    ("events.subscribe", {"topics": ["models", "jobs"]}),
    ("models.load", {"model": MODEL, "keep_alive": 60}),
    ("models.acquire", {"model": MODEL}),
    ("process", {"prompt": "all is well", "model": MODEL, "temperature": 0, "max_tokens": 20}),
    ("process", {"prompt": "one two three", "stream": True, "priority": "batch"}),
    ("chat", {"messages": [{"role": "user", "content": "so it is"}], "seed": 7, "stop": ["#"]}),
    ("tokens.count", {"text": "how many are there"}),
    ("models.get", {"model": "nobody/knows-it"}),
    ("process", {"prompt": "x", "temperature": "hot"}),
    ("process", {"prompt": "x", "unheard_of": 1}),
    ("models.dance", {}),
    ("jobs.list", None),
    ("jobs.get", {"job": "download-0-0"}),
    ("cancel", {"id": 99}),
    ("cache.list", None),
    ("models.catalog", None),
    ("models.unload", {"model": "nobody/knows-it"}),
    ("models.release", {"lease": "none"}),
    ("events.unsubscribe", {"subscription": 99}),
    ("shutdown", {}),
]


def frames(encoding: Encoding) -> list[bytes]:
    """What the client sends, one frame for each request, with ids from 1 on."""
    made = []
    for number, (method, params) in enumerate(REQUESTS, 1):
        message: dict[str, Any] = {"jsonrpc": "2.0", "id": number, "method": method}
        made.append(codec.encode(message if params is None else message | {"params": params}, encoding))
    return made


def talk(daemon: Daemon, sent: list[bytes], encoding: Encoding) -> list[dict[str, Any]]:
    """Send the frames, each after the answer to the one before; all that the daemon says meanwhile."""
    heard: list[dict[str, Any]] = []
    decoder = Decoder(encoding)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(str(daemon.socket))
        for number, frame in enumerate(sent, 1):
            sock.sendall(frame)
            while not any(message.get("id") == number for message in heard):
                data = sock.recv(65_536)
                assert data, f"hung up on instead of an answer to {frame!r}"
                decoder.feed(data)
                for message in decoder:
                    assert isinstance(message, dict), message
                    heard.append(message)
    return heard


def daemon() -> Daemon:
    return Daemon(bad_child="worker")


def record(folder: Path) -> None:
    """Write what is sent as bytes, and what is heard as JSON, a message a line."""
    for encoding, name in ((Encoding.JSON, "json"), (Encoding.MSGPACK, "msgpack")):
        sent = frames(encoding)
        with daemon() as one:
            heard = talk(one, sent, encoding)
        (folder / f"sent.{name}").write_bytes(b"".join(sent))
        lines = [json.dumps(msgspec.to_builtins(message), sort_keys=True) for message in heard]
        (folder / f"heard.{name}.jsonl").write_text("\n".join(lines) + "\n")


def split(data: bytes, encoding: Encoding) -> list[bytes]:
    """The recorded bytes, by frame."""
    if encoding is Encoding.JSON:
        return data.splitlines(keepends=True)
    made = []
    while data:
        size = 4 + int.from_bytes(data[:4], "big")
        made.append(data[:size])
        data = data[size:]
    return made


if __name__ == "__main__":
    record(Path(sys.argv[1]))
