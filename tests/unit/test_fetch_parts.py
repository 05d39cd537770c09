"""Parts and their maps: what they keep, what they refuse, what they survive."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from mlxd.fetch.disk import disk_error, require_room
from mlxd.fetch.listing import File
from mlxd.fetch.parts import Closed, Part, allocated, held
from mlxd.fetch.segments import CHUNK_BYTES
from mlxd.store.layout import RESERVE_BYTES, RepoCache, disk_free
from mlxd_client.errors import DownloadFailed, InsufficientDisk, PermissionDenied

OID = "a" * 64
SIZE = 3 * CHUNK_BYTES + 5


@pytest.fixture
def cache(tmp_path: Path) -> RepoCache:
    return RepoCache(tmp_path / "hub", "org/name")


def opened(cache: RepoCache, size: int = SIZE) -> Part:
    part = Part.open(cache, OID, size)
    assert part is not None
    return part


def test_a_part_keeps_the_chunks_that_were_marked(cache: RepoCache) -> None:
    part = opened(cache)
    part.write([b"x" * CHUNK_BYTES, b"y" * 7], CHUNK_BYTES)
    part.mark(range(1, 2))
    part.write([b"z" * 5], 3 * CHUNK_BYTES)
    part.mark(range(3, 4))
    part.close()
    assert held(cache, OID, SIZE) == CHUNK_BYTES + 5
    again = opened(cache)
    assert again.chunks == b"\0\1\0\1"
    buffer = memoryview(bytearray(4))
    assert again.read(buffer, 2 * CHUNK_BYTES - 2) == 4
    assert buffer == b"xxyy"
    again.close()


def test_what_is_marked_is_never_written_again(cache: RepoCache) -> None:
    part = opened(cache)
    part.write([b"x" * CHUNK_BYTES], 0)
    part.mark(range(1))
    with pytest.raises(RuntimeError):
        part.write([b"y"], CHUNK_BYTES - 1)
    part.write([b"y"], CHUNK_BYTES)
    part.close()


def test_two_cannot_hold_the_same_part(cache: RepoCache) -> None:
    part = opened(cache)
    assert Part.open(cache, OID, SIZE) is None
    part.close()
    opened(cache).close()


def test_after_close_nothing_is_touched(cache: RepoCache) -> None:
    part = opened(cache)
    part.close()
    part.close()
    for touch in (
        lambda: part.write([b"x"], 0), lambda: part.mark(range(1)), lambda: part.read(memoryview(bytearray(1)), 0),
        part.finish, part.reset, part.discard,
    ):  # fmt: skip
        with pytest.raises(Closed):
            touch()


@pytest.mark.parametrize(
    "harm", ["map gone", "map cut", "map longer", "map of another size", "part cut", "part longer"]
)
def test_a_map_that_fits_nothing_is_ignored(cache: RepoCache, harm: str) -> None:
    part = opened(cache)
    part.write([b"x" * SIZE], 0)
    part.mark(range(4))
    part.close()
    assert held(cache, OID, SIZE) == SIZE
    size, path = SIZE, cache.part_map(OID)
    if harm == "map gone":
        path.unlink()
    elif harm == "map cut":
        os.truncate(path, path.stat().st_size - 1)
    elif harm == "map longer":
        path.write_bytes(path.read_bytes() + b"\1")
    elif harm == "map of another size":
        size += 1
    elif harm == "part cut":
        os.truncate(cache.part(OID), SIZE - 1)
    else:
        os.truncate(cache.part(OID), SIZE + 1)
    assert held(cache, OID, size) == 0
    part = opened(cache, size)
    assert 1 not in part.chunks
    assert allocated(cache, OID, size) == 0, "what it held is given back to the disk"
    part.close()


def test_any_bytes_as_a_map_are_a_map_or_ignored(cache: RepoCache) -> None:
    opened(cache).close()
    path, chance = cache.part_map(OID), random.Random(1)
    whole = path.read_bytes()
    for _ in range(200):
        raw = bytearray(whole)
        for _ in range(chance.randrange(4)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        path.write_bytes(raw[: chance.randrange(len(raw) + 1)] if chance.random() < 0.5 else raw)
        part = opened(cache)
        assert set(part.chunks) <= {0, 1}
        assert len(part.chunks) == 4
        part.close()


def test_a_link_where_the_part_belongs_is_not_followed(cache: RepoCache, tmp_path: Path) -> None:
    cache.prepare()
    victim = tmp_path / "victim"
    victim.write_bytes(b"keep")
    cache.part(OID).symlink_to(victim)
    cache.part_map(OID).symlink_to(victim)
    part = opened(cache)
    part.write([b"x"], 0)
    part.close()
    assert victim.read_bytes() == b"keep"


def test_finishing_makes_the_blob_and_leaves_nothing_else(cache: RepoCache) -> None:
    part = opened(cache)
    part.write([b"x" * SIZE], 0)
    part.finish()
    part.close()
    assert cache.has_blob(OID, SIZE)
    assert not cache.part(OID).exists()
    assert not cache.part_map(OID).exists()


def test_starting_over_forgets_everything(cache: RepoCache) -> None:
    part = opened(cache)
    part.write([b"x" * SIZE], 0)
    part.mark(range(4))
    part.reset()
    assert part.chunks == bytes(4)
    part.close()
    assert held(cache, OID, SIZE) == 0


# --- room ---------------------------------------------------------------------------------------------------------


def test_a_download_that_does_not_fit_is_refused_with_numbers(cache: RepoCache) -> None:
    huge = File("model.safetensors", OID, 2**49)
    with pytest.raises(InsufficientDisk) as caught:
        require_room(cache, [huge])
    details = caught.value.details
    assert details["needed_bytes"] == 2**49 + RESERVE_BYTES
    assert details["missing_bytes"] == details["needed_bytes"] - details["free_bytes"]
    assert not cache.folder.exists(), "asking leaves nothing behind"
    require_room(cache, [File("config.json", OID, 10)])
    require_room(cache, [])


def test_what_a_part_takes_already_counts(cache: RepoCache) -> None:
    part = opened(cache, 8 * CHUNK_BYTES)
    part.write([b"x" * 4 * CHUNK_BYTES], 0)
    os.fsync(part._fd)
    part.close()
    assert 4 * CHUNK_BYTES <= allocated(cache, OID, 8 * CHUNK_BYTES) < 5 * CHUNK_BYTES


def test_errors_of_the_disk_say_what_to_do(cache: RepoCache) -> None:
    import errno

    full = disk_error(OSError(errno.ENOSPC, "x"), cache, [File("a.json", OID, 100)])
    assert isinstance(full, InsufficientDisk)
    assert full.details["missing_bytes"] > 0
    assert full.details["free_bytes"] <= disk_free(cache.cache)
    assert isinstance(disk_error(OSError(errno.EDQUOT, "x"), cache, []), InsufficientDisk)
    refused = disk_error(OSError(errno.EROFS, "x"), cache, [])
    assert isinstance(refused, PermissionDenied)
    assert refused.details["folder"] == str(cache.folder)
    other = disk_error(OSError(errno.EIO, "x"), cache, [])
    assert isinstance(other, DownloadFailed)


def test_a_part_that_a_newer_mlxd_began_is_left_as_it_is(cache: RepoCache) -> None:
    part = opened(cache)
    part.write([b"x" * CHUNK_BYTES], 0)
    part.mark(range(1))
    part.close()
    path = cache.part_map(OID)
    path.write_bytes(newer := path.read_bytes().replace(b"mlxdmap1", b"mlxdmap2", 1))
    with pytest.raises(DownloadFailed, match="was written by a newer mlxd: it has version 2"):
        Part.open(cache, OID, SIZE)
    assert path.read_bytes() == newer
    assert cache.part(OID).stat().st_size == SIZE
