"""Images from anywhere: what is read, and what is refused by the name of its part, before it costs anything."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxd.childwire import MAX_IMAGES
from mlxd.worker import images
from mlxd.worker.images import MAX_BYTES, Source, read_picture, read_pictures, take_images
from mlxd_client.errors import InvalidParams, RpcError, Unsupported

Image = pytest.importorskip("PIL.Image")

BLIND = "it sees nothing"
FIELD = "messages[0].content[1]"


def encoded(form: str = "PNG", size: tuple[int, int] = (6, 4), mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    large = size[0] * size[1] > 1_000_000
    made = Image.new("1", size) if large else Image.linear_gradient("L").resize(size)
    (made if made.mode == mode else made.convert(mode)).save(file, form, **options)
    return file.getvalue()


def animated(form: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (0, 100, 200)]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes that would be so many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_path_is_its_bytes(form: str, tmp_path: Path) -> None:
    data = encoded(form)
    (tmp_path / "picture").write_bytes(data)  # what it is, its bytes say
    from_path = read_picture(Source(FIELD, path=str(tmp_path / "picture")))
    from_bytes = read_picture(Source(FIELD, data=data))
    assert from_path.digest == from_bytes.digest
    assert from_path.image.mode == "RGB"
    assert from_path.image.size == (6, 4)
    assert from_path.image.tobytes() == from_bytes.image.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert read_picture(Source(FIELD, data=encoded(mode=mode))).image.mode == "RGB"


def test_a_photograph_is_turned_upright() -> None:
    sideways = Image.Exif()
    sideways[0x0112] = 6  # orientation: turn by a quarter
    picture = read_picture(Source(FIELD, data=encoded("JPEG", exif=sideways)))
    assert picture.image.size == (4, 6)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "text": lambda: b"this is no image at all",
    "cut short": lambda: encoded(size=(64, 64))[:-30],
    "cut to its header": lambda: encoded("JPEG", size=(64, 64))[:40],
    "corrupt": lambda: encoded(size=(64, 64)).replace(b"IDAT", b"IDAX"),
    "a bomb": lambda: png_that_claims(10_000, 10_000),
    "a larger bomb": lambda: png_that_claims(2**31 - 1, 2**31 - 1),
    "100 megapixels": lambda: encoded(size=(10_000, 10_000), mode="1"),
    "animated GIF": lambda: animated("GIF"),
    "animated WebP": lambda: animated("WEBP"),
    "animated PNG": lambda: animated("PNG"),
    "another format": lambda: encoded("TIFF"),
    "a script": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "too many bytes": lambda: encoded() + bytes(MAX_BYTES),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_sound_image_is_refused_by_name(name: str, tmp_path: Path) -> None:
    data = HOSTILE[name]()
    (tmp_path / "picture").write_bytes(data)
    for source in (Source(FIELD, data=data), Source(FIELD, path=str(tmp_path / "picture"))):
        with pytest.raises(InvalidParams) as refused:
            read_picture(source)
        assert refused.value.details["field"] == FIELD
        assert FIELD in refused.value.message


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (
        "/dev/zero",
        "/dev/stdin",
        *(str(tmp_path / name) for name in ("", "fifo", "link", "nowhere", "loop")),
    ):
        with pytest.raises(InvalidParams) as refused:
            read_picture(Source(FIELD, path=path))
        assert refused.value.details["field"] == FIELD
    for path in (str(tmp_path / "missing"), "/\0", "/" + 5000 * "x"):
        with pytest.raises(InvalidParams):
            read_picture(Source(FIELD, path=path))


def test_a_link_to_an_image_is_that_image(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(encoded())
    (tmp_path / "link").symlink_to(tmp_path / "picture")
    assert read_picture(Source(FIELD, path=str(tmp_path / "link"))).image.size == (6, 4)


def test_all_images_of_a_request_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_ALL_PIXELS", 3 * 24)
    sources = [Source(f"messages[0].content[{number}]", data=encoded()) for number in range(4)]
    assert len(read_pictures(sources[:3])) == 3
    with pytest.raises(InvalidParams) as refused:
        read_pictures(sources)
    assert refused.value.details["field"] == "messages[0].content[3]"


# --- parts ----------------------------------------------------------------------------------------------------------


def turn(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


TEXT = {"type": "text", "text": "what is this?"}
IMAGE = {"type": "image", "data": b"..."}
URL = "data:image/png;base64," + base64.b64encode(b"...").decode()


def test_turns_of_texts_alone_are_text_for_any_model() -> None:
    turns, sources = take_images(
        [turn(TEXT, {"type": "text", "text": " go on"}), {"role": "user", "content": "x"}], blind=BLIND
    )
    assert [turn["content"] for turn in turns] == ["what is this? go on", "x"]
    assert sources == []


def test_parts_keep_their_order() -> None:
    url = {"type": "image_url", "image_url": {"url": URL}}
    turns, sources = take_images([turn(TEXT, IMAGE, TEXT, url)], blind=None)
    assert [part["type"] for part in turns[0]["content"]] == ["text", "image", "text", "image"]
    assert [(source.field, source.data) for source in sources] == [
        ("messages[0].content[1]", b"..."),
        ("messages[0].content[3]", b"..."),
    ]


@pytest.mark.parametrize(
    "part",
    [
        "text",
        {},
        {"type": "video"},
        {"type": "text"},
        {"type": "text", "text": 1},
        {"type": "image"},
        {"type": "image", "path": "relative.png"},
        {"type": "image", "path": "/a", "data": b"b"},
        {"type": "image", "data": "text"},
        {"type": "image_url", "image_url": URL},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "data:image/png,plain"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,???"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64"}},
    ],
)
def test_a_malformed_part_is_refused_by_name(part: Any) -> None:
    with pytest.raises(InvalidParams) as refused:
        take_images([turn(TEXT, part)], blind=None)
    assert refused.value.details["field"] == FIELD


@pytest.mark.parametrize(
    ("turns", "sees", "error"),
    [
        ([turn(IMAGE)], False, Unsupported),
        ([turn(IMAGE, role="system"), turn(TEXT)], True, Unsupported),
        ([turn(IMAGE, role="assistant")], True, Unsupported),
        ([turn(*[IMAGE] * (MAX_IMAGES + 1))], True, InvalidParams),
    ],
)
def test_images_where_they_cannot_be(turns: list[dict[str, Any]], sees: bool, error: type[RpcError]) -> None:
    with pytest.raises(error) as refused:
        take_images(turns, blind=None if sees else BLIND)
    assert refused.value.details["field"].startswith("messages[0].content")
