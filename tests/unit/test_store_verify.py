"""Verification: every kind of rot is found and named, and what is right is left alone."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd.store.layout import RepoCache
from mlxd.store.verify import Hasher, check_bytes, oid_kind, verify_snapshot
from mlxd_client.types import BadFile
from support.hubcache import commit, git_oid, model_files, oids, publish, sha256, tensors

SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4), st.booleans())
def test_a_hasher_takes_any_pieces(data: bytes, cuts: list[int], lfs: bool) -> None:
    oid = sha256(data) if lfs else git_oid(data)
    hasher = Hasher(oid, len(data))
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        assert not hasher.matches() or hasher.done == len(data)
        hasher.update(memoryview(data)[start:end])
    assert hasher.matches()
    hasher.update(b"x")
    assert not hasher.matches()


def test_kinds() -> None:
    assert (oid_kind("a" * 40), oid_kind("a" * 64)) == ("git-sha1", "sha256")
    assert [oid_kind(oid) for oid in ("", "a" * 41, "A" * 40, "g" * 64, "../x")] == [None] * 5
    with pytest.raises(ValueError):
        Hasher("nothing", 1)


def test_check_bytes(tmp_path: Path) -> None:
    data = os.urandom(3 * 2**20 + 7)
    (tmp_path / "x").write_bytes(data)
    seen: list[int] = []
    assert check_bytes(tmp_path / "x", sha256(data), len(data), seen.append) is None
    assert sum(seen) == len(data)
    assert check_bytes(tmp_path / "x", git_oid(data), len(data)) is None
    assert check_bytes(tmp_path / "x", sha256(data), len(data) + 1) == "size"
    assert check_bytes(tmp_path / "x", "0" * 64, len(data)) == "hash"
    assert check_bytes(tmp_path / "y", "0" * 64, 1) == "missing"
    assert check_bytes(tmp_path / "x" / "y", "0" * 64, 1) == "missing"
    assert check_bytes(tmp_path, "0" * 64, 1) == "missing"
    os.mkfifo(tmp_path / "pipe")
    assert check_bytes(tmp_path / "pipe", "0" * 64, 1) == "missing"


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return publish(tmp_path / "hub", "org/m", model_files() | {"sub/x.json": b"[]"}, commit("a"), "main")


def test_what_is_right_is_left_alone(snapshot: Path) -> None:
    seen: list[int] = []
    assert verify_snapshot(snapshot, seen.append) == []
    assert seen == sorted(seen)
    assert seen[-1] == sum(path.stat().st_size for path in snapshot.rglob("*") if path.is_file())


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.resolve().write_bytes(data)


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


ROT: list[tuple[Callable[[Path], object], str, str]] = [
    (lambda s: flip(s / SHARD), SHARD, "hash"),
    (lambda s: flip(s / SHARD, 0), SHARD, "hash"),
    (lambda s: flip(s / "tokenizer_config.json"), "tokenizer_config.json", "hash"),
    (lambda s: flip(s / "sub/x.json"), "sub/x.json", "hash"),
    (lambda s: os.truncate(s / SHARD, 100), SHARD, "hash"),
    (lambda s: os.truncate(s / "config.json", 0), "config.json", "hash"),
    (lambda s: (s / SHARD).unlink(), SHARD, "missing"),
    (lambda s: (s / SHARD).resolve().unlink(), SHARD, "missing"),
    (lambda s: (s / "config.json").unlink(), "config.json", "missing"),
    (lambda s: (s / "tokenizer.json").resolve().unlink(), "tokenizer.json", "missing"),
    (lambda s: ((s / SHARD).unlink(), (s / SHARD).mkdir(), (s / SHARD / "x").touch()), SHARD, "missing"),
    (lambda s: ((s / SHARD).unlink(), (s / SHARD).symlink_to("/")), SHARD, "missing"),
    (lambda s: ((s / SHARD).unlink(), (s / SHARD).symlink_to(SHARD)), SHARD, "missing"),
    (lambda s: ((s / SHARD).unlink(), os.mkfifo(s / SHARD)), SHARD, "missing"),
    (lambda s: replace(s / SHARD, tensors(b"x")[:-1]), SHARD, "safetensors"),
    (lambda s: replace(s / SHARD, b""), SHARD, "safetensors"),
]


@pytest.mark.parametrize(("rot", "file", "reason"), ROT)
def test_rot_is_found_and_named(snapshot: Path, rot: Callable[[Path], object], file: str, reason: str) -> None:
    rot(snapshot)
    assert verify_snapshot(snapshot) == [BadFile(file=file, reason=reason)]


def test_a_sound_hash_of_an_unsound_file(tmp_path: Path) -> None:
    files = model_files() | {SHARD: b"no tensors at all"}
    snapshot = publish(tmp_path / "hub", "org/m", files, commit("a"), "main")
    assert verify_snapshot(snapshot) == [BadFile(file=SHARD, reason="safetensors")]


@pytest.mark.parametrize("index", [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1, "b": "../x"}}'])
def test_an_index_that_is_none(tmp_path: Path, index: bytes) -> None:
    snapshot = publish(tmp_path / "hub", "org/m", model_files() | {INDEX: index}, commit("a"), "main")
    assert verify_snapshot(snapshot) == []  # its bytes are those of the hub; whether they are of use is not asked here
    flip(snapshot / "config.json")
    assert verify_snapshot(snapshot) == [BadFile(file="config.json", reason="hash")]


def test_a_copied_cache_is_judged_by_its_form(snapshot: Path, tmp_path: Path) -> None:
    shutil.copytree(snapshot, tmp_path / "copy")
    assert verify_snapshot(tmp_path / "copy") == []
    flip(tmp_path / "copy" / "tokenizer.json", 0)
    assert verify_snapshot(tmp_path / "copy") == []  # nothing says what it should be
    os.truncate(tmp_path / "copy" / SHARD, 100)
    (tmp_path / "copy" / "model-00002-of-00002.safetensors").unlink()
    assert verify_snapshot(tmp_path / "copy") == [
        BadFile(file=SHARD, reason="safetensors"),
        BadFile(file="model-00002-of-00002.safetensors", reason="missing"),
    ]


def test_a_folder_that_is_empty_or_not_there(tmp_path: Path) -> None:
    assert {bad.file for bad in verify_snapshot(tmp_path)} == {"config.json", "model.safetensors"}
    with pytest.raises(FileNotFoundError):
        verify_snapshot(tmp_path / "none")


def test_huggingface_hub_agrees_on_every_hash(tmp_path: Path) -> None:
    """Its own hashing, of the same files: what one accepts, the other does."""
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    files = model_files()
    publish(tmp_path / "hub", "org/m", files, commit("a"), "main")
    at = RepoCache(tmp_path / "hub", "org/m")
    for name, oid in oids(files).items():
        with open(at.blob(oid), "rb") as file:
            theirs = sha_fileobj(file).hex() if oid_kind(oid) == "sha256" else git_hash(files[name])
        assert theirs == oid
