"""Every request is answered once or its connection closes, whatever is cancelled, hung up on, killed or restarted."""

from __future__ import annotations

import os

import pytest

from support.daemon import Daemon
from support.ledger import SETTINGS, Ledger

SECONDS = 10.0


@pytest.mark.slow
def test_every_request_has_one_answer_or_no_connection() -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"python3 tools/dev.py faults answers --seconds {SECONDS:g} --seed {seed}")  # shown where it fails
    with Daemon(bad_child="worker", **SETTINGS) as daemon:
        tally = Ledger(daemon, seed).run(SECONDS)
    answered = sum(count for what, count in tally.items() if what.startswith(("answered", "refused")))
    assert answered > 200
    assert tally["asked"] == answered + tally["hung up on"] + tally["lost with their connection"]
    for what in ("refused cancelled", "workers killed", "half-closed", "hang-ups"):
        assert tally[what], f"nothing was {what}"
    assert tally["daemons killed"] + tally["daemons stopped"] >= 1
