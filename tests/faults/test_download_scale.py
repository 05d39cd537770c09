"""Large models, and models of many files: what their downloads cost everybody else. tools/soak.py goes to 60 GB."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from support.daemon import Daemon
from support.download_scale import MB, Figures, measure
from support.hub import Hub, Sparse, synthetic_files

REPO = "org/large"
FETCHER_RSS, DAEMON_RSS = 120 * MB, 60 * MB
# Ten a second and model, however quick it goes; the beginning and the end may fall into the same second.
EVENTS_A_SECOND = 12
# The promise is 5 ms. Here the hub, the fetcher, the pinging client and other tests share two cores with the daemon.
PING_P99_S = 0.1


def costs(files: Mapping[str, bytes | Sparse]) -> Figures:
    with Hub() as hub, Daemon(bad_child="worker", env=hub.env()) as daemon:
        hub.commit(REPO, files)
        figures = measure(daemon, REPO)
    print(*figures.lines(), sep="\n")
    assert figures.fetcher_rss < FETCHER_RSS
    assert figures.daemon_rss < DAEMON_RSS
    assert figures.ping_p99_s < PING_P99_S
    assert figures.most_events <= EVENTS_A_SECOND
    return figures


@pytest.mark.slow
def test_a_file_of_two_gigabytes() -> None:
    figures = costs(synthetic_files(1, 2000 * MB))
    assert figures.size_bytes > 2000 * MB
    assert figures.events > 5
    assert figures.pings > 100


def test_a_model_of_two_hundred_files() -> None:
    small = {f"part-{number:03}.json": b'{"n": %d}' % number for number in range(150)}
    figures = costs(synthetic_files(50, MB) | small)
    assert figures.size_bytes > 50 * MB
    assert figures.events >= 1
