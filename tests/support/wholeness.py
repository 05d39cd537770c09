"""Whether a cache tells the truth: what it shows as a model, to mlxd's store or to huggingface_hub, is whole and right.

Looks from outside, with hashes of its own; nothing here asks a daemon.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from mlxd.store import Store
from mlxd_client.errors import ModelNotFound
from support import fake_model

MIB = 1024 * 1024


def sharded(shard_bytes: list[int], seed: int = 0, small: int = 6) -> dict[str, bytes]:
    """A model that a bad_child can load: shards of random weights by seed and number, their index, some small files."""
    files = {name: data for name, data in fake_model.files(0, seed).items() if name != "model.safetensors"}
    weight_map: dict[str, str] = {}
    for number, size in enumerate(shard_bytes):
        name = f"model-{number + 1:05}-of-{len(shard_bytes):05}.safetensors"
        tensor = f"w.{number}"
        header = json.dumps({tensor: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        data = random.Random(f"{seed}/{number}").randbytes(size)
        files[name] = struct.pack("<Q", len(header)) + header + data
        weight_map[tensor] = name
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files | {f"extra-{number}.json": b'{"%d": %d}' % (number, seed) for number in range(small)}


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


class _Gone(Exception):
    """The snapshot was taken away as a whole while it was looked at."""


class Eye:
    """Looks at one repository of a cache.

    Args:
        versions: what each commit holds: SHA-256 by file name, whatever the hub names the file's blob by.
    """

    def __init__(self, cache: Path, repo: str, versions: Mapping[str, Mapping[str, str]]) -> None:
        self.cache, self.repo, self.versions = cache, repo, versions

    def look(self, *, quiet: bool = True) -> str | None:
        """The commit that both programs find, whole; None where there is none. AssertionError if either is misled.

        Args:
            quiet: nobody changes the cache meanwhile, so that both have to see the same.
        """
        store, genuine = self._until_settled(self._store), self._until_settled(self._genuine)
        assert store == genuine or not quiet, f"mlxd sees {store}, huggingface_hub sees {genuine}"
        return store

    @staticmethod
    def _until_settled(way: Callable[[], str | None]) -> str | None:
        while True:
            with contextlib.suppress(_Gone):
                return way()

    def _store(self) -> str | None:
        try:
            found = Store(env={"HF_HUB_CACHE": str(self.cache)}).resolve(self.repo)
        except ModelNotFound:
            return None
        return self._judge(Path(found.path))

    def _genuine(self) -> str | None:
        path = self.genuine_path()
        return None if path is None else self._judge(path)

    def genuine_path(self) -> Path | None:
        """The folder that huggingface_hub takes for the model, whatever is in it."""
        try:
            path = huggingface_hub.snapshot_download(self.repo, cache_dir=self.cache, local_files_only=True)
        except LocalEntryNotFoundError:
            return None
        return Path(path)

    def _judge(self, snapshot: Path) -> str:
        """Every file of the commit has to be there, and right. Returns the commit."""
        expected = self.versions.get(snapshot.name)
        assert expected is not None, f"a snapshot that the hub never had: {snapshot}"
        for name, digest in expected.items():
            try:
                with open(snapshot / name, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except FileNotFoundError:
                if not snapshot.is_dir():
                    raise _Gone from None
                raise AssertionError(f"{name} is missing in a model that is shown as whole") from None
            assert found == digest, f"{name} has other bytes than the hub"
        return snapshot.name

    def warnings(self) -> list[str]:
        """What huggingface_hub finds odd about the cache."""
        return [str(warning) for warning in huggingface_hub.scan_cache_dir(self.cache).warnings]

    def litter(self) -> list[str]:
        """What is only there while something is under way, and must be gone after it."""
        return sorted(str(path.relative_to(self.cache)) for path in self.cache.rglob("*.mlxd-*")) + sorted(
            str(path.relative_to(self.cache)) for path in self.cache.rglob(".mlxd-*")
        )

    def files(self) -> list[str]:
        """All files and links of the cache, but for what huggingface_hub itself keeps beside repositories."""
        own = {"CACHEDIR.TAG", "version.txt"}
        found = []
        with contextlib.suppress(FileNotFoundError):
            found = [path for path in self.cache.rglob("*") if path.is_symlink() or path.is_file()]
        return sorted(str(path.relative_to(self.cache)) for path in found if path.name not in own)
