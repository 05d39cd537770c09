"""Which token sequences have a KV cache kept for them, what they weigh, and which go first. Bookkeeping: no MLX here.

Sequences lie in a radix tree by their tokens, one for each namespace, so that what begins alike is kept once. A node
holds the tokens of its edge and, for them, a Part: the KV of just these tokens. What cannot be cut at any token, as a
state that each token overwrites, is a Mark: it belongs to a node's last token. Both are opaque here.

Least valuable goes first, as in GreedyDual-Size (Cao and Irani, 1997): a value is the tokens that need not be computed
again for each byte, on top of a clock that stands at the value of what was dropped last. What is used gets its value
anew. Where all cost alike, that is least recently used first.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, Self

# No edge has more tokens, so that a long sequence can go piece by piece from its end.
LONGEST_EDGE = 2048
# How many nodes are looked at for a mark beyond.
FARTHEST = 256
# The tokens themselves weigh something, too.
TOKEN_BYTES = array("I").itemsize


class Part(Protocol):
    """The KV of some tokens in a row."""

    @property
    def nbytes(self) -> int: ...

    def split(self, at: int) -> tuple[Self, Self]:
        """The first `at` tokens, and the rest; they share no memory."""


class Mark(Protocol):
    """A state after some token. `cuttable`: it can be taken back to any token before."""

    cuttable: bool

    @property
    def nbytes(self) -> int: ...


class Row(Protocol):
    """A sequence whose KV is at hand."""

    @property
    def token_bytes(self) -> int:
        """What a part weighs by token."""

    @property
    def mark_bytes(self) -> int:
        """What the mark after its last token weighs."""

    def part(self, start: int, end: int) -> Part: ...
    def mark(self) -> Mark: ...


@dataclass(frozen=True, slots=True)
class Found:
    """What is kept of the beginning of a sequence: each part with how many of its tokens count, and a mark at `length`
    or, where it is cuttable, beyond."""

    length: int
    parts: list[tuple[Part, int]]
    mark: Mark | None


class Node:
    __slots__ = ("children", "end", "mark", "parent", "part", "tokens", "used", "value")

    def __init__(self, parent: Node | None, tokens: array[int], part: Part | None) -> None:
        self.parent = parent
        self.tokens = tokens
        self.part = part
        self.end: int = len(tokens) + (parent.end if parent is not None else 0)
        self.children: dict[int, Node] = {}
        self.mark: Mark | None = None
        self.value = 0.0
        self.used = 0

    @property
    def nbytes(self) -> int:
        return self.part_bytes + (self.mark.nbytes if self.mark is not None else 0)

    @property
    def part_bytes(self) -> int:
        return (self.part.nbytes if self.part is not None else 0) + TOKEN_BYTES * len(self.tokens)


class PrefixTree:
    """The sequences of one model.

    Args:
        budget_bytes: bounds what is kept and what is live together.
        marked: a sequence can be taken up again only where there is a mark; else at any token.

    Attributes:
        nbytes: what is kept.
        live_bytes: what the running batches hold, as `fit` was told last.
    """

    def __init__(self, budget_bytes: int, *, marked: bool) -> None:
        self.budget_bytes = budget_bytes
        self.marked = marked
        self.nbytes = 0
        self.live_bytes = 0
        self._roots: dict[bytes, Node] = {}
        self._clock = 0.0
        self._uses = 0
        # (value, use, number, node): what may be dropped. Entries that no longer hold are passed over.
        self._heap: list[tuple[float, int, int, Node]] = []
        self._pushes = 0
        self._nodes = 0

    def __len__(self) -> int:
        return self._nodes

    # --- finding

    def find(self, namespace: bytes, tokens: Sequence[int], limit: int) -> Found | None:
        """The longest beginning of `tokens` that is kept and can be taken up, of at most `limit` tokens."""
        path, child, alike = self._walk(namespace, _packed(tokens))
        length, marked = self._usable(path, child, alike, limit)
        nodes = [*path, child] if child is not None else path
        self._touch(nodes if marked is None else [marked])
        if length <= 0:
            return None
        parts = []
        for node in nodes:
            begin = node.end - len(node.tokens)
            if begin < length and node.part is not None:
                parts.append((node.part, min(node.end, length) - begin))
        return Found(length, parts, marked.mark if marked is not None else None)

    def peek(self, namespace: bytes, tokens: Sequence[int], limit: int) -> int:
        """How long the sequence is that `find` would find; no use is made of it."""
        return self._usable(*self._walk(namespace, _packed(tokens)), limit)[0]

    def _usable(self, path: list[Node], child: Node | None, alike: int, limit: int) -> tuple[int, Node | None]:
        """How much of what `_walk` found can be taken up, and the node with the mark that this needs."""
        matched = min((path[-1].end if path else 0) + alike, limit)
        return self._find_mark(path, child, matched) if self.marked else (matched, None)

    def _walk(self, namespace: bytes, wanted: array[int]) -> tuple[list[Node], Node | None, int]:
        """The nodes whose tokens are all wanted, the first one first; and a further one of which only some are, with
        how many."""
        path: list[Node] = []
        node, at = self._roots.get(namespace), 0
        while node is not None and at < len(wanted):
            child = node.children.get(wanted[at])
            if child is None:
                break
            alike = common(child.tokens, wanted, at)
            if alike < len(child.tokens):
                return path, child, alike
            path.append(child)
            node, at = child, at + alike
        return path, None, 0

    def _find_mark(self, path: list[Node], child: Node | None, matched: int) -> tuple[int, Node | None]:
        """The mark with which most of `matched` tokens can be taken up, and how many."""
        exact = next((node for node in reversed(path) if node.mark is not None and node.end <= matched), None)
        if exact is not None and exact.end == matched:
            return matched, exact
        start = child if child is not None else path[-1] if path else None
        near = islice(_below(start), FARTHEST)
        beyond = next((node for node in near if node.mark is not None and node.mark.cuttable), None)
        if beyond is not None and beyond.end >= matched > 0:
            return matched, beyond
        return (exact.end, exact) if exact is not None else (0, None)

    def alike(self, namespace: bytes, tokens: Sequence[int]) -> int:
        """How much of the beginning of `tokens` has parts here, whether it can be taken up or not."""
        path, _, alike = self._walk(namespace, _packed(tokens))
        return (path[-1].end if path else 0) + alike

    @property
    def state(self) -> tuple[int, int]:
        """Another one after each use and each change."""
        return self._uses, self.nbytes

    def nodes(self) -> Iterator[tuple[bytes, Node]]:
        """All that is kept, with its namespace."""
        for namespace, root in self._roots.items():
            for node in _below(root):
                if node.parent is not None:
                    yield namespace, node

    # --- keeping

    def add(self, namespace: bytes, tokens: Sequence[int], row: Row) -> int:
        """Keep a sequence, as much of it as there is room for. Returns how many tokens were new.

        `row` holds the KV of `tokens`, and is asked only for what is not kept yet. Where it raises, nothing is added.
        """
        wanted = _packed(tokens)
        path, child, alike = self._walk(namespace, wanted)
        have = (path[-1].end if path else 0) + alike
        if not wanted or (have == len(wanted) and (not self.marked or (child is None and path[-1].mark is not None))):
            self._touch(path if child is None else [*path, child])
            return 0
        mark_bytes = row.mark_bytes if self.marked else 0
        per_token = row.token_bytes + TOKEN_BYTES
        try:
            room = self._make_room((len(wanted) - have) * per_token + mark_bytes, {*path, child}) - mark_bytes
            end = min(len(wanted), have + max(room, 0) // per_token)
            if room < 0 or (end < len(wanted) if self.marked else end == have):
                return 0
            mark = row.mark() if self.marked else None
            tip = self._grow(namespace, wanted[:end], path, child, alike, row)
            if mark is not None:
                self._set_mark(tip, mark)
        finally:
            for node in (child, path[-1] if path else None):
                if node is not None and self.marked:
                    self._prune(node, set())  # what hung on it may have made room
        self._touch([tip] if self.marked else list(_up(tip)))
        return end - have

    def _grow(
        self, namespace: bytes, wanted: array[int], path: list[Node], child: Node | None, alike: int, row: Row
    ) -> Node:
        """Add the nodes that a sequence lacks, behind those that `_walk` found. Returns its last one."""
        begin = (path[-1].end if path else 0) + alike
        edges = [(at, min(at + LONGEST_EDGE, len(wanted))) for at in range(begin, len(wanted), LONGEST_EDGE)]
        parts = [row.part(start, end) for start, end in edges]
        if child is not None:
            tip = self._split(child, alike)
        else:
            tip = path[-1] if path else self._roots.setdefault(namespace, Node(None, array("I"), None))
        for (start, end), part in zip(edges, parts, strict=True):
            node = Node(tip, wanted[start:end], part)
            tip.children[wanted[start]] = node
            self.nbytes += node.nbytes
            self._nodes += 1
            tip = node
        return tip

    def _split(self, node: Node, at: int) -> Node:
        """Cut an edge in two. Returns the new node, which ends at token `at` of it."""
        assert node.parent is not None
        assert node.part is not None
        before = node.part_bytes
        first, rest = node.part.split(at)
        head = Node(node.parent, node.tokens[:at], first)
        head.value, head.used = node.value, node.used
        node.parent.children[node.tokens[0]] = head
        node.parent, node.tokens, node.part = head, node.tokens[at:], rest
        head.children[node.tokens[0]] = node
        self.nbytes += head.part_bytes + node.part_bytes - before
        self._nodes += 1
        return head

    def _set_mark(self, node: Node, mark: Mark) -> None:
        self.nbytes += mark.nbytes
        node.mark = mark
        if mark.cuttable:  # it serves wherever those before it would
            for above in _up(node.parent):
                if above.mark is not None and above.mark.cuttable:
                    self.nbytes -= above.mark.nbytes
                    above.mark = None

    # --- dropping

    def fit(self, live_bytes: int) -> None:
        """Drop what must go now that running batches hold `live_bytes`."""
        self.live_bytes = live_bytes
        if self.nbytes + live_bytes > self.budget_bytes:
            self._make_room(0, set())

    def shrink(self, most_bytes: int) -> None:
        """Drop until no more than so much is kept."""
        self._make_room(self.room + max(0, self.nbytes - most_bytes), set())

    def clear(self) -> None:
        self._roots.clear()
        self._heap.clear()
        self.nbytes = self._nodes = 0

    def _make_room(self, wished: int, spared: set[Node | None]) -> int:
        """Drop until `wished` bytes fit, but nothing that is spared. Returns how many fit."""
        put_back = []
        while self.room < wished and self._heap:
            entry = heapq.heappop(self._heap)
            value, used, _, node = entry
            if not self._droppable(node) or (value, used) != (node.value, node.used):
                continue
            if node in spared:
                put_back.append(entry)
                continue
            self._clock = max(self._clock, value)
            if node.mark is not None:
                self.nbytes -= node.mark.nbytes
                node.mark = None
            self._prune(node, spared)
        for entry in put_back:
            heapq.heappush(self._heap, entry)
        return self.room

    @property
    def room(self) -> int:
        return self.budget_bytes - self.live_bytes - self.nbytes

    def _droppable(self, node: Node) -> bool:
        """It is in the tree, and nothing hangs on it; a mark can go from anywhere."""
        if node.parent is None:
            return False
        return node.mark is not None if self.marked else not node.children

    def _prune(self, node: Node, spared: set[Node | None]) -> None:
        """Take away the end of a sequence: a node, or as many as cannot be taken up without the mark that is gone."""
        while node.parent is not None and not node.children and node.mark is None and node not in spared:
            parent = node.parent
            del parent.children[node.tokens[0]]
            node.parent = None
            self.nbytes -= node.part_bytes
            self._nodes -= 1
            node = parent
            if not self.marked:
                break
        if node.parent is None and not node.children:
            self._roots = {name: root for name, root in self._roots.items() if root is not node}
        elif self._droppable(node):
            self._push(node)

    # --- values

    def _touch(self, nodes: list[Node]) -> None:
        """They were of use: their value counts from now."""
        self._uses += 1
        for node in nodes:
            node.used = self._uses
            node.value = self._clock + self._worth(node)
            if self._droppable(node):
                self._push(node)
        if len(self._heap) > 64 + 4 * self._nodes:
            self._heap = [
                entry
                for entry in self._heap
                if self._droppable(entry[3]) and entry[:2] == (entry[3].value, entry[3].used)
            ]
            heapq.heapify(self._heap)

    def _worth(self, node: Node) -> float:
        """Tokens that would have to be computed again without it, by byte that its end would free."""
        tokens, weight = len(node.tokens), node.nbytes
        above = node.parent
        if self.marked:
            alone = not node.children
            weight = node.nbytes if alone else node.nbytes - node.part_bytes
            while above is not None and above.parent is not None and above.mark is None:
                tokens += len(above.tokens)
                alone = alone and len(above.children) == 1
                weight += above.part_bytes if alone else 0
                above = above.parent
        return tokens / max(weight, 1)

    def _push(self, node: Node) -> None:
        self._pushes += 1
        heapq.heappush(self._heap, (node.value, node.used, self._pushes, node))


def _up(node: Node | None) -> Iterator[Node]:
    """A node and those before it, without the root."""
    while node is not None and node.parent is not None:
        yield node
        node = node.parent


def _below(node: Node | None) -> Iterator[Node]:
    """A node and all after it, the nearest first in each branch."""
    pending = [node] if node is not None else []
    while pending:
        node = pending.pop()
        yield node
        pending.extend(node.children.values())


def _packed(tokens: Sequence[int]) -> array[int]:
    return tokens if isinstance(tokens, array) else array("I", tokens)


def common(edge: array[int], wanted: array[int], at: int) -> int:
    """How many tokens of `edge` are those of `wanted` from `at` on. Compared in halves, since arrays compare fast."""
    high = min(len(edge), len(wanted) - at)
    if edge[:high] == wanted[at : at + high]:
        return high
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if edge[low:middle] == wanted[at + low : at + middle]:
            low = middle
        else:
            high = middle
    return low
