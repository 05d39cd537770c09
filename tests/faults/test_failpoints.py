"""Daemons killed at steps of theirs on disk: what they leave is old or new, and the next one goes on from there."""

from __future__ import annotations

import os
import random

import pytest

from support.failpoints import Failpoints
from support.hub import Hub

KILLS = 3


@pytest.mark.slow
def test_killed_before_any_step_on_disk() -> None:
    """tools/faults.py does it for every step."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}; python3 tools/dev.py faults failpoints")  # shown where it fails
    with Hub() as hub:
        points = Failpoints(hub)
        assert not points.kill_at(1_000_000)
        assert points.steps > 20
        # Towards the end there may be a step fewer than the first time.
        steps = random.Random(seed).sample(range(2, points.steps - 5), KILLS)
        assert all(points.kill_at(step) for step in steps), steps
