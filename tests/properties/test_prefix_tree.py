"""Kept prefixes by property: never a wrong match, never over the budget, nothing lost for nothing."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mlxd.worker.prefix import LONGEST_EDGE, TOKEN_BYTES, Node, PrefixTree

PART_BYTES, MARK_BYTES = 10, 300


@dataclass
class FakePart:
    """Its KV are the tokens themselves, with all that came before them, as real KV depends on that."""

    entries: list[tuple[int, int]]

    @property
    def nbytes(self) -> int:
        return PART_BYTES * len(self.entries)

    def split(self, at: int) -> tuple[FakePart, FakePart]:
        return FakePart(self.entries[:at]), FakePart(self.entries[at:])


@dataclass
class FakeMark:
    tokens: tuple[int, ...]
    cuttable: bool
    nbytes: int = MARK_BYTES


class FakeRow:
    token_bytes = PART_BYTES
    mark_bytes = MARK_BYTES

    def __init__(self, tokens: tuple[int, ...], *, cuttable: bool = False, fails: bool = False) -> None:
        self.tokens = tokens
        self.entries = [(token, hash(tokens[:at])) for at, token in enumerate(tokens)]
        self.cuttable = cuttable
        self.fails = fails
        self.made = 0

    def part(self, start: int, end: int) -> FakePart:
        if self.fails:
            raise RuntimeError("the device failed")
        self.made += end - start
        return FakePart(self.entries[start:end])

    def mark(self) -> FakeMark:
        return FakeMark(self.tokens, self.cuttable)


def nodes(tree: PrefixTree) -> list[Node]:
    found, pending = [], list(tree._roots.values())
    while pending:
        node = pending.pop()
        found.append(node)
        pending.extend(node.children.values())
    return [node for node in found if node.parent is not None]


def check_found(tree: PrefixTree, namespace: bytes, tokens: tuple[int, ...], limit: int) -> int:
    found = tree.find(namespace, tokens, limit)
    if found is None:
        return 0
    assert 0 < found.length <= limit
    entries = [entry for part, count in found.parts for entry in part.entries[:count]]  # type: ignore[attr-defined]
    assert entries == FakeRow(tokens).entries[: found.length]
    if tree.marked:
        assert isinstance(found.mark, FakeMark)
        assert found.mark.tokens[: found.length] == tokens[: found.length]
        assert found.mark.cuttable or len(found.mark.tokens) == found.length
    return found.length


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=24).map(tuple)
NAMESPACES = st.sampled_from([b"", b"other"])


class Kept(RuleBasedStateMachine):
    """Sequences come, are asked for, and batches grow and shrink beside them."""

    @initialize(marked=st.booleans(), budget=st.sampled_from([0, 400, 2_000, 1_000_000]))
    def begin(self, marked: bool, budget: int) -> None:
        self.tree = PrefixTree(budget, marked=marked)
        self.added: set[tuple[bytes, tuple[int, ...]]] = set()
        self.ample = budget == 1_000_000

    @rule(namespace=NAMESPACES, tokens=TOKENS, cuttable=st.booleans())
    def add(self, namespace: bytes, tokens: tuple[int, ...], cuttable: bool) -> None:
        row = FakeRow(tokens, cuttable=cuttable)
        assert self.tree.add(namespace, tokens, row) == row.made
        self.added.add((namespace, tokens))

    @rule(namespace=NAMESPACES, tokens=TOKENS)
    def fail_to_add(self, namespace: bytes, tokens: tuple[int, ...]) -> None:
        try:
            self.tree.add(namespace, tokens, FakeRow(tokens, fails=True))
        except RuntimeError:
            return
        self.added.add((namespace, tokens))

    @rule(namespace=NAMESPACES, tokens=TOKENS, data=st.data())
    def find(self, namespace: bytes, tokens: tuple[int, ...], data: st.DataObject) -> None:
        limit = data.draw(st.integers(0, len(tokens)))
        length = check_found(self.tree, namespace, tokens, limit)
        kept = [other for space, other in self.added if space == namespace]
        if self.tree.marked:
            best = max(
                (len(other) for other in kept if tokens[: len(other)] == other and len(other) <= limit), default=0
            )
            assert length >= best or not self.ample
        else:
            best = max((common(other, tokens) for other in kept), default=0)
            assert length <= min(best, limit)
            assert length == min(best, limit) or not self.ample

    @rule(live=st.integers(0, 3_000))
    def grow(self, live: int) -> None:
        self.tree.fit(live)

    @rule(share=st.sampled_from([0.0, 0.5, 1.0]))
    def shrink(self, share: float) -> None:
        most = int(self.tree.nbytes * share)
        self.tree.shrink(most)
        assert self.tree.nbytes <= most
        self.ample = self.ample and share == 1.0

    @rule()
    def clear(self) -> None:
        self.tree.clear()
        self.added.clear()

    @invariant()
    def the_books_are_right(self) -> None:
        tree = self.tree
        assert tree.nbytes == sum(node.nbytes for node in nodes(tree))
        assert len(tree) == len(nodes(tree))
        assert tree.nbytes <= max(0, tree.budget_bytes - tree.live_bytes)
        for node in nodes(tree):
            assert node.parent is not None
            assert node.parent.children[node.tokens[0]] is node
            assert node.end == node.parent.end + len(node.tokens)
            assert node.part.nbytes == PART_BYTES * len(node.tokens)  # type: ignore[union-attr]
            if tree.marked:
                assert node.children or node.mark is not None, "an end that nobody can take up"


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


Kept.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
test_kept = Kept.TestCase


@given(st.lists(TOKENS, min_size=1, max_size=8))
def test_what_begins_alike_is_kept_once(sequences: list[tuple[int, ...]]) -> None:
    tree = PrefixTree(1_000_000, marked=False)
    for tokens in sequences:
        tree.add(b"", tokens, FakeRow(tokens))
    prefixes = {tokens[:end] for tokens in sequences for end in range(1, len(tokens) + 1)}
    assert tree.nbytes == len(prefixes) * (PART_BYTES + TOKEN_BYTES)


def per(tokens: int) -> int:
    return tokens * (PART_BYTES + TOKEN_BYTES)


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    tree = PrefixTree(per(30), marked=False)
    shared = tuple(range(10))
    for end in (50, 60):
        tree.add(b"", (*shared, *range(end, end + 10)), FakeRow((*shared, *range(end, end + 10))))
    assert check_found(tree, b"", (*shared, *range(50, 60), 1), 20) == 20  # the first one is of use
    tree.add(b"", (*shared, *range(70, 80)), FakeRow((*shared, *range(70, 80))))
    assert check_found(tree, b"", (*shared, *range(60, 70)), 20) == 10
    assert check_found(tree, b"", (*shared, *range(50, 60)), 20) == 20


def test_of_marks_the_one_that_saves_least_goes_first() -> None:
    tree = PrefixTree(per(300) + 3 * MARK_BYTES, marked=True)
    for tokens in ((1,) * 200, (2,) * 5, (3,) * 90):
        tree.add(b"", tokens, FakeRow(tokens))
    tree.fit(MARK_BYTES // 2)
    assert [check_found(tree, b"", (token,) * 300, 299) for token in (1, 2, 3)] == [200, 0, 90]


def test_a_long_sequence_loses_its_end_first() -> None:
    tokens = tuple(range(3 * LONGEST_EDGE))
    tree = PrefixTree(per(len(tokens)), marked=False)
    tree.add(b"", tokens, FakeRow(tokens))
    tree.fit(1)
    assert check_found(tree, b"", tokens, len(tokens)) == 2 * LONGEST_EDGE


def test_of_what_is_too_long_the_beginning_is_kept() -> None:
    tokens = tuple(range(100))
    tree = PrefixTree(per(40), marked=False)
    tree.add(b"", tokens, FakeRow(tokens))
    assert check_found(tree, b"", tokens, 100) == 40


@pytest.mark.parametrize("marked", [False, True])
def test_long_prompts_take_milliseconds(marked: bool) -> None:
    tree = PrefixTree(1 << 40, marked=marked)
    prompts = [array("I", range(turn, turn + 100_000)) for turn in range(5)]

    class Row(FakeRow):
        def __init__(self) -> None:
            self.tokens, self.cuttable = (), False

        def part(self, start: int, end: int) -> FakePart:
            return FakePart([])

    took = []
    for prompt in prompts:
        began = time.perf_counter()
        tree.add(b"", prompt.tolist(), Row())
        assert tree.find(b"", [*prompt, 1], 100_000) is not None
        took.append(time.perf_counter() - began)
    assert sorted(took)[2] < 0.05
