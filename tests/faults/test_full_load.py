"""Told to end with everything under way at once, the daemon is gone in time, with status 0, and all are answered."""

from __future__ import annotations

import pytest

from support.fullload import EXTRA_S, SIGNALS, FullLoad
from support.hub import Hub

DRAIN_S = 1.0


@pytest.mark.parametrize("how", ["SIGTERM", "twice"])
def test_it_ends_in_time(how: str) -> None:
    drain_s = 3600.0 if how == "twice" else DRAIN_S
    with Hub() as hub, FullLoad.daemon_of(hub, drain_s=drain_s) as daemon:
        load = FullLoad(daemon, hub)
        load.begin()
        took_s = load.end(*SIGNALS[how])
        load.close()
        assert took_s < EXTRA_S + (0.0 if how == "twice" else DRAIN_S)
