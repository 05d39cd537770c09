"""The short form of `python3 tools/dev.py handovers`: daemons follow each other, and no client notices."""

from __future__ import annotations

from support.handovers import Load, follow
from support.restarts import Relay

TIMES = 5


def test_daemons_follow_each_other_under_load() -> None:
    with Relay(bad_child="worker") as daemon:
        load = Load(daemon, streams=3)
        with load.running():
            worst = follow(daemon, load, TIMES)
        daemon.newest()
        assert len(daemon.seen) == TIMES + 1
        assert min(load.answers, len(load.waits_s)) > TIMES
        assert max(worst) < 5.0  # a machine may be busy; what it is on a quiet one is in docs/upgrades.md
