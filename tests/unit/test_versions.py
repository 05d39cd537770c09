"""Which version is the older one."""

from __future__ import annotations

import pytest

from mlxd.versions import is_older

IN_ORDER = "0 0.1.0.dev1 0.1.0a1 0.1.0b2 0.1.0rc1 0.1.0rc2 0.1 0.1.1 0.2.dev1 0.2 0.10 1".split()


def test_older_ones_come_first() -> None:
    for place, version in enumerate(IN_ORDER):
        for other_place, other in enumerate(IN_ORDER):
            assert is_older(version, other) == (place < other_place), (version, other)


def test_the_same_written_otherwise_is_not_older() -> None:
    assert not is_older("0.1", "0.1.0")
    assert not is_older("0.1.0", "0.1")
    assert not is_older("0.1+local.1", "0.1")


@pytest.mark.parametrize("odd", ["", "x", "1.", "1..2", "1.0-3", "1.0;rm", "9" * 40, "-1"])
def test_what_cannot_be_understood_is_never_older(odd: str) -> None:
    assert not is_older(odd, "1")
    assert not is_older("0.1", odd)
