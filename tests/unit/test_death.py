"""Deaths in words, and what is kept of a child's last ones."""

from __future__ import annotations

import signal
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mlxd.children.death import LAST_WORDS_BYTES, Death, clean_last_words, signal_name


def test_each_cause_has_its_sentence() -> None:
    facts: dict[str, Any] = {"kind": "worker", "name": "m", "pid": 7, "uptime_s": 2.0}
    assert Death(cause="exit", exit_code=3, **facts).describe() == "the worker (pid 7) exited with code 3 after 2.0 s"
    assert (
        Death(cause="signal", signal="SIGSEGV", **facts)
        .describe()
        .startswith("the worker (pid 7) was ended by SIGSEGV")
    )
    assert "(no sign of life for 15 s)" in Death(cause="hang", detail="no sign of life for 15 s", **facts).describe()
    assert Death(cause="stopped", exit_code=0, **facts).expected


def test_the_error_carries_only_what_is_known() -> None:
    error = Death(cause="hang", kind="worker", name="m", pid=7, signal="SIGKILL").to_error()
    assert error.details == {"cause": "hang", "signal": "SIGKILL"}
    assert error.kind == "worker_died"


def test_last_words_are_the_last_lines() -> None:
    raw = b"".join(b"line %d\n" % k for k in range(10_000))
    words = clean_last_words(raw)
    assert words.startswith("line ")
    assert words.endswith("line 9999")
    assert LAST_WORDS_BYTES - 20 < len(words) <= LAST_WORDS_BYTES


def test_control_characters_and_redrawn_lines_go() -> None:
    assert clean_last_words(b"\x1b[1;31mred\x1b[0m\x07\n 10%\r 50%\r100%\r\nlast\x00\n\n") == "red\n100%\nlast"


def test_a_fatal_error_is_kept_from_its_first_line() -> None:
    frames = b"".join(b'  File "a.py", line %d in f\n' % k for k in range(200))
    raw = (
        b"noise\n" * 50 + b"Fatal Python error: Segmentation fault\n\n" + frames + b"Extension modules: " + b"x, " * 900
    )
    assert clean_last_words(raw).startswith("Fatal Python error: Segmentation fault\n")


@given(st.binary(max_size=6000), st.integers(1, 300))
def test_any_bytes_become_printable_text_within_the_limit(raw: bytes, limit: int) -> None:
    words = clean_last_words(raw, limit)
    assert len(words.encode()) <= limit
    assert all(character.isprintable() for character in words.replace("\n", ""))


def test_signals_without_a_name_have_a_number() -> None:
    assert signal_name(signal.SIGKILL) == "SIGKILL"
    assert signal_name(40) == "SIG40"
