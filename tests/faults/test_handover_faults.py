"""Something happens at a step of a handover; `tools/dev.py faults handovers` has it happen at every one."""

from __future__ import annotations

import os
import random

import pytest

from support.handover_faults import NOTHING, PLACES, Handovers, faults
from support.mortal_handover import NEW, OLD


def test_every_step_is_come_by_in_this_order() -> None:
    with Handovers("alone", 0) as handovers:
        handovers.run(NOTHING)
        steps = list(dict.fromkeys(handovers.trace()))  # the new one sweeps once more in the end
    assert [step for step in steps if step.startswith("old")] == [f"old {step}" for step in OLD]
    assert [step for step in steps if step.startswith("new")] == [f"new {step}" for step in NEW]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_one_serves_whatever_happens_at_a_step(place: str) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}; python3 tools/dev.py faults handovers")  # shown where it fails
    with Handovers(place, seed) as handovers:
        handovers.run(random.Random(seed).choice(faults(place)))
