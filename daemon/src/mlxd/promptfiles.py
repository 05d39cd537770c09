"""The files of prefixes that are kept on disk: whole or not there, private, within a budget. Bytes only: no MLX here.

    <root>/.lock                  held by whoever writes; removing needs no lock
    <root>.version                of all of this, as JSON
    <root>/<model>-<key>/about    which model this is, as JSON
                         NAME.kv  one entry; its modification time is when it was last of use
                         NAME.new being written; whoever has the lock next sweeps it

`<model>` is a hash of the model's id, `<key>` one of all that must be alike for an entry to be of use. An entry:

    magic, 8 bytes; length of the header, 4 bytes, little-endian; its SHA-256; the header, msgpack; the payload

The header says what the payload belongs to and its SHA-256. How the payload is divided it does not say: the reader
knows that beforehand, and refuses any other size, so that no file can make it allocate what it does not hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .stateversion import json_version, refuse_newer
from .store.files import fsync_folder, remove_tree, try_lock
from .wholefiles import write_whole

__all__ = [
    "SUFFIX", "Damaged", "Header", "Session", "Usage", "clear", "encode", "folder_name", "fsync_folder", "identity",
    "list_entries", "read", "refuse_newer_files", "remove_stale", "session", "touch", "trim", "usage",
]  # fmt: skip

SUFFIX = ".kv"
NEW = ".new"
ABOUT = "about"
MAGIC = b"mlxdkv1\n"
VERSION = 1
MAX_HEADER_BYTES = 64 * 1024
MAX_ABOUT_BYTES = 16 * 1024
# Together the entries never take more than this share of what would be free without them.
FREE_SHARE = 0.1
# A folder with many more is slow to look through, and it is looked through often.
MOST_FILES = 8192
# What a file really takes is a multiple of this.
PAGE = 4096
_NEVER = 2**63

_FOLDER = re.compile(r"([0-9a-f]{16})-[0-9a-f]{32}\Z")
_LEAD = len(MAGIC) + 4 + 32


class Damaged(Exception):
    """The file is not what its name and its reader expect; the message says how."""


class Header(msgspec.Struct, array_like=True, frozen=True):
    """What an entry is of.

    Attributes:
        key: as in the folder's name, whole.
        namespace: nothing is shared between different ones.
        kind: what the payload holds.
        first: how many tokens come before its own.
        parent: the digest of those.
        tokens: its own, 4 bytes each, little-endian.
        digest: SHA-256 of the payload.
    """

    key: bytes
    namespace: bytes
    kind: str
    first: int
    parent: bytes
    tokens: bytes
    digest: bytes = b""


class _About(msgspec.Struct):
    model: str


# --- names ----------------------------------------------------------------------------------------------------------


def folder_name(model: str, key: bytes) -> str:
    return f"{_marked(model)}-{key[:16].hex()}"


def _marked(model: str) -> str:
    return hashlib.sha256(model.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def identity(folder: Path) -> bytes:
    """A digest of which weights a model's folder holds, by their files' facts, and of its config.json. Raises OSError.

    The time of the last change of a file's facts is among them: nothing that copies or restores files can set it.
    """
    told = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            status = os.stat(folder / name)
            facts = (name, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            told.update(repr(facts).encode("utf-8", "surrogateescape"))
    told.update((folder / "config.json").read_bytes())
    return told.digest()


# --- one entry ------------------------------------------------------------------------------------------------------


def encode(header: Header, payload: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """The pieces of an entry's file; the header's `digest` is set here."""
    digest = hashlib.sha256()
    for piece in payload:
        digest.update(piece)
    raw = msgspec.msgpack.encode(msgspec.structs.replace(header, digest=digest.digest()))
    return [MAGIC + len(raw).to_bytes(4, "little") + hashlib.sha256(raw).digest() + raw, *payload]


def read(path: Path, expected: Header, payload_bytes: int) -> memoryview:
    """The payload of the entry at `path`, which has to be of `expected` (but for its digest) and of this size.

    Raises:
        Damaged: it is another one, or not what was written.
        OSError: it is not there, or cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged("no regular file")
        if not _LEAD + payload_bytes < status.st_size <= _LEAD + MAX_HEADER_BYTES + payload_bytes:
            raise Damaged(f"{status.st_size} bytes long")
        data = bytearray(status.st_size)
        if _fill(file, data) != status.st_size:
            raise Damaged("it changed while it was read")
    return _payload(memoryview(data), expected, payload_bytes)


