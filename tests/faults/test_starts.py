"""Daemons that start against each other and are killed at any step of it; `tools/dev.py faults starts` does more."""

from __future__ import annotations

from support.starts import StartLoop


def test_one_serves_whatever_happens_to_the_others() -> None:
    with StartLoop(seed=5, say=lambda line: None) as loop:
        loop.run(24)
    assert loop.tally["next start served"] >= 1
    assert loop.tally["the one that served: killed"] >= 2
