"""How the memory budget is shared out among the models that are loaded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlxd.core.lifecycle import Lifecycle
from mlxd.core.records import ModelRecord
from mlxd.core.room import shares


def record(worker: int, need: int, took: int | None = None, stopping: str | None = None) -> ModelRecord:
    made = ModelRecord(f"a/{worker}", "hub", Lifecycle(f"a/{worker}"), need)
    made.worker, made.memory_bytes, made.stopping = worker, took, stopping
    return made


def test_what_is_free_is_shared_evenly() -> None:
    assert shares([record(1, 30)], 100) == {1: 70}
    assert shares([record(1, 30), record(2, 50)], 100) == {1: 10, 2: 10}


def test_what_a_model_took_is_its_own() -> None:
    assert shares([record(1, 30, took=40), record(2, 50, took=20)], 100) == {1: 15, 2: 5}
    assert shares([record(1, 30, took=90), record(2, 50)], 100) == {1: 60, 2: 0}  # more than there is, for now


def test_what_a_draft_model_takes_is_no_share() -> None:
    drafted = record(1, 30)
    drafted.draft_takes = 20
    assert shares([drafted], 100) == {1: 50}


def test_who_goes_gets_nothing_more() -> None:
    assert shares([record(1, 30), record(2, 50, stopping="idle")], 100) == {1: 20}


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 80), st.booleans()), max_size=6), st.integers(0, 400))
def test_together_it_is_never_more_than_the_budget(models: list[tuple[int, int, bool]], budget: int) -> None:
    records = [record(n, need, took, "idle" if goes else None) for n, (need, took, goes) in enumerate(models)]
    reserved = sum(one.reserved_bytes for one in records)
    found = shares(records, budget)
    held = sum(one.need_bytes + found[n] if n in found else one.reserved_bytes for n, one in enumerate(records))
    assert held <= max(budget, reserved)
    assert all(share >= 0 for share in found.values())
