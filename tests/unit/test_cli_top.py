"""`mlxd top`: what it shows at any size, what keys do, and which bytes are which keys."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mlxd.cli.board import Board, Line
from mlxd.cli.screen import keys
from mlxd_client import types

NOW = 1_700_000_000.0


def model(name: str, **facts: Any) -> types.Model:
    return types.Model(**{"id": name, "state": "Ready", "source": "hub", "memory_bytes": 5_000_000} | facts)


def board(*models: types.Model, jobs: tuple[types.Job, ...] = ()) -> Board:
    made = Board()
    made.begin(types.Snapshot(models=list(models), jobs=list(jobs)))
    made.status = types.Status(
        version="1.2.3", pid=77, uptime_s=60.0, rss_bytes=30_000_000, clients=1, subscribers=1, workers=[],
        models=types.StatusModels(known=1, loaded=1), queue=types.StatusQueue(waiting=4, running=3),
        memory=types.Memory(budget_bytes=8_000_000_000, used_bytes=4_000_000_000),
    )  # fmt: skip
    first = types.Distribution(count=9, mean=0.1, stddev=0.1, least=0.1, most=2, p50=0.02, p90=1, p95=1.5, p99=2)
    made.stats = types.Stats(
        since_at=NOW, clients=types.ClientTotals(open=1, subscribers=1, accepted=1, refused=0),
        events=types.EventTotals(published=0, dropped=0, lagged=0), downloads=types.DownloadTotals(),
        models=[
            types.ModelStats(
                model=of.id, requests={"chat": {"stop": 5, "worker_died": 2, "cancelled": 9}}, first_token_s=first,
                now_tokens_per_s=30.0, recent_tokens_per_s=20.0,
            )
            for of in models[:1]
        ],
    )  # fmt: skip
    return made


def shown(lines: list[Line]) -> list[str]:
    return ["".join(span.text for span in line).rstrip() for line in lines]


DOWNLOAD = types.Job(
    job="download-1", kind="download", state="running", model="org/large", phase="downloading", done_bytes=250,
    total_bytes=1000, rate_bytes_s=75.0,
)  # fmt: skip


def test_it_shows_what_there_is() -> None:
    made = board(model("org/a", active=3, waiting=4), model("org/off", state="Downloaded"), jobs=(DOWNLOAD,))
    text = shown(made.lines(120, 30, NOW))
    assert len(text) == 30
    assert text[0].startswith("mlxd 1.2.3  up 60 s  1 client ")
    assert "4.0 GB of 8.0 GB" in text[1]
    assert "##########.........." in text[1]
    assert text[2] == "requests  3 running, 4 waiting  30 tokens/s  5 answered, 2 failed"
    assert text[4].split() == "MODEL STATE MEMORY RUN WAIT TOK/S 10 S FIRST P50 P95 UNLOADS".split()
    assert text[5].split() == "org/a Ready 5.0 MB 3 4 30 20 20 ms 1.5 s in use".split()
    assert text[7] == "org/large  [#####...............] 25%  downloading  250 B of 1.0 kB  75 B/s  10 s left"
    assert not any("org/off" in line for line in text)
    made.key("a")
    assert any("org/off" in line for line in shown(made.lines(120, 30, NOW)))


def test_it_says_when_a_model_goes_as_ps_does() -> None:
    models = [model("a", idle_unload_at=NOW + 90), model("b", pinned=True), model("c", leases=1), model("d")]
    table = shown(board(*models).lines(140, 30, NOW))[5:9]
    assert [line.split("  ")[-1] for line in table] == ["in 90 s", "pinned", "leased", "never"]


def test_a_batch_job_is_shown_by_its_items() -> None:
    job = types.Job(
        job="batch-1", kind="batch", state="running", name="nightly", total_items=8, done_items=2, failed_items=1,
        progress=0.25,
    )  # fmt: skip
    text = shown(board(model("m"), jobs=(job,)).lines(120, 30, NOW))
    assert text[7] == "nightly  [#####...............] 25%  running  2 of 8 items  1 failed"


def test_pressure_and_an_absent_daemon_are_said_at_once() -> None:
    made = board(model("m"))
    made.apply(types.Event(subscription=1, rev=1, name="memory_pressure", at=NOW, details={"level": "critical"}))
    assert "pressure: critical" in shown(made.lines(120, 30, NOW))[1]
    made.away = "does not run"
    assert shown(made.lines(120, 30, NOW))[0] == "mlxd  does not run"


names = st.text(max_size=60).map(lambda text: f"org/{text}")


@given(st.integers(1, 140), st.integers(1, 40), st.lists(names, max_size=12, unique=True), st.integers(0, 14))
def test_no_line_is_too_long_and_there_are_never_too_many(width: int, height: int, ids: list[str], down: int) -> None:
    made = board(*(model(id, idle_unload_at=NOW + 90) for id in ids), jobs=(DOWNLOAD,))
    for _ in range(down):
        made.key("down")
    lines = made.lines(width, height, NOW)
    assert len(lines) == height
    for text in shown(lines):
        assert cell_len(text) <= width
        assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in text)  # a name cannot move the cursor


def test_columns_go_before_names_do() -> None:
    made = board(model("mlx-community/Qwen3-1.7B-4bit"))
    wide, narrow, least = (shown(made.lines(width, 20, NOW)) for width in (120, 60, 20))
    assert "UNLOADS" in wide[4]
    assert "UNLOADS" not in narrow[4]
    assert "RUN" in narrow[4]
    assert least[5] == "mlx-co…B-4bit  Ready"


def test_the_chosen_model_stays_in_sight() -> None:
    made = board(*(model(f"m{number:02}") for number in range(30)))
    for _ in range(25):
        made.key("down")
    assert any(line.startswith("m24") for line in shown(made.lines(80, 12, NOW)))


def test_unloading_asks_first() -> None:
    made = board(model("a"), model("b", state="Downloading"))
    made.key("u")
    assert "choose a model" in made.message
    made.key("down")
    made.key("u")
    assert shown(made.lines(80, 20, NOW))[-1].startswith("unload a? ")
    assert made.key("q") is None  # no answer but y does anything, not even leaving
    assert made.message == "nothing was unloaded"
    made.key("u")
    assert made.key("y") == ("unload", "a")
    assert made.key("y") is None
    made.key("down")
    made.key("u")
    assert made.message == "b is not loaded"
    assert made.key("q") == ("quit", "")


def test_sorting() -> None:
    made = board(model("a", memory_bytes=1), model("b", memory_bytes=9, active=1), model("c", memory_bytes=5, active=2))

    def order() -> str:
        return "".join(row.model.id for row in made.rows())

    seen = [order()]
    for _ in range(3):
        made.key("s")
        seen.append(order())
    assert seen == ["abc", "bca", "cba", "abc"]  # by name, memory, requests, tokens a second
    made.key("left")
    assert order() == "cba"


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("q", ["q"]), ("\x1b[A\x1b[B", ["up", "down"]), ("\x1bOC", ["right"]), ("\x1b", []), ("\x1b[3~q", ["q"]),
        ("\x1b[1;5Cu", ["u"]), ("su", ["s", "u"]), ("\x1b[", []), ("\x1bOPy", ["y"]),
    ],
)  # fmt: skip
def test_keys(typed: str, found: list[str]) -> None:
    assert keys(typed) == found


@given(st.text(alphabet="\x1b[O;~1234ABCDquy", max_size=40))
def test_any_input_is_keys(typed: str) -> None:
    for key in keys(typed):
        board(model("a")).key(key)