def _fill(file: object, data: bytearray) -> int:
    done = 0
    view = memoryview(data)
    while done < len(data):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done


def _payload(data: memoryview, expected: Header, payload_bytes: int) -> memoryview:
    length = int.from_bytes(data[8:12], "little")
    if data[:8] != MAGIC or _LEAD + length + payload_bytes != len(data):
        raise Damaged("no entry of this size")
    raw, payload = data[_LEAD : _LEAD + length], data[_LEAD + length :]
    if hashlib.sha256(raw).digest() != data[12:_LEAD]:
        raise Damaged("its header is not what was written")
    try:
        header = msgspec.msgpack.decode(raw, type=Header)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Damaged(f"its header is none: {error}") from None
    if msgspec.structs.replace(header, digest=b"") != expected:
        raise Damaged("it is of something else")
    if hashlib.sha256(payload).digest() != header.digest:
        raise Damaged("its payload is not what was written")
    return payload


def list_entries(folder: Path) -> dict[str, int]:
    """Names of the entries in a folder, each with when it was last of use, in ns; {} where there is no folder."""
    return {entry.name[: -len(SUFFIX)]: entry.used_ns for entry in _files(folder) if entry.name.endswith(SUFFIX)}


def touch(path: Path, used_ns: int) -> None:
    with contextlib.suppress(OSError):
        os.utime(path, ns=(used_ns, used_ns), follow_symlinks=False)


# --- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    name: str
    size: int
    used_ns: int


