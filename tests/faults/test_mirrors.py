"""What followers hold is what the daemon holds, however they lag, leave and resume, and whoever is killed meanwhile."""

from __future__ import annotations

import os

import pytest

from support.daemon import Daemon
from support.hub import Hub
from support.mirrors import SETTINGS, Followed

STEPS = 10_000


@pytest.mark.slow
def test_snapshot_plus_events_is_the_daemons_state() -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"python3 tools/dev.py faults mirrors --steps {STEPS} --seed {seed}")  # shown where it fails
    with Hub() as hub, Daemon(bad_child="worker", env=hub.env(), **SETTINGS) as daemon:
        tally = Followed(daemon, hub, seed).run(STEPS)
    assert tally["steps"] == STEPS
    assert tally["compared"] > 200
    for what in ("lagged", "resumed", "began anew, though it asked to resume", "lost the daemon"):
        assert tally[what], f"nobody {what}"
