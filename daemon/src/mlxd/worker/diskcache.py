"""Prefixes beyond this process: written where the worker has nothing else to do, read when a request begins like them.

A sequence is cut into blocks of BLOCK tokens. A block's name is a hash of all tokens up to its end, so that a prompt's
own tokens tell which blocks it may take up, and sequences that begin alike share them. Where caches cannot be cut (see
kvcache.py) there are marks, too: what the other layers hold after some token, and the KV from the last block on.

Nothing here fails a request: what cannot be read is removed and counted, what cannot be written is tried again later.
Files are read on a thread; MLX stays on the worker's own.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import promptfiles as files
from .kvcache import KvPart, PromptCache, RowView, StateMark
from .layout import Layout, Raw, layout_of
from .prefix import Node
from .waits import LEAST

__all__ = ["DiskCache", "Fetched", "open_disk"]

BLOCK = 64
# Shorter sequences are computed about as soon as read, unless several began with them.
LONG = 256
# From how many places a mark that can be cut serves, on disk; in memory it serves everywhere.
MARKS = 4
# After a failure to write, nothing is tried for so long.
REST_S = 60.0
# While another worker writes, this long.
WAIT_S = 1.0

_NAME = re.compile(r"[0-9a-f]{32}(-[0-9]{2}-[0-9a-f]{32})?\Z")


# --- names ----------------------------------------------------------------------------------------------------------


def _chain(namespace: bytes, tokens: array[int], end: int) -> list[bytes]:
    """A digest of the tokens before each block up to `end`."""
    digests = [hashlib.sha256(b"mlxd" + namespace).digest()]
    for start in range(0, end - BLOCK + 1, BLOCK):
        digests.append(_step(digests[-1], tokens[start : start + BLOCK]))
    return digests


def _step(before: bytes, tokens: array[int]) -> bytes:
    return hashlib.sha256(before + tokens.tobytes()).digest()


def _hex(digest: bytes) -> str:
    return digest[:16].hex()


# --- what is read ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Fetched:
    """A sequence as files had it: KV from token `start` on, and states after the last one; a Row for the tree.

    `pairs` are keys and values of one layer after the other, each [heads, tokens, width].
    """

    layout: Layout
    namespace: bytes
    tokens: array[int]
    start: int
    pairs: list[Raw]
    states: list[Raw]

    @property
    def token_bytes(self) -> int:
        return self.layout.token_bytes

    @property
    def mark_bytes(self) -> int:
        return self.layout.state_bytes(len(self.tokens))

    def part(self, start: int, end: int) -> KvPart:
        if start < self.start:
            raise LookupError("what came before is not kept any more")
        cut = slice(start - self.start, end - self.start)
        made = [tensor.as_array(raw[:, cut]) for tensor, raw in zip(self.layout.tensors(), self.pairs, strict=True)]
        mx.eval(made)
        return KvPart(list(zip(made[::2], made[1::2], strict=True)))

    def mark(self) -> StateMark:
        return self.layout.make_mark(self.states, len(self.tokens))


# --- what is written ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Job:
    """An entry to be written: KV of the tokens from `start` to `end` of a path in the tree, and maybe states."""

    name: str
    header: files.Header
    path: list[Node]
    start: int
    end: int
    mark: StateMark | None
    used_ns: int


class DiskCache:
    """One model's prefixes on disk.

    Args:
        cache: what is kept in memory; prefixes come from it and go there.
        layout: of the model's caches.
        root: where all models' entries are; see promptfiles.py.
        model: the model's id.
        key: a digest of all that must be alike for an entry to be of use.
        budget_bytes: bounds the entries of all models together.

    Attributes:
        hits: requests that took up tokens from disk.
        saved_tokens: how many those were.
        failures: files that could not be read or written.
    """

    def __init__(
        self, cache: PromptCache, layout: Layout, root: Path, model: str, key: bytes, budget_bytes: int
    ) -> None:
        self._tree = cache.tree
        self._layout = layout
        self._root = root
        self._model = model
        self._key = key
        self._budget_bytes = budget_bytes
        self._folder = root / files.folder_name(model, key)
        self.hits = self.saved_tokens = self.failures = 0
        self._index: dict[str, int] = {}  # name → when it was of use, as its file says
        self._marks: dict[str, set[str]] = {}  # the block before, in hex → names of marks
        for name, used_ns in files.list_entries(self._folder).items():
            if _NAME.match(name):
                self._note(name, used_ns)
        self._namespaces: set[bytes] = set()  # of requests that look here; others are of no use on disk
        self._reader = ThreadPoolExecutor(1, "mlxd-prompts")
        # By what it ends with: what is being read, and its bytes.
        self._reading: dict[str, tuple[Future[Fetched | None], int]] = {}
        self._work: Iterator[Job] | None = None
        self._planned: tuple[int, int] | None = None
        self._times: list[tuple[int, int]] = []  # (uses of the tree, when), oldest first
        self._rest_until = 0.0

    def _note(self, name: str, used_ns: int) -> None:
        self._index[name] = used_ns
        if "-" in name:
            self._marks.setdefault(name[:32], set()).add(name)

    def _forget(self, name: str) -> None:
        self._index.pop(name, None)
        self._marks.get(name[:32], set()).discard(name)

    # --- reading

    def fetch(self, namespace: bytes, tokens: Sequence[int]) -> Future[Fetched | None] | None:
        """Read what a prompt may take up beyond what memory has of it; None where that is nothing worth a look."""
        self._namespaces.add(namespace)
        limit = len(tokens) - 1
        if not self._index or limit < LEAST:
            return None
        packed = array("I", tokens)
        have = self._tree.peek(namespace, packed, limit)
        if limit - have < LEAST:
            return None
        length, mark, digests = self._find(namespace, packed, limit)
        if length - have < LEAST:
            return None
        name = mark or _hex(digests[length // BLOCK])
        if name not in self._reading:
            start = self._tree.alike(namespace, packed) // BLOCK * BLOCK
            room = self._tree.budget_bytes - self._tree.live_bytes - sum(size for _, size in self._reading.values())
            future = self._reader.submit(self._fetch, namespace, packed, limit, have, start, room)
            self._reading[name] = future, (length - start) * self._layout.token_bytes + self._layout.state_bytes(length)
        return self._reading[name][0]  # several may begin alike

    def take_up(self, reading: Future[Fetched | None]) -> None:
        """Have memory keep what was read."""
        self._reading = {name: one for name, one in self._reading.items() if one[0] is not reading}
        try:
            fetched = reading.result()
            if fetched is None:
                return
            added = self._tree.add(fetched.namespace, fetched.tokens, fetched)
        except LookupError:
            return
        except Exception:  # whatever it is, it can be computed as well
            self.failures += 1
            return
        if added or fetched.layout.states:
            self.hits += 1
            self.saved_tokens += added

    def _find(self, namespace: bytes, tokens: array[int], limit: int) -> tuple[int, str | None, list[bytes]]:
        """How many tokens the entries have of a prompt's beginning, the mark that this takes, and the digests before
        each block."""
        digests = _chain(namespace, tokens, limit)
        whole = len(digests) - 1
        if self._layout.pairs:
            whole = next((at for at in range(whole) if _hex(digests[at + 1]) not in self._index), whole)
        if not self._tree.marked:
            return whole * BLOCK, None, digests
        for at in range(whole, -1, -1):
            for name in sorted(self._marks.get(_hex(digests[at]), ()), reverse=True):
                length = at * BLOCK + int(name[33:35])
                if length <= limit and name == _mark_name(digests[at], tokens[at * BLOCK : length]):
                    return length, name, digests
        return 0, None, digests

    def _fetch(
        self, namespace: bytes, tokens: array[int], limit: int, have: int, start: int, room: int
    ) -> Fetched | None:
        """On the reader's thread. What turns out not to be there is left out, and a shorter prefix tried."""
        while True:
            length, mark, digests = self._find(namespace, tokens, limit)
            start = min(start, length // BLOCK * BLOCK)
            weight = (length - start) * self._layout.token_bytes + self._layout.state_bytes(length)
            if not self._tree.marked and weight > room:
                limit = start + room // max(self._layout.token_bytes, 1)
                length = limit // BLOCK * BLOCK
            if length - have < LEAST or (self._tree.marked and weight > room):
                return None
            with contextlib.suppress(_Unreadable):
                return self._read(namespace, tokens[:length], start, mark, digests)

    def _read(
        self, namespace: bytes, tokens: array[int], start: int, mark: str | None, digests: list[bytes]
    ) -> Fetched:
        """Raises _Unreadable: one of the entries is none; it is not known any more."""
        layout, whole = self._layout, len(tokens) // BLOCK
        held: list[list[Raw]] = []
        for at in range(start // BLOCK, whole if layout.pairs else 0):
            expected = self._header("block", namespace, tokens, at * BLOCK, (at + 1) * BLOCK, digests[at])
            data = self._read_one(_hex(digests[at + 1]), expected, BLOCK * layout.token_bytes)
            held.append(layout.cut_pairs(data, BLOCK)[0])
        states: list[Raw] = []
        if mark is not None:
            rest = len(tokens) - whole * BLOCK
            expected = self._header("mark", namespace, tokens, whole * BLOCK, len(tokens), digests[whole])
            data = self._read_one(mark, expected, rest * layout.token_bytes + layout.state_bytes(len(tokens)))
            tail, data = layout.cut_pairs(data, rest)
            held.append(tail)
            states = layout.cut_states(data, len(tokens))
        pairs = [np.concatenate(pieces, axis=1) for pieces in zip(*held, strict=True)]
        return Fetched(layout, namespace, tokens, start, pairs, states)

    def _read_one(self, name: str, expected: files.Header, payload_bytes: int) -> memoryview:
        path = self._folder / (name + files.SUFFIX)
        try:
            return files.read(path, expected, payload_bytes)
        except FileNotFoundError:
            pass  # others may remove it at any time
        except (files.Damaged, OSError):
            self.failures += 1
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._forget(name)
        raise _Unreadable

    def _header(
        self, kind: str, namespace: bytes, tokens: array[int], start: int, end: int, parent: bytes
    ) -> files.Header:
        return files.Header(self._key, namespace, kind, start, parent, tokens[start:end].tobytes())

    # --- writing

    @property
    def due(self) -> bool:
        """There may be something to write."""
        if self._work is None and self._planned == self._tree.state:
            return False
        return time.monotonic() >= self._rest_until

    def save(self, limit_s: float) -> None:
        """Write for about `limit_s` seconds, what was of use last first; goes on where it was the next time."""
        until = time.monotonic() + limit_s
        if self._planned != self._tree.state:
            self._plan()
        try:
            job = next(self._work, None) if self._work is not None else None
            if job is not None:
                with files.session(self._root, self._budget_bytes) as held:
                    job = self._write_all(held, job, until)
        except (OSError, RuntimeError, ValueError):
            self.failures += 1
            job = None
            self._rest_until = time.monotonic() + REST_S
        if job is None:
            self._work = None

    def _plan(self) -> None:
        self._planned = self._tree.state
        self._times.append((self._planned[0], time.time_ns()))
        if len(self._times) > 512:
            del self._times[:256]
        self._work = self._jobs()

    def _write_all(self, held: files.Session | None, job: Job | None, until: float) -> Job | None:
        """Returns the last job that was done when the time was over; None where nothing is left that can be written."""
        if held is None:  # another worker writes
            self._rest_until = time.monotonic() + WAIT_S
            self._planned = None
            return None
        if not held.prepare(self._folder, self._model):
            return None
        written = False
        while job is not None:
            if not held.put(self._folder, job.name, files.encode(job.header, self._payload(job)), job.used_ns):
                job = None
                break
            self._note(job.name, job.used_ns)
            written = True
            if time.monotonic() >= until:
                break
            job = next(self._work, None) if self._work is not None else None
        for path in held.gone:
            if path.startswith(f"{self._folder}/"):
                self._forget(os.path.basename(path).removesuffix(files.SUFFIX))
        if written:
            files.fsync_folder(self._folder)
        return job

    def _jobs(self) -> Iterator[Job]:
        """Entries that are not there yet, of sequences that are worth it; those that are there are of use again."""
        nodes = [one for one in self._tree.nodes() if one[0] in self._namespaces and self._is_worth(one[1])]
        nodes.sort(key=lambda one: one[1].used, reverse=True)
        done: set[str] = set()
        for namespace, node in nodes:
            path = _path(node)
            tokens = array("I")
            for each in path:
                tokens.extend(each.tokens)
            for job in self._jobs_of(namespace, node, path, tokens):
                if job.name in done:
                    continue
                done.add(job.name)
                known = self._index.get(job.name)
                if known is None:
                    yield job
                elif known < job.used_ns:
                    files.touch(self._folder / (job.name + files.SUFFIX), job.used_ns)
                    self._index[job.name] = job.used_ns

    def _jobs_of(self, namespace: bytes, node: Node, path: list[Node], tokens: array[int]) -> Iterator[Job]:
        digests = _chain(namespace, tokens, len(tokens))
        used_ns = self._used_ns(node.used)
        if self._layout.pairs:
            for at in range(len(digests) - 1):
                start, end = at * BLOCK, (at + 1) * BLOCK
                header = self._header("block", namespace, tokens, start, end, digests[at])
                # What begins a sequence goes after what hangs on it.
                yield Job(_hex(digests[at + 1]), header, path, start, end, None, used_ns - at * 1000)
        for length in _marked_at(node):
            mark: Any = node.mark
            whole = length // BLOCK
            start = whole * BLOCK
            header = self._header("mark", namespace, tokens, start, length, digests[whole])
            name = _mark_name(digests[whole], tokens[start:length])
            yield Job(name, header, path, start, length, mark, used_ns - (whole + 1) * 1000)

    def _is_worth(self, node: Node) -> bool:
        """Long, or where several go on; and one that others are part of needs no look of its own."""
        if self._tree.marked:
            return node.mark is not None and (node.end >= LONG or (bool(node.children) and node.end >= BLOCK))
        branches = len(node.children)
        return branches != 1 and (node.end >= LONG or (branches > 1 and node.end >= BLOCK))

    def _used_ns(self, used: int) -> int:
        """When a node was of use last, as far as plans were made since."""
        return self._times[min(bisect.bisect_left(self._times, (used, 0)), len(self._times) - 1)][1]

    def _payload(self, job: Job) -> list[memoryview]:
        tensors = list(self._layout.tensors()) if job.end > job.start else []
        arrays = [_stretch(job.path, at // 2, at % 2, job.start, job.end) for at in range(len(tensors))]
        if job.mark is not None:
            for state, kept in zip(self._layout.states, job.mark.states, strict=True):
                tensors += state.tensors(job.end)
                arrays += state.arrays(kept, job.end)
        arrays = [mx.contiguous(held) for held in arrays]
        mx.eval(arrays)
        return [tensor.as_bytes(held) for tensor, held in zip(tensors, arrays, strict=True)]

    def clear(self) -> int:
        """Remove all entries of this model. Returns the bytes that this freed. Raises OSError."""
        self._index, self._marks = {}, {}
        self._work, self._planned = None, self._tree.state
        return files.clear(self._root, self._model)


class _Unreadable(Exception):
    """An entry that was known is none."""


def _mark_name(before: bytes, tokens: array[int]) -> str:
    return f"{_hex(before)}-{len(tokens):02}-{_hex(_step(before, tokens))}"


def _path(node: Node) -> list[Node]:
    """From the beginning to a node."""
    path = [node]
    while path[-1].parent is not None and path[-1].parent.parent is not None:
        path.append(path[-1].parent)
    return path[::-1]


def _marked_at(node: Node) -> list[int]:
    """After how many tokens a node's mark is to be had: where it stands, and where others have begun to differ."""
    if node.mark is None:
        return []
    lengths = [node.end]
    if node.mark.cuttable:
        before = [each.end for each in _path(node)[:-1] if each.mark is None and each.end >= BLOCK]
        lengths += before[::-1][: MARKS - 1]
    return lengths


def _stretch(path: list[Node], layer: int, side: int, start: int, end: int) -> mx.array:
    """Keys or values of one layer, of some tokens of a path."""
    pieces = []
    for node in path:
        begin = node.end - len(node.tokens)
        if node.end > start and begin < end:
            held = node.part.pairs[layer][side]  # type: ignore[union-attr]
            pieces.append(held[:, :, max(start - begin, 0) : min(end, node.end) - begin])
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)


def open_disk(
    cache: PromptCache, row: RowView | None, *, root: str, model: str, path: str, identity: bytes, budget_bytes: int
) -> DiskCache | None:
    """The prefixes that disk has of a model; None where they cannot be of use.

    Args:
        row: any row of the model, for what its caches are made of.
        path: the model's folder.
        identity: what `promptfiles.identity` said of it before the model was loaded.
    """
    layout = layout_of(row) if row is not None else None
    if layout is None:
        return None
    try:
        if files.identity(Path(path)) != identity:
            return None  # it changed meanwhile: which weights these are cannot be told
    except OSError:
        return None
    versions = [importlib.metadata.version(name) for name in ("mlx", "mlx-lm")]
    facts = (1, BLOCK, identity, versions, platform.machine(), str(mx.default_device()), repr(layout))
    key = hashlib.sha256(repr(facts).encode()).digest()
    try:
        files.remove_stale(Path(root), files.folder_name(model, key))
        return DiskCache(cache, layout, Path(root), model, key, budget_bytes)
    except OSError:
        return None
