"""Two minutes of everything at once: requests, cancels, hang-ups, dying workers, downloads, garbage, deaf subscribers,
settings that change. Afterwards the daemon holds what it held before. tools/soak.py does it for hours."""

from __future__ import annotations

import os

import pytest

from support.daemon import Daemon
from support.hub import Hub
from support.soaking import SETTINGS, Soak

SECONDS = 120.0


@pytest.mark.slow
def test_nothing_grows() -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"python3 tools/dev.py soak --minutes 2 --seed {seed}")  # shown where it fails
    with Hub() as hub, Daemon(bad_child="worker", env=hub.env(), **SETTINGS) as daemon:
        soak = Soak(daemon, hub, seed)
        soak.run(SECONDS)
        assert daemon.log().count("request_failed_by_bug") == 0
    assert len(soak.looks) >= 4
    for what in ("asked", "answered process", "refused cancelled", "children killed", "clients of garbage"):
        assert soak.tally[what] > 10, f"hardly any {what}"
