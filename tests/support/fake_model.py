"""Folders that the store takes for whole models, made in no time; only a bad_child can load them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from mlxd.store.folder import WORKER_BYTES

MIB = 1024 * 1024
# What the daemon counts any loaded model with, beside its weights.
BASE_BYTES = WORKER_BYTES


def build(folder: Path, *, weights_bytes: int = 0, context: int = 4096) -> str:
    """Write a model whose weights are a hole in a file. Returns the folder's real path, which is the model's id."""
    folder.mkdir(parents=True)
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": context}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    write_weights(folder / "model.safetensors", weights_bytes)
    return str(folder.resolve())


def write_weights(file: Path, size: int) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + size)
