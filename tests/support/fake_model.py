"""Folders that the store takes for whole models, made in no time; only a bad_child can load them."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

from mlxd.store.folder import WORKER_BYTES

MIB = 1024 * 1024
# What the daemon counts any loaded model with, beside its weights.
BASE_BYTES = WORKER_BYTES


def files(weights_bytes: int, seed: int = 0) -> dict[str, bytes]:
    """The same as bytes by file name, with weights that are random by seed, so that no byte of them can be left out."""
    head = _header(weights_bytes)
    return {
        "config.json": json.dumps(_config(4096)).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": head + random.Random(seed).randbytes(weights_bytes),
    }


def build(folder: Path, *, weights_bytes: int = 0, context: int = 4096) -> str:
    """Write a model whose weights are a hole in a file. Returns the folder's real path, which is the model's id."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_config(context)))
    (folder / "tokenizer.json").write_text("{}")
    write_weights(folder / "model.safetensors", weights_bytes)
    return str(folder.resolve())


def write_weights(file: Path, size: int) -> None:
    head = _header(size)
    with open(file, "wb") as out:
        out.write(head)
        out.truncate(len(head) + size)


def _config(context: int) -> dict[str, object]:
    return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": context}


def _header(size: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header
