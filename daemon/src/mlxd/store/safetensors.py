"""Whether a safetensors file is whole and sound, judged by its header alone. Standard library only; reads no weights.

The format: 8 bytes of little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16

# Bits of one element.
DTYPES: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


class SafetensorsError(ValueError):
    """The file is truncated or no safetensors file; the message says how, without the path."""


def check_safetensors(path: Path | str) -> int:
    """Check the header against the file's size and itself.

    Returns: how many bytes of tensor data the file holds.

    Raises:
        SafetensorsError: truncated, malformed, or tensors that overlap, leave gaps or reach outside the file.
        OSError: the file cannot be read.
    """
    header, data_bytes = _read(path)
    spans = sorted(_span(name, entry) for name, entry in header.items() if name != "__metadata__")
    end = 0
    for start, stop, name in spans:
        if stop > data_bytes:
            raise SafetensorsError(f"truncated: tensor {name!r} ends at byte {stop} of {data_bytes}")
        if start < end:
            raise SafetensorsError(f"tensor {name!r} overlaps another")
        end = stop
    return data_bytes


def tensor_types(path: Path | str) -> dict[str, str]:
    """The type of each tensor, by name, as the header says. Raises SafetensorsError, OSError."""
    header, _ = _read(path)
    return {name: str(entry.get("dtype")) for name, entry in header.items() if isinstance(entry, dict)}


def _read(path: Path | str) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes of data follow it."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise SafetensorsError("shorter than the eight bytes of its header length")
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise SafetensorsError(f"a header of {header_bytes} bytes is over the limit of {MAX_HEADER_BYTES}")
        if 8 + header_bytes > size:
            raise SafetensorsError(f"truncated: the header says {header_bytes} bytes, the file has {size}")
        return _parse(file.read(header_bytes)), size - 8 - header_bytes


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise SafetensorsError("its header is no JSON object")
    return header


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """(first byte, byte after the last, name) of one tensor, checked against its shape and type."""
    if not isinstance(entry, dict):
        raise SafetensorsError(f"tensor {name!r} has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SafetensorsError(f"tensor {name!r} has the unknown type {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_natural, shape)):
        raise SafetensorsError(f"tensor {name!r} has no sound shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise SafetensorsError(f"tensor {name!r} has no sound offsets")
    elements = 1
    for dimension in shape:
        elements *= dimension
    start, stop = offsets
    if (stop - start) * 8 != elements * DTYPES[dtype]:
        raise SafetensorsError(f"tensor {name!r} of shape {shape} and type {dtype} cannot fill {stop - start} bytes")
    return start, stop, name


def _natural(value: Any) -> bool:
    return type(value) is int and value >= 0
