"""Hugging Face caches for tests: small models with true hashes, and processes that die at a step of one's choice."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from mlxd.store.layout import RepoCache

CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32, "max_position_embeddings": 512,
    "quantization": {"bits": 4, "group_size": 64},
}  # fmt: skip


def commit(letter: str) -> str:
    return letter * 40


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def tensors(fill: bytes, count: int = 16) -> bytes:
    """A safetensors file."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    return struct.pack("<Q", len(header)) + header + (fill * 4 * count)[: 4 * count]


def model_files(salt: str = "", shards: int = 2) -> dict[str, bytes]:
    """The files of a model. Weights differ with `salt`, but for the last shard; so does config.json."""
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    files = {name: tensors((salt or "x").encode()) for name in names}
    files[names[-1]] = tensors(b"shared")
    return files | {
        "config.json": json.dumps(CONFIG | {"salt": salt}).encode(),
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b'{"a": 1}',
        "model.safetensors.index.json": json.dumps({"weight_map": {f"t{n}": n for n in names}}).encode(),
    }


def oids(files: Mapping[str, bytes]) -> dict[str, str]:
    """Hashes as the hub gives them: weights are LFS files, the rest are git blobs."""
    return {name: sha256(data) if name.endswith(".safetensors") else git_oid(data) for name, data in files.items()}


def download(at: RepoCache, files: Mapping[str, bytes]) -> dict[str, str]:
    """Put the blobs of all files there as a fetcher does. Returns name to oid."""
    named = oids(files)
    for name, data in files.items():
        oid = named[name]
        if at.has_blob(oid, len(data)):
            continue
        fd = at.open_part(oid)
        assert fd is not None
        os.write(fd, data)
        at.complete(oid)
        os.close(fd)
    return named


def publish(cache: Path, repo: str, files: Mapping[str, bytes], at_commit: str, *refs: str) -> Path:
    """A whole model in the cache. Returns its snapshot."""
    at = RepoCache(cache, repo)
    at.publish(at_commit, download(at, files), refs=refs)
    return at.snapshot(at_commit)


# --- processes that die ---------------------------------------------------------------------------------------------

# What changes the disk, as CPython's audit events name it; all are raised before the deed.
DEEDS = ("os.rename", "os.remove", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.chmod")


def dies_at(step: int, work: Callable[[], object]) -> bool:
    """Do `work` in a process of its own that is killed (SIGKILL) before it changes the disk for the `step`th time.

    Returns: whether it was; False where it had ended before. What it raised fails the test.
    """

    def counting() -> None:
        left = step

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in DEEDS or (event == "open" and int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR)):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()

    status = os.waitstatus_to_exitcode(os.waitpid(in_a_process(counting), 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def in_a_process(work: Callable[[], object]) -> int:
    """Do `work` in a process of its own. Returns its pid; it exits with 1 where `work` raises, and says what."""
    pid = os.fork()
    if pid != 0:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
