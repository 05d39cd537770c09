"""The benchmark program runs, and its table has what it promises; what the figures are is not judged here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench.py"
# The parts of a request's way, by the worker's clocks: tools/benchmarks/profile_rows.py says them for people.
PARTS = {
    "template": "template", "tokenise": "tokenise", "prefix cache": "prefix cache", "prefill": "prefill, forward",
    "forward": "decode, forward", "constrain": "decode, rule", "sample": "decode, sample", "detokenise": "detokenise",
    "encode": "encode frames", "pipe": "pipe between worker and daemon", "batch": "batch bookkeeping",
    "loop": "worker's loop",
}  # fmt: skip


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), "--smoke", *arguments], capture_output=True, text=True, timeout=600
    )


def rows(*names: str) -> dict[str, dict[str, Any]]:
    """By what they say they measured."""
    done = bench("--json", "--rows", *names)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["machine"]["cpu"]
    return {row["what"]: row for row in document["rows"]}


def are_numbers(measured: dict[str, dict[str, Any]]) -> bool:
    return all(math.isfinite(row["value"]) and math.isfinite(row["ours"]) for row in measured.values())


def test_the_sockets_rows_are_ratios() -> None:
    measured = rows("ping", "pipelined")
    assert len(measured) in (5, 8)  # within one core, and between two where the system lets us choose
    assert are_numbers(measured)
    targets = [row["target"] for row in measured.values() if row["target"]]
    assert targets == [["<=", 2.0], [">=", 20_000], [">=", 20_000]]


@pytest.mark.slow
@pytest.mark.model
def test_the_built_in_models_rows_are_ratios() -> None:
    measured = rows(
        "stream/cleanup", "batch/cleanup", "http/cleanup", "prefix/cleanup", "restart/cleanup", "jobs/cleanup"
    )  # fmt: skip
    assert len(measured) == 9
    assert are_numbers(measured)
    assert all(row["theirs"] > 0 and row["target"] for row in measured.values())


@pytest.mark.slow
@pytest.mark.model
def test_the_made_models_rows_are_ratios_and_nothing_is_left_running() -> None:
    measured = rows("size", "stream/shape", "fairness/dense")
    assert are_numbers(measured)
    assert measured["workers while a model is loaded"]["ours"] == 1
    assert measured["workers after it was unloaded"]["holds"]


@pytest.mark.slow
@pytest.mark.model
def test_the_rows_of_guesses_are_ratios() -> None:
    measured = rows("speculation")
    assert len(measured) == 4
    assert are_numbers(measured)
    assert all(row["theirs"] > 0 for row in measured.values())


@pytest.mark.slow
@pytest.mark.model
def test_the_profile_names_each_part_of_a_requests_way() -> None:
    measured = rows("profile/cleanup")
    assert are_numbers(measured)
    for label in ("cleanup, alone: ", "cleanup, 8 at once: "):
        parts = [what.removeprefix(label).partition(" (")[0] for what in measured if what.startswith(label)]
        assert parts[0] == "a request of 8 tokens, profiled"
        missing = {*PARTS.values(), "daemon, its CPU time"} - set(parts)
        assert missing == {"decode, rule"}  # no rule was asked for
    whole = measured["cleanup, alone: a request of 8 tokens, profiled"]["ours"]
    forward = next(row["ours"] for what, row in measured.items() if what.startswith("cleanup, alone: decode, forward"))
    assert 0 < forward < whole


@pytest.mark.slow
@pytest.mark.model
def test_the_rows_of_many_streams_and_of_chats_are_ratios() -> None:
    measured = rows("load/dense", "mixed/dense")
    assert len(measured) == 3
    assert are_numbers(measured)
    assert all(row["theirs"] > 0 and row["target"] for row in measured.values())


def test_the_table_names_the_machine_and_each_column() -> None:
    done = bench("--markdown", "--rows", "pipelined")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("- cpu: ") for line in lines)
    header = lines.index("| what | ours | theirs | ratio | target | holds |")
    assert len(lines[header:]) == 2 + 2


def test_a_row_that_does_not_exist_is_refused_by_name() -> None:
    done = bench("--rows", "pong")
    assert done.returncode == 2
    assert "pong" in done.stderr
    assert "pipelined" in done.stderr
