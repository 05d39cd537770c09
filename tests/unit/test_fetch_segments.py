"""Which bytes are there, which are missing, and how the missing ones are shared out."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mlxd.fetch.segments import (
    CHUNK_BYTES,
    MAX_SEGMENT_BYTES,
    MIN_SPLIT_BYTES,
    Segment,
    chunk_count,
    cut,
    front,
    held_bytes,
    missing,
)  # fmt: skip


@st.composite
def maps(draw: st.DrawFn) -> tuple[bytearray, int]:
    chunks = draw(st.lists(st.sampled_from([0, 1]), max_size=200))
    short = draw(st.integers(0, CHUNK_BYTES - 1)) if chunks else 0
    return bytearray(chunks), len(chunks) * CHUNK_BYTES - short


@given(maps())
def test_what_is_held_and_what_is_missing_is_the_whole_file(known: tuple[bytearray, int]) -> None:
    chunks, size = known
    assert chunk_count(size) == len(chunks)
    gaps = list(missing(chunks, size))
    assert held_bytes(chunks, size) + sum(stop - start for start, stop in gaps) == size
    assert all(start < stop for start, stop in gaps)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(gaps))
    assert front(chunks, size) == (gaps[0][0] if gaps else size)


@given(maps(), st.integers(1, 8))
def test_segments_cover_the_gaps_once_and_in_order(known: tuple[bytearray, int], connections: int) -> None:
    chunks, size = known
    gaps = list(missing(chunks, size))
    at = -1
    covered: list[tuple[int, int]] = []
    for segment in cut(gaps, connections):
        assert segment.at >= at
        assert segment.at % CHUNK_BYTES == 0
        assert 0 < segment.left <= MAX_SEGMENT_BYTES
        at = segment.stop
        if covered and covered[-1][1] == segment.at:
            covered[-1] = (covered[-1][0], segment.stop)
        else:
            covered.append((segment.at, segment.stop))
    assert covered == gaps


@given(st.lists(st.integers(1, 3 * CHUNK_BYTES), min_size=1, max_size=30))
def test_a_chunk_is_complete_once_all_its_bytes_are_written_and_not_before(steps: list[int]) -> None:
    size = sum(steps)
    segment = Segment(0, size)
    complete: list[int] = []
    for step in steps:
        complete += segment.advance(step, size)
        expected = chunk_count(size) if segment.at == size else segment.at // CHUNK_BYTES
        assert complete == list(range(expected))


def test_half_of_a_large_segment_can_be_given_away_where_a_chunk_begins() -> None:
    segment = Segment(CHUNK_BYTES, CHUNK_BYTES + 3 * MIN_SPLIT_BYTES + 7)
    stop = segment.stop
    given_away = segment.split()
    assert given_away is not None
    assert given_away.at == segment.stop
    assert given_away.at % CHUNK_BYTES == 0
    assert given_away.stop == stop
    assert abs(given_away.left - segment.left) <= 2 * CHUNK_BYTES
    assert Segment(0, MIN_SPLIT_BYTES - 1).split() is None
