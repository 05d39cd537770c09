"""Batches that are larger than a frame: items in frames that the daemon takes without ever holding all. No IO."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from .errors import InvalidParams, ModelInvalid, ModelNotDownloaded, ModelNotFound, Unsupported
from .types import BatchItem

__all__ = ["FRAME_BYTES", "FRAME_ITEMS", "REFUSED", "AnyItem", "frames", "item"]

AnyItem = BatchItem | Mapping[str, Any]
# Small beside what the daemon itself takes, and large enough that a commit each does not matter.
FRAME_ITEMS, FRAME_BYTES = 250, 512 * 1024
# What the daemon says of items that it will never take.
REFUSED = (InvalidParams, Unsupported, ModelNotFound, ModelInvalid, ModelNotDownloaded)


def item(given: AnyItem, index: int) -> BatchItem:
    """One item as a struct. Raises InvalidParams that names it by its place among all."""
    try:
        return msgspec.convert(given, BatchItem)  # type: ignore[no-any-return]
    except msgspec.ValidationError as error:
        raise InvalidParams(f"items[{index}]: {error}", field=f"items[{index}]") from None


def frames(items: Iterable[AnyItem]) -> Iterator[list[BatchItem]]:
    """All items in their order, some at a time. Raises InvalidParams at what is none, and where there are none."""
    frame: list[BatchItem] = []
    size = 0
    for index, given in enumerate(items):
        made = item(given, index)
        length = len(msgspec.msgpack.encode(made))
        if frame and (len(frame) == FRAME_ITEMS or size + length > FRAME_BYTES):
            yield frame
            frame, size = [], 0
        frame.append(made)
        size += length
    if not frame:
        raise InvalidParams("there are no items", field="items")
    yield frame
