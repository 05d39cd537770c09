"""An image of a request becomes pixels, or a typed error that names its part. Pillow decodes; no MLX here.

Files and bytes come from anywhere. What the header says is judged before anything is decoded, only formats that
everybody uses are tried, and nothing but a regular file is opened. Nothing is fetched.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import stat
import warnings
from dataclasses import dataclass
from typing import Any

from mlxd_client.errors import InvalidParams, RpcError, Unsupported

from ..childwire import MAX_IMAGES

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_BYTES = 20_000_000
# Of one image, and of all images of a request together: three bytes each, once decoded.
MAX_PIXELS = 40_000_000
MAX_ALL_PIXELS = 100_000_000


@dataclass(frozen=True, slots=True)
class Source:
    """Where an image is: a path or its bytes. `field` is its place in the request."""

    field: str
    path: str | None = None
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that was read: RGB, upright. `digest` is of its file's bytes."""

    field: str
    digest: bytes
    image: Any


def take_images(messages: list[dict[str, Any]], *, blind: str | None) -> tuple[list[dict[str, Any]], list[Source]]:
    """The turns as a chat template takes them, and the images that they bring.

    Turns without images are text alone. The others keep their parts; an image is `{"type": "image"}` there.

    Args:
        blind: why the model sees none; None where it does.

    Raises:
        InvalidParams: malformed parts, or too many images.
        Unsupported: images, where the model does not see, or not in this turn.
    """
    turns: list[dict[str, Any]] = []
    sources: list[Source] = []
    for number, turn in enumerate(messages):
        content = turn.get("content", "")
        if not isinstance(content, list):
            turns.append(turn)
            continue
        parts: list[dict[str, Any]] = []
        for place, part in enumerate(content):
            field = f"messages[{number}].content[{place}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
                continue
            sources.append(_source(field, kind, part))
            parts.append({"type": "image"})
        seen = any(part["type"] == "image" for part in parts)
        if seen and turn.get("role") != "user":
            raise Unsupported("images belong to user turns", option="messages", field=f"messages[{number}].content")
        turns.append({**turn, "content": parts if seen else "".join(part["text"] for part in parts)})
    if len(sources) > MAX_IMAGES:
        raise InvalidParams(f"a request brings {MAX_IMAGES} images at most", field=sources[MAX_IMAGES].field)
    if sources and blind is not None:
        raise Unsupported(f"{sources[0].field}: {blind}", option="messages", field=sources[0].field)
    return turns, sources


def read_pictures(sources: list[Source]) -> list[Picture]:
    """Read and decode. Takes as long as disks and pixels do.

    Raises:
        InvalidParams: no image, too large, or of no known format; details.field names it.
    """
    pictures: list[Picture] = []
    pixels = 0
    for source in sources:
        picture = read_picture(source)
        pixels += picture.image.width * picture.image.height
        if pixels > MAX_ALL_PIXELS:
            raise _bad(source, f"the images of a request have {MAX_ALL_PIXELS} pixels together at most")
        pictures.append(picture)
    return pictures


def read_picture(source: Source) -> Picture:
    data = source.data if source.data is not None else _read_file(source)
    if len(data) > MAX_BYTES:
        raise _bad(source, f"an image has {MAX_BYTES} bytes at most")
    try:
        image = _decode(source, data)
    except RpcError:
        raise
    except Exception as error:  # a decoder on bytes from anywhere raises nearly anything
        raise _bad(source, f"no image that can be read: {type(error).__name__}: {error}") from None
    return Picture(source.field, hashlib.sha256(data).digest(), image)


def _decode(source: Source, data: bytes) -> Any:
    from PIL import Image, ImageOps

    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata; the sizes that matter are checked here
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow stops at twice that what only turns up inside a file
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(source, image)
        if getattr(image, "is_animated", False):
            raise _bad(source, "an animation; an image has one frame")
        image.load()
        _check_size(source, image)
        return ImageOps.exif_transpose(image).convert("RGB")


def _check_size(source: Source, image: Any) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _bad(source, f"{image.width} by {image.height} pixels; an image has {MAX_PIXELS} at most")


def _read_file(source: Source) -> bytes:
    path = source.path or ""
    try:
        # Opening a device may do something: look first, and once more at what was opened.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _bad(source, "no regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _bad(source, "no regular file")
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise _bad(source, f"the file cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _source(field: str, kind: Any, part: Any) -> Source:
    if kind == "image":
        path, data = part.get("path"), part.get("data")
        if isinstance(path, str) and data is None and os.path.isabs(path):
            return Source(field, path=path)
        if isinstance(data, bytes) and path is None:
            return Source(field, data=data)
        raise InvalidParams(f"{field}: an image is either an absolute path or data", field=field)
    if kind == "image_url":
        url = part.get("image_url")
        return Source(field, data=_from_url(field, url.get("url") if isinstance(url, dict) else None))
    raise InvalidParams(f"{field}: a part is a text, or an image", field=field)


def _from_url(field: str, url: Any) -> bytes:
    """The bytes in a `data:` URL (RFC 2397), which must be base64."""
    head, comma, body = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not head[:5].lower() == "data:" or not head.lower().endswith(";base64"):
        raise InvalidParams(f"{field}: nothing is fetched; send a data: URL with base64, or a path", field=field)
    try:
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error):
        raise InvalidParams(f"{field}: the data: URL holds no base64", field=field) from None


def _bad(source: Source, what: str) -> InvalidParams:
    return InvalidParams(f"{source.field}: {what}", field=source.field)
