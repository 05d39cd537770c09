"""Images through a real daemon: from a client's hand to a worker's answer, and what is refused on the way."""

from __future__ import annotations

import base64
import io
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from mlxd_client import image
from mlxd_client.errors import InvalidParams, RpcError, Unsupported
from support import tiny_vision
from support.daemon import Daemon

pytest.importorskip("mlx_vlm")
Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 10}


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 50), color).save(file, "PNG")
    return file.getvalue()


def as_json(daemon: Daemon, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """The answer to one line of JSON."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(daemon.socket))
        line = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        connection.sendall(line.encode() + b"\n")
        with connection.makefile("rb") as answers:
            return json.loads(answers.readline())  # type: ignore[no-any-return]


def test_images_through_a_daemon(tmp_path: Path) -> None:
    model = str(tiny_vision.build(tmp_path / "sees"))
    (tmp_path / "red.png").write_bytes(png("red"))
    (tmp_path / "notes.txt").write_text("no image")
    turn = {"role": "user", "content": ["what is ", image(tmp_path / "red.png")]}
    with Daemon() as daemon, daemon.client() as client:
        by_path = client.chat([turn], model=model, **GREEDY)
        by_bytes = client.chat([{"role": "user", "content": ["what is ", image(png("red"))]}], model=model, **GREEDY)
        other = client.chat([{"role": "user", "content": ["what is ", image(png("blue"))]}], model=model, **GREEDY)
        assert by_path.text == by_bytes.text != other.text
        assert by_bytes.usage.cached_tokens > 0
        with client.stream_chat([turn], model=model, **GREEDY) as stream:
            assert "".join(stream) == by_path.text

        content = [
            {"type": "text", "text": "what is "},
            {"type": "image", "data": base64.b64encode(png("red")).decode()},
        ]
        params = {"model": model, "messages": [{"role": "user", "content": content}], **GREEDY}
        assert as_json(daemon, "chat", params)["result"]["text"] == by_path.text
        url = "data:image/png;base64," + base64.b64encode(png("red")).decode()
        content[1] = {"type": "image_url", "image_url": {"url": url}}  # type: ignore[dict-item]
        assert as_json(daemon, "chat", params)["result"]["text"] == by_path.text

        for path in (tmp_path / "notes.txt", tmp_path / "missing.png", tmp_path, Path("/dev/zero")):
            refused = refusal(client, ["what is ", image(path)], model)
            assert isinstance(refused, InvalidParams)
            assert refused.details["field"] == "messages[0].content[1]"
        assert client.chat([turn], model=model, **GREEDY).text == by_path.text

        blind = refusal(client, turn["content"], "mlxd/cleanup")  # type: ignore[arg-type]
        assert isinstance(blind, Unsupported)
        assert blind.details["option"] == "messages"


def refusal(client: Any, content: list[Any], model: str) -> RpcError:
    with pytest.raises(RpcError) as refused:
        client.chat([{"role": "user", "content": content}], model=model, **GREEDY)
    return refused.value


def test_what_is_refused_before_a_model_is_loaded() -> None:
    with Daemon(bad_child="fine") as daemon, daemon.client() as client:
        for part in (
            {"type": "image", "path": "relative.png"},
            {"type": "image"},
            {"type": "image", "path": "/a.png", "data": b"b"},
            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,aa", "detail": "high"}},
            {"type": "video", "path": "/a.mp4"},
            {"type": "text"},
        ):
            refused = refusal(client, ["what is ", part], "mlxd/cleanup")
            assert isinstance(refused, InvalidParams), part
            assert refused.details["field"].startswith("messages[0].content"), part
        many = refusal(client, [image(b"x")] * 17, "mlxd/cleanup")
        assert many.details["field"] == "messages[0].content[16]"
        assert client.status().models.loaded == 0