class Session:
    """What the holder of the lock may do. What was left half-written is gone by then, and the budget holds.

    Attributes:
        gone: the paths of entries that had to go.
    """

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root = root
        self.gone: list[str] = []
        self._held = self._count = 0
        self._old: list[tuple[int, str, int]] = []
        soon = time.time_ns() + 10**10  # a time to come tells nothing: the clock was set back
        for folder in _folders(root):
            for file in _files(folder):
                if file.name.endswith(NEW):
                    os.unlink(file.path)
                    continue
                self._held += file.size
                if file.name.endswith(SUFFIX):
                    self._count += 1
                    self._old.append((file.used_ns if file.used_ns < soon else 0, file.path, file.size))
        heapq.heapify(self._old)
        disk = os.statvfs(root)
        self._most = min(budget_bytes, int(FREE_SHARE * (disk.f_bavail * disk.f_frsize + self._held)))
        self._make_room(0, 0, _NEVER)

    def prepare(self, folder: Path, model: str) -> bool:
        """See to it that a model's folder is there and says whose it is. Returns whether there is room for that.

        Raises: OSError.
        """
        if _about(folder) == model:
            return True
        if not self._make_room(PAGE, 0, _NEVER):
            return False
        make_private(folder)
        self._write(folder / ABOUT, [msgspec.json.encode(_About(model))], time.time_ns())
        self._held += PAGE
        return True

    def put(self, folder: Path, name: str, pieces: Sequence[bytes | memoryview], used_ns: int) -> bool:
        """Write an entry, and remove those that were not of use for longest to make room for it.

        Returns: whether it is there; False where what is there was of use more recently.

        Raises: OSError: nothing is left of it.
        """
        size = _rounded(sum(len(piece) for piece in pieces))
        if not self._make_room(size, 1, used_ns):
            return False
        self._write(folder / (name + SUFFIX), pieces, used_ns)
        self._held += size
        self._count += 1
        return True

    def _write(self, path: Path, pieces: Sequence[bytes | memoryview], used_ns: int) -> None:
        new = path.with_name(path.name + NEW)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                for piece in pieces:
                    view = memoryview(piece)
                    while view:
                        view = view[os.write(fd, view) :]
                os.utime(fd, ns=(used_ns, used_ns))
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(new, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise

    def _make_room(self, size: int, count: int, used_ns: int) -> bool:
        while self._held + size > self._most or self._count + count > MOST_FILES:
            if size > self._most or not self._old or self._old[0][0] > used_ns:
                return False
            _, path, freed = heapq.heappop(self._old)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self.gone.append(path)
            self._held -= freed
            self._count -= 1
        return True


def refuse_newer_files(root: Path) -> None:
    """Raises StateTooNew where a newer mlxd keeps prompts there. To be called before anything is removed."""
    path = version_file(root)
    refuse_newer(path, json_version(path), VERSION)


def version_file(root: Path) -> Path:
    return root.with_name(f"{root.name}.version")


@contextlib.contextmanager
def session(root: Path, budget_bytes: int) -> Iterator[Session | None]:
    """Hold the lock for some writing; None where somebody else has it. Raises OSError."""
    make_private(root.parent)
    make_private(root)
    fd = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        locked = try_lock(fd)
        if locked and not version_file(root).exists():
            write_whole(version_file(root), msgspec.json.encode({"version": VERSION}), durable=False)
        yield Session(root, budget_bytes) if locked else None
    finally:
        os.close(fd)


def make_private(folder: Path) -> None:
    """A folder that nobody else may enter. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    status = os.stat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{folder} is no folder")
    if stat.S_IMODE(status.st_mode) != 0o700:
        os.chmod(folder, 0o700)


def trim(root: Path, budget_bytes: int) -> int:
    """Sweep what was left half-written, and keep to the budget. Returns the bytes that are held. Raises OSError."""
    if not root.is_dir():
        return 0
    if budget_bytes == 0:
        clear(root)
        return 0
    with session(root, budget_bytes):
        return sum(one.bytes for one in usage(root))


# --- looking and removing -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Usage:
    """What one model has on disk, over all its folders. `used_at` in Unix seconds; 0 where there is no entry."""

    model: str
    entries: int
    bytes: int
    used_at: float


def usage(root: Path) -> list[Usage]:
    """What each model has on disk; a folder whose owner cannot be told is nobody's. Raises OSError."""
    found: dict[str, Usage] = {}
    for folder in _folders(root):
        model = _about(folder)
        if model is None:
            continue
        files = list(_files(folder))
        entries = [file for file in files if file.name.endswith(SUFFIX)]
        before = found.get(model, Usage(model, 0, 0, 0.0))
        found[model] = Usage(
            model,
            before.entries + len(entries),
            before.bytes + sum(file.size for file in files),
            max([before.used_at, *(file.used_ns / 1e9 for file in entries)]),
        )
    return list(found.values())


def clear(root: Path, model: str | None = None) -> int:
    """Remove all entries, or those of one model. Returns the bytes that this freed.

    Raises: OSError: something could not be removed; the rest is.
    """
    wanted = None if model is None else _marked(model)
    failed: OSError | None = None
    freed = 0
    for folder in _folders(root):
        if wanted is not None and not folder.name.startswith(wanted + "-"):
            continue
        for file in _files(folder):
            try:
                os.unlink(file.path)
                freed += file.size
            except FileNotFoundError:
                pass
            except OSError as error:
                failed = failed or error
        with contextlib.suppress(OSError):  # a writer may have begun anew
            folder.rmdir()
    if failed is not None:
        raise failed
    return freed


def remove_stale(root: Path, current: str) -> None:
    """Remove what a model has in other folders than `current`: other weights, or another mlx, computed it."""
    for folder in _folders(root):
        if folder.name != current and folder.name.startswith(current[:17]):
            with contextlib.suppress(OSError):
                remove_tree(folder)


def _folders(root: Path) -> list[Path]:
    try:
        entries = list(os.scandir(root))
    except FileNotFoundError:
        return []
    return [Path(entry.path) for entry in entries if _FOLDER.match(entry.name) and entry.is_dir(follow_symlinks=False)]


def _files(folder: Path) -> Iterator[_File]:
    """All that is in a folder but for further folders, which are none of ours."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(status.st_mode):
            yield _File(entry.path, entry.name, _rounded(status.st_size), status.st_mtime_ns)


def _rounded(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _about(folder: Path) -> str | None:
    """The id of the model that a folder is of. None where that cannot be told."""
    try:
        fd = os.open(folder / ABOUT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            model = msgspec.json.decode(file.read(MAX_ABOUT_BYTES), type=_About).model
    except (OSError, msgspec.DecodeError):
        return None
    return model if _marked(model) == folder.name[:16] else None
