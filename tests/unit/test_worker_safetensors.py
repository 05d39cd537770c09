"""Headers of safetensors files: whole ones pass, every broken one is refused before anything maps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd.store.safetensors import SafetensorsError, check_safetensors


def write(path: Path, header: Any, data_bytes: int, *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data_bytes))
    return path


def tensor(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_a_sound_file(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "mlx"},
        "a": tensor([2, 3], 0, 24),
        "b": tensor([4], 24, 32, "F16"),
        "none": tensor([0], 32, 32),
    }
    assert check_safetensors(write(tmp_path / "x", header, 32)) == 32


@pytest.mark.parametrize(
    ("header", "data_bytes", "length", "word"),
    [
        ({"a": tensor([2, 3], 0, 24)}, 20, None, "truncated"),
        ({"a": tensor([2, 3], 0, 24)}, 24, 10_000, "truncated"),
        ({}, 0, 2**63, "over the limit"),
        (b"{nope", 0, None, "no JSON"),
        (b"[" * 100_000, 0, None, "no JSON"),
        (b"[]", 0, None, "object"),
        ({"a": 3}, 0, None, "description"),
        ({"a": tensor([2], 0, 8, "X9")}, 8, None, "type"),
        ({"a": tensor([-2], 0, 8)}, 8, None, "shape"),
        ({"a": tensor([True], 0, 4)}, 8, None, "shape"),
        ({"a": tensor([2], 8, 0)}, 8, None, "cannot fill"),
        ({"a": tensor([3], 0, 8)}, 8, None, "cannot fill"),
        ({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, 12, None, "overlaps"),
    ],
)
def test_a_broken_file(tmp_path: Path, header: Any, data_bytes: int, length: int | None, word: str) -> None:
    with pytest.raises(SafetensorsError, match=word):
        check_safetensors(write(tmp_path / "x", header, data_bytes, length=length))


@given(raw=st.binary(max_size=64))
def test_any_bytes_are_judged(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(raw)
    try:
        check_safetensors(path)
    except SafetensorsError:
        pass
